"""Binary weights with a scale for each filter: the weights of XNOR-Net.

Source: Rastegari et al. (arXiv 1603.05279, section 3.1, equations 5 and 6, and the gradient of section 3.1).
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from pydantic.dataclasses import dataclass

from compress.candidate import Effect
from compress.graph.kernels import Kernel
from compress.strategies.quantization.levels import NonzeroLevels
from compress.strategies.quantization.low_bit import LevelQuantizer, LowBit
from compress.strategies.quantization.quantizers import straight_through
from compress.strategies.strategy import STRICT


class ScaledSignQuantizer:
    """The sign of the weight times the mean size of its filter's weights."""

    def __init__(self, inner_axes: tuple[int, ...]) -> None:
        self.variables: list[tf.Variable] = []
        self._inner = inner_axes

    def __call__(self, latent: tf.Tensor) -> tf.Tensor:
        """Return the binary weights; the sign's gradient is that of a clipped identity."""
        scale = tf.reduce_mean(tf.abs(latent), self._inner, keepdims=True)
        return straight_through(tf.where(latent >= 0, 1.0, -1.0), tf.clip_by_value(latent, -1.0, 1.0)) * scale

    def levels(self, quantized: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return minus and plus one, and the scale of each filter."""
        return np.array([-1.0, 1.0], np.float32), np.abs(quantized).max(self._inner, keepdims=True)


@dataclass(frozen=True, config=STRICT)
class BinaryFilters(LowBit):
    """Train binary weights with one scale for each filter."""

    effects = LowBit.effects | {Effect.FILL, Effect.SPREAD}
    establishes = NonzeroLevels

    def quantizer(self, kernel: Kernel) -> LevelQuantizer:
        """Return the scaled sign."""
        return ScaledSignQuantizer(kernel.inner_axes)
