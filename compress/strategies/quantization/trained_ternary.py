"""Trained ternary quantization: three values for each kernel, two of them trained with the weights.

Source: Zhu, Han, Mao, Dally (arXiv 1612.01064, equations 6 to 9). The gradient of the two values is divided by the root
of the number of weights, as that of learned steps is (arXiv 1902.08153): they are trained at the weights' own rate.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import tensorflow as tf
from annotated_types import Gt, Lt
from pydantic.dataclasses import dataclass

from compress.graph.kernels import Kernel
from compress.strategies.quantization.low_bit import LevelQuantizer, LowBit
from compress.strategies.strategy import STRICT


class TrainedTernaryQuantizer:
    """A trained value above a threshold, another one below its negative, zero between them."""

    def __init__(self, value: np.ndarray, threshold: float) -> None:
        self._threshold = threshold
        limit = threshold * np.abs(value).max(initial=0.0)
        sides = [np.abs(value[value > limit]), np.abs(value[value < -limit])]
        self._sizes = tf.Variable([float(side.mean()) if side.size else 1e-3 for side in sides], name="sizes")
        self.variables = [self._sizes]

    def __call__(self, latent: tf.Tensor) -> tf.Tensor:
        """Return the ternary weights."""
        fixed = tf.stop_gradient(latent)
        limit = self._threshold * tf.reduce_max(tf.abs(fixed))
        above, below = tf.cast(fixed > limit, latent.dtype), tf.cast(fixed < -limit, latent.dtype)
        sizes = self._sizes.value()
        held = tf.stop_gradient(sizes)
        # Of the sizes' own value, with a gradient that is smaller: the paper's sum over all weights would move them by
        # many times themselves in one step.
        slowed = held + (sizes - held) / np.sqrt(float(np.prod(latent.shape)))
        # Zero, with the gradient of the latent weights.
        passed = (latent - fixed) * (above * held[0] + below * held[1] + (1 - above - below))
        return above * slowed[0] - below * slowed[1] + passed

    def levels(self, quantized: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the three values; the scale is one."""
        above, below = (float(size) for size in self._sizes.numpy())
        return np.sort(np.array([-below, 0.0, above], np.float32)), np.ones([1] * quantized.ndim, np.float32)


@dataclass(frozen=True, config=STRICT)
class TrainedTernary(LowBit):
    """Train ternary weights and their values; ``threshold``: share of the largest weight below which all are zero."""

    threshold: Annotated[float, Gt(0), Lt(1)] = 0.05

    def quantizer(self, kernel: Kernel) -> LevelQuantizer:
        """Return the trained ternary quantizer."""
        return TrainedTernaryQuantizer(kernel.value, self.threshold)
