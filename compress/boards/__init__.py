"""Where artifacts run. A board never sees Keras."""
