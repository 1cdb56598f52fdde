"""Calibration without data: inputs made so that batch norms see the statistics that they remember.

Source: Cai et al., ZeroQ (arXiv 2001.00281, section 3.1, equation 3).
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf
import tf_keras

from compress.errors import CompressError
from compress.graph.kernels import kernel_attributes
from compress.graph.rewrite import calls, copy_model
from compress.progress import progress

_STEPS = 300
_RATE = 0.1
_BATCH = 64
_SIZES = (1.0, 4.0, 16.0, 64.0)


def synthetic_samples(model: tf_keras.Model, count: int, seed: int, where: str) -> np.ndarray:
    """Return inputs [count, ...] of the model on which its batch norms' inputs have the means and variances remembered.

    Args:
        model: a flat functional model with trained batch norms; it is only looked at.
        count: of samples, made in batches of 64.
        seed: of the noise that they start from.
        where: what an error names.

    Raises:
        CompressError: if the model has no batch norm that depends smoothly on its input (on whole numbers, or on words
            that are looked up, none does), or inputs that are no single tensor of known size.
    """
    model = copy_model(model)
    norms = [
        layer
        for layer in model.layers
        if isinstance(layer, tf_keras.layers.BatchNormalization) and calls(model)[layer.name] == 1
    ]
    norms = [norm for norm in norms if len(model.inputs) == 1 and _depends(norm, model)]
    if not norms or any(size is None for size in model.inputs[0].shape[1:]):
        raise CompressError(
            where,
            expected="a model of one input of floats and known size, with batch norms that depend on it smoothly: "
            "inputs are made from their statistics",
            received=f"{len(model.inputs)} inputs, {len(norms)} such batch norms",
            fix="Calibrate on the training part: calibrate_on=training.",
        )
    look = tf_keras.Model(model.inputs, [norm.input for norm in norms])
    gain, shift = _start(look, norms, *_preprocessing(model))
    parts = []
    with progress("synthetic samples") as shown:
        total = -(-count // _BATCH)
        for number in range(total):
            parts.append(_batch(look, norms, gain, shift, (seed, number)))
            shown.advance(number + 1, total, "batches")
    return np.concatenate(parts)[:count]


def _depends(norm: tf_keras.layers.BatchNormalization, model: tf_keras.Model) -> bool:
    """Say whether what the norm reads changes smoothly with the model's input."""
    (source,) = model.inputs
    if not source.dtype.is_floating:
        return False
    zeros = tf.zeros([1, *(size or 1 for size in source.shape[1:])], source.dtype)
    with tf.GradientTape() as tape:
        tape.watch(zeros)
        value = tf_keras.Model(source, norm.input)(zeros, training=False)
    return tape.gradient(value, zeros) is not None


def _batch(
    look: tf_keras.Model,
    norms: list[tf_keras.layers.BatchNormalization],
    gain: np.ndarray,
    shift: np.ndarray,
    seed: tuple[int, int],
) -> np.ndarray:
    shape = (_BATCH, *look.inputs[0].shape[1:])
    latent = tf.Variable(tf.random.stateless_normal(shape, seed))
    optimizer = tf_keras.optimizers.Adam(tf_keras.optimizers.schedules.CosineDecay(_RATE, _STEPS))

    @tf.function  # type: ignore[untyped-decorator]
    def step() -> None:
        with tf.GradientTape() as tape:
            loss = _distance(look, norms, (latent - shift) / gain)
        optimizer.minimize(loss, [latent], tape=tape)

    for _ in range(_STEPS):
        step()
    return np.asarray((latent - shift) / gain, np.float32)


def _distance(look: tf_keras.Model, norms: list[tf_keras.layers.BatchNormalization], inputs: tf.Tensor) -> tf.Tensor:
    """Return how far the means and spreads that the batch norms see are from those that they remember."""
    loss = tf.constant(0.0)
    for norm, value in zip(norms, tf.nest.flatten(look(inputs, training=False)), strict=True):
        axes = [axis for axis in range(len(value.shape)) if axis not in norm.axis]
        mean, variance = tf.nn.moments(value, axes)
        # In units of the remembered spread, so that each batch norm counts alike.
        spread = norm.moving_variance + norm.epsilon
        loss += tf.reduce_mean((mean - norm.moving_mean) ** 2 / spread)
        loss += tf.reduce_mean((tf.sqrt(variance / spread + 1e-6) - 1.0) ** 2)
    return loss


def _start(
    look: tf_keras.Model, norms: list[tf_keras.layers.BatchNormalization], gain: np.ndarray, shift: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return gain and shift with which noise is nearest to what the batch norms remember.

    A network that reads pixels as they are needs inputs a hundred times as large as one that reads normalised ones.
    """
    noise = tf.random.stateless_normal((_BATCH, *look.inputs[0].shape[1:]), (0, 0))
    choices = [(gain / size, shift / size - offset) for size in _SIZES for offset in (0.0, 1.0, 2.0)]
    distances = [float(_distance(look, norms, (noise - own_shift) / own)) for own, own_shift in choices]
    return choices[int(np.argmin(distances))]


def _preprocessing(model: tf_keras.Model) -> tuple[np.ndarray, np.ndarray]:
    """Return gain and shift with which the first kernel reads the model's input, where that is all that lies between.

    Noise of the size that the kernel expects is where the search starts from; pixels are a hundred times as large.
    """
    shape = (1, *model.inputs[0].shape[1:])
    first = next((layer for layer in model.layers if kernel_attributes(layer)), None)
    if first is not None:
        read = tf_keras.Model(model.inputs, first.input)
        zero, one, two = (np.asarray(read(np.full(shape, value, np.float32))) for value in (0, 1, 2))
        if zero.shape == shape and np.allclose(two - one, one - zero, atol=1e-5) and (one != zero).all():
            return one - zero, zero
    return np.ones(shape, np.float32), np.zeros(shape, np.float32)
