"""Parameters and multiply-adds of a Keras model, and budgets over them.

Conventions: ``params`` are the trainable parameters, frozen or not (batch-norm gamma and beta included, as the
published tables count them); one multiply-add is 1; activations, what multiplies them with one another, biases and
batch norms cost nothing.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf
import tf_keras

from compress.graph.kernels import kernels
from compress.graph.macs import weight_macs
from compress.graph.rewrite import nodes


def parameters(model: tf_keras.Model) -> list[tf.Variable]:
    """Return what training could change, frozen layers included; statistics of batch norms are no parameters."""
    found = {id(w): w for layer in model._flatten_layers(include_self=False) for w in layer._trainable_weights}
    return list(found.values())


def count_params(model: tf_keras.Model) -> int:
    """Return the number of parameters."""
    return int(sum(np.prod(w.shape) for w in parameters(model)))


def count_nonzero_params(model: tf_keras.Model) -> int:
    """Return the number of parameters that are not exactly zero."""
    return int(sum(np.count_nonzero(np.asarray(w)) for w in parameters(model)))


def count_macs(model: tf_keras.Model) -> int:
    """Return the multiply-adds for one sample."""
    return sum(weight_macs(model).values())


def layer_counts(model: tf_keras.Model) -> dict[str, dict[str, int]]:
    """Return for every layer of the flat model: output channels, weights (no biases), multiply-adds, output values."""
    table: dict[str, dict[str, int]] = {}
    for node in nodes(model):
        shapes = [tensor.shape for tensor in tf.nest.flatten(node.outputs)]
        row = table.setdefault(node.layer.name, {"channels": 0, "params": 0, "macs": 0, "activations": 0})
        row["channels"] = int(shapes[0][-1] or 0)
        row["activations"] += sum(int(np.prod([size or 1 for size in shape[1:]])) for shape in shapes)
    for kernel in kernels(model):
        row = table[kernel.layer.name]
        row["params"] += kernel.size
        row["macs"] += kernel.macs
    return table
