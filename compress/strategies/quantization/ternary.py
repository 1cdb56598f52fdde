"""Ternary weight networks: every weight is a kernel's constant, its negative, or zero.

Source: Li, Zhang, Liu (arXiv 1605.04711, equations 3 and 6).
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import tensorflow as tf
from annotated_types import Gt, Lt
from pydantic.dataclasses import dataclass

from compress.graph.kernels import Kernel
from compress.strategies.quantization.low_bit import LevelQuantizer, LowBit
from compress.strategies.quantization.quantizers import straight_through
from compress.strategies.strategy import STRICT


class TernaryQuantizer:
    """Zero below a threshold, the mean size of what lies above it elsewhere."""

    def __init__(self, threshold: float) -> None:
        self.variables: list[tf.Variable] = []
        self._threshold = threshold

    def __call__(self, latent: tf.Tensor) -> tf.Tensor:
        """Return the ternary weights; the gradient goes straight through."""
        size = tf.abs(latent)
        above = tf.cast(size > self._threshold * tf.reduce_mean(size), latent.dtype)
        scale = tf.reduce_sum(size * above) / tf.maximum(tf.reduce_sum(above), 1.0)
        return straight_through(scale * tf.sign(latent) * above, latent)

    def levels(self, quantized: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return minus one, zero, one, and the constant."""
        scale = max(float(np.abs(quantized).max()), 1e-12)
        return np.array([-1.0, 0.0, 1.0], np.float32), np.full([1] * quantized.ndim, scale, np.float32)


@dataclass(frozen=True, config=STRICT)
class Ternary(LowBit):
    """Train ternary weights; ``threshold``: times the mean size of a kernel's weights, below it they are zero."""

    threshold: Annotated[float, Gt(0), Lt(10)] = 0.7

    def quantizer(self, kernel: Kernel) -> LevelQuantizer:
        """Return the ternary quantizer."""
        return TernaryQuantizer(self.threshold)
