"""Weights that are powers of two, or zero: a product becomes a shift.

Source: Zhou et al., Incremental Network Quantization (arXiv 1702.03044, equations 1 to 4), trained all at once.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import tensorflow as tf
from annotated_types import Ge, Le
from pydantic.dataclasses import dataclass

from compress.graph.kernels import Kernel
from compress.strategies.quantization.low_bit import LevelQuantizer, LowBit
from compress.strategies.quantization.quantizers import straight_through
from compress.strategies.strategy import STRICT


class PowerOfTwoQuantizer:
    """The nearest of the levels of a kernel, which stay as they are."""

    def __init__(self, bits: int, largest: float) -> None:
        self.variables: list[tf.Variable] = []
        first = np.floor(np.log2(4 * largest / 3))
        powers = 2.0 ** np.arange(first - 2 ** (bits - 2) + 1, first + 1)
        self._levels = np.concatenate([-powers[::-1], [0.0], powers]).astype(np.float32)

    def __call__(self, latent: tf.Tensor) -> tf.Tensor:
        """Return the nearest levels; the gradient goes straight through."""
        borders = (self._levels[1:] + self._levels[:-1]) / 2
        nearest = tf.gather(self._levels, tf.searchsorted(borders, tf.reshape(latent, [-1])))
        return straight_through(tf.reshape(nearest, tf.shape(latent)), latent)

    def levels(self, quantized: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the levels; the scale is one."""
        return self._levels, np.ones([1] * quantized.ndim, np.float32)


@dataclass(frozen=True, config=STRICT)
class PowerOfTwo(LowBit):
    """Train weights of zero and ``2**(bits - 2)`` powers of two to each side."""

    bits: Annotated[int, Ge(2), Le(8)] = 5

    def quantizer(self, kernel: Kernel) -> LevelQuantizer:
        """Return the nearest power of two."""
        return PowerOfTwoQuantizer(self.bits, max(float(np.abs(kernel.value).max()), 1e-12))
