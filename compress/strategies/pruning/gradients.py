"""Gradients of the loss on labelled samples, for the criteria that need them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf
import tf_keras

from compress.errors import CompressError
from compress.graph.softmax import gives_probabilities, logits_of
from compress.words import counted

_BATCH = 128


def loss_gradients(
    model: tf_keras.Model, variables: Sequence[tf.Variable], x: np.ndarray, y: np.ndarray, where: str
) -> list[np.ndarray]:
    """Return the gradient of the mean cross-entropy by each variable.

    ``where``: the configuration key of the criterion, for errors.

    Raises:
        CompressError: if the labels or the gradients say nothing.
    """
    return _mean(model, variables, x, y, _BATCH, where, squared=False)


def squared_gradients(
    model: tf_keras.Model, variables: Sequence[tf.Variable], x: np.ndarray, y: np.ndarray, where: str
) -> list[np.ndarray]:
    """Return the mean, over samples, of the squared gradient of a sample's cross-entropy by each variable.

    That is the diagonal of the empirical Fisher matrix. Samples are taken one by one: the square of a batch's mean
    gradient is something else.

    Raises:
        CompressError: as :func:`loss_gradients`.
    """
    return _mean(model, variables, x, y, 1, where, squared=True)


def inputs_of(model: tf_keras.Model, x: np.ndarray, where: str) -> np.ndarray | tuple[np.ndarray, ...]:
    """Return samples as the model takes them: the same for each of its inputs.

    Raises:
        CompressError: if they do not fit one.
    """
    for tensor in model.inputs:
        if not tensor.shape[1:].is_compatible_with(x.shape[1:]):
            raise CompressError(
                where,
                expected=f"samples that fit each input of {model.name}",
                received=f"samples of shape {x.shape[1:]} for {tensor.name}, which takes {tuple(tensor.shape[1:])}",
                fix="Bring a model that takes the data, in one input.",
            )
    return x if len(model.inputs) == 1 else tuple(x for _ in model.inputs)


def require_labels(y: np.ndarray, where: str) -> None:
    """Refuse samples that all have one label.

    Raises:
        CompressError: if they have.
    """
    if len(np.unique(y)) < 2:
        raise _useless(where, f"{counted(len(y), 'sample')} with one and the same label")


def require_gradients(found: Sequence[np.ndarray], where: str) -> None:
    """Refuse gradients that say nothing about any weight.

    Raises:
        CompressError: if they are all zero, or one is not finite.
    """
    if not all(np.isfinite(gradient).all() for gradient in found):
        raise _useless(where, "gradients that are not finite")
    if not any(gradient.any() for gradient in found):
        raise _useless(where, "gradients that are all zero")


def _mean(
    model: tf_keras.Model,
    variables: Sequence[tf.Variable],
    x: np.ndarray,
    y: np.ndarray,
    batch: int,
    where: str,
    *,
    squared: bool,
) -> list[np.ndarray]:
    require_labels(y, where)
    if model.outputs[0].shape.rank != 2:
        raise _useless(where, f"outputs of shape {tuple(model.outputs[0].shape)}, not one for each class")
    samples = inputs_of(model, x, where)
    probabilities = gives_probabilities(model)

    def gradient(inputs: tf.Tensor, labels: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            # Of several outputs, the first is the one that the labels are for.
            outputs = tf.nest.flatten(model(inputs, training=False))[0]
            logits = logits_of(outputs, probabilities)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits))
        found = tape.gradient(loss, variables, unconnected_gradients="zero")
        dense = [tf.convert_to_tensor(value) for value in found]
        return [tf.square(value) for value in dense] if squared else dense

    compiled = tf.function(gradient, reduce_retracing=True)
    sums = [np.zeros(v.shape) for v in variables]
    for inputs, labels in tf.data.Dataset.from_tensor_slices((samples, y)).batch(batch):
        for total, value in zip(sums, compiled(inputs, labels), strict=True):
            total += np.asarray(value, np.float64) * len(labels)
    means = [total / len(y) for total in sums]
    require_gradients(means, where)
    return means


def _useless(where: str, received: str) -> CompressError:
    return CompressError(
        where,
        expected="labelled samples and a model whose loss has gradients by its weights",
        received=received,
        fix=f"Bring labels, or choose a criterion that needs none ({where}: l2 for channels, magnitude for weights).",
    )
