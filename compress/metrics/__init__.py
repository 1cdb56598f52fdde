"""Numbers: parameters, multiply-adds, bytes, peak memory, accuracy."""
