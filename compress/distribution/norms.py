"""Batch norms whose statistics are those of the whole batch, though each replica sees a part of it.

``tf_keras``' own ``synchronized=True`` takes the variance as a difference of two large means, leaves out the correction
by n / (n - 1) that its fused kernel makes, and has each replica of a process move the statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tensorflow as tf
import tf_keras

from compress.distribution.replicas import Distribution, mean_over_replicas, replica_number, replicas_here
from compress.errors import CompressError


def refuse_own_statistics(model: tf_keras.Model, distribution: Distribution, where: str) -> None:
    """Refuse layers of TFMOT where replicas share a batch: in each pass they move statistics of their own.

    Raises:
        CompressError: naming the first one.
    """
    package = "tensorflow_model_optimization"
    own = [layer.name for layer in model.layers if type(layer).__module__.startswith(package)]
    if distribution.divided and own:
        raise CompressError(
            where,
            expected="layers that replicas can share",
            received=f"{own[0]}, a layer of TFMOT",
            fix="Write distribution=none, or another scheme than tfmot.",
        )


@contextmanager
def synchronised(models: Sequence[tf_keras.Model], distribution: Distribution) -> Iterator[None]:
    """Have what is traced inside compute the batch norms of the models over all replicas."""
    kind = tf_keras.layers.BatchNormalization
    norms = [layer for model in models for layer in model.submodules if isinstance(layer, kind)]
    norms = norms if distribution.divided else []
    fused = [norm.fused for norm in norms]
    for norm in norms:
        whole = _WholeBatch(norm, distribution.replicas // distribution.workers)
        norm._calculate_mean_and_var, norm._assign_moving_average = whole.mean_and_variance, whole.move
        norm.fused = False
    try:
        yield
    finally:
        for norm, before in zip(norms, fused, strict=True):
            norm.fused = before
            del norm._calculate_mean_and_var, norm._assign_moving_average


class _WholeBatch:
    """What one batch norm does in the place of its own methods of these names."""

    def __init__(self, norm: Any, replicas_of_process: int) -> None:
        self._norm, self._local = norm, replicas_of_process
        self._move, self._corrected = norm._assign_moving_average, bool(norm.fused)
        self._count: Any = 0.0

    def mean_and_variance(
        self, x: tf.Tensor, axes: Sequence[int], keep_dims: bool, mask: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Return mean and variance over ``axes`` and over all replicas, whose parts are equally large."""
        weights = None if mask is None else tf.cast(mask, x.dtype)[..., None]
        known = 1.0 if weights is None else mean_over_replicas(tf.reduce_mean(weights, axes, keepdims=True))

        def mean_of(values: tf.Tensor) -> tf.Tensor:
            own = values if weights is None else weights * values
            return tf.math.divide_no_nan(mean_over_replicas(tf.reduce_mean(own, axes, keepdims=True)), known)

        mean = mean_of(x)
        # Over the whole batch the derivative of the squares by their mean is 0.
        variance = mean_of(tf.math.squared_difference(x, tf.stop_gradient(mean)))
        self._count = tf.cast(tf.reduce_prod(tf.gather(tf.shape(x), axes)) * replicas_here(), variance.dtype)
        return (mean, variance) if keep_dims else (tf.squeeze(mean, axes), tf.squeeze(variance, axes))

    def move(self, variable: tf.Variable, value: tf.Tensor, momentum: float, size: tf.Tensor | None) -> Any:
        """Move the statistics: once in a process, and to the variance that the fused kernel would take if it is one."""
        if replica_number() % self._local:
            return variable
        if self._corrected and variable is self._norm.moving_variance:
            value = value * self._count / (self._count - 1.0)
        return self._move(variable, value, momentum, size)
