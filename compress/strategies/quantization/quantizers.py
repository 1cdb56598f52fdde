"""Quantizers of weights for training: the forward pass sees levels, the backward pass goes straight through.

Sources: Bengio et al., straight-through estimator (arXiv 1308.3432); Esser et al., learned step size quantization
(arXiv 1902.08153, equations 1 to 3, and section 2.2 for the scale of the steps' gradient).
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf


def straight_through(rounded: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    """Return ``rounded`` with the gradient of ``value``."""
    return value + tf.stop_gradient(rounded - value)


def paced(value: tf.Tensor, pace: float) -> tf.Tensor:
    """Return ``value`` with its gradient times ``pace``."""
    return straight_through(value, value * pace)


class UniformQuantizer:
    """Whole multiples of a step for each output; the step makes the largest weight the outermost level."""

    def __init__(self, bits: int, channel_axes: tuple[int, ...], rank: int) -> None:
        self.variables: list[tf.Variable] = []
        self.most = 2 ** (bits - 1) - 1
        self._others = [axis for axis in range(rank) if axis not in {a % rank for a in channel_axes}]

    def steps(self, latent: tf.Tensor) -> tf.Tensor:
        """Return the steps, in a shape that spreads over the weight's."""
        return tf.maximum(tf.reduce_max(tf.abs(latent), self._others, keepdims=True), 1e-12) / self.most

    def __call__(self, latent: tf.Tensor) -> tf.Tensor:
        """Return the nearest levels."""
        steps = tf.stop_gradient(self.steps(latent))
        return straight_through(tf.round(latent / steps) * steps, latent)


class StepQuantizer:
    """Whole multiples of a given step for each output; the steps may be trained with the weights."""

    def __init__(self, bits: int, steps: np.ndarray, weights: int, *, trained: bool) -> None:
        self.most = 2 ** (bits - 1) - 1
        self._steps = tf.Variable(steps, dtype=tf.float32, trainable=trained, name="steps")
        self.variables = [self._steps] if trained else []
        self._slowed = 1.0 / np.sqrt(weights / steps.size * self.most)

    def steps(self, latent: tf.Tensor) -> tf.Tensor:
        """Return the steps, in a shape that spreads over the weight's."""
        return tf.maximum(paced(self._steps, self._slowed), 1e-12)

    def __call__(self, latent: tf.Tensor) -> tf.Tensor:
        """Return the nearest levels."""
        steps = self.steps(latent)
        inside = tf.clip_by_value(latent / steps, -self.most, self.most)
        return straight_through(tf.round(inside), inside) * steps
