"""A Keras model as a graph: read it, rewrite it, fold batch normalisation, name its kernels."""
