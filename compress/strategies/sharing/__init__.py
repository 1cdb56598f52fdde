"""Parameter sharing: many weights, few values."""
