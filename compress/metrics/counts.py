"""Parameters and multiply-adds of a Keras model, and budgets over them.

Conventions: ``params`` are the trainable parameters (batch-norm gamma and beta included, as the
published tables count them); one multiply-add is 1; activations, biases and batch norms cost nothing.
"""

from __future__ import annotations

import numpy as np
import tf_keras

from compress.graph.kernels import kernels


def count_params(model: tf_keras.Model) -> int:
    """Return the number of trainable parameters."""
    return int(sum(np.prod(w.shape) for w in model.trainable_weights))


def count_nonzero_params(model: tf_keras.Model) -> int:
    """Return the number of trainable parameters that are not exactly zero."""
    return int(sum(np.count_nonzero(np.asarray(w)) for w in model.trainable_weights))


def count_macs(model: tf_keras.Model) -> int:
    """Return the multiply-adds for one sample."""
    return sum(kernel.macs for kernel in kernels(model))
