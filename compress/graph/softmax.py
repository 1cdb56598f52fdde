"""A model that ends in a softmax, and its logits.

Logarithms of probabilities are logits up to a constant only as far as float32 reaches: the softmax of a difference of
more than 87 is 0. So what learns or teaches is looked at before the softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import tensorflow as tf
import tf_keras

_BOUNDED = ("softmax", "sigmoid", "hard_sigmoid", "tanh", "relu")
_LEAST = 1e-37
"""About the smallest normal number of float32."""


def logits_of(outputs: tf.Tensor, probabilities: bool) -> tf.Tensor:
    """Return logits; for a model that ends in a softmax, its log-probabilities (equal up to a constant)."""
    return tf.math.log(tf.maximum(outputs, _LEAST)) if probabilities else outputs


def gives_probabilities(model: tf_keras.Model) -> bool:
    """Say whether the model's last operation is a softmax."""
    return ending(model) == "softmax"


def ending(model: tf_keras.Model) -> str:
    """Return the function that the model ends in: softmax, sigmoid, ...; linear, if it is none that has bounds."""
    layer = model.outputs[0].node.layer
    if isinstance(layer, tf_keras.layers.Softmax):
        return "softmax"
    # An operation layer carries the function that it calls, any other layer its activation.
    function = getattr(layer, "activation", None) or getattr(layer, "function", None)
    name = str(getattr(function, "__name__", ""))
    return next((known for known in _BOUNDED if name.startswith(known)), "linear")


def logits_tensor(model: tf_keras.Model) -> tf.Tensor:
    """Return the symbolic output of the model, within :func:`linear_ending`, before any softmax."""
    output = model.outputs[0]
    if gives_probabilities(model) and getattr(output.node.layer, "activation", None) is None:
        return tf.nest.flatten(output.node.keras_inputs)[0]
    return output


@contextmanager
def linear_ending(model: tf_keras.Model) -> Iterator[None]:
    """Make a last layer whose activation is the softmax linear; afterwards it is as it was."""
    last = model.outputs[0].node.layer
    activation = getattr(last, "activation", None)
    if activation is None or not gives_probabilities(model):
        yield
        return
    last.activation = tf_keras.activations.linear
    try:
        yield
    finally:
        last.activation = activation


def without_softmax(model: tf_keras.Model) -> tf_keras.Model:
    """Return the model that ends before the softmax, made of the same layers.

    The model is the caller's own: a last layer whose activation is the softmax becomes linear.
    """
    if not gives_probabilities(model):
        return model
    last, before = model.outputs[0].node.layer, logits_tensor(model)
    if before is model.outputs[0]:
        last.activation = tf_keras.activations.linear
        return model
    return tf_keras.Model(model.inputs, [before, *model.outputs[1:]], name=model.name)
