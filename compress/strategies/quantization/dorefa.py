"""DoReFa-Net's weights: a few bits between minus and plus one, after a squashing that is trained through.

Source: Zhou et al. (arXiv 1606.06160, equations 5, 7 and 8 to 9; for one bit, equation 8's mean size).
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


class SquashedQuantizer:
    """``2 round(n t) / n - 1`` for ``t`` the squashed weight in [0, 1] and ``n + 1`` levels, times a constant."""

    def __init__(self, bits: int, size: float) -> None:
        self.variables: list[tf.Variable] = []
        self._most = 2**bits - 1
        self._size = size

    def __call__(self, latent: tf.Tensor) -> tf.Tensor:
        """Return the levels."""
        squashed = tf.tanh(latent / self._size)
        share = squashed / (2 * tf.maximum(tf.reduce_max(tf.abs(squashed)), 1e-12)) + 0.5
        return (2 * straight_through(tf.round(share * self._most) / self._most, share) - 1) * self._size

    def levels(self, quantized: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the levels between minus and plus one, and the constant."""
        return np.linspace(-1, 1, self._most + 1, dtype=np.float32), np.full(
            [1] * quantized.ndim, self._size, np.float32
        )


@dataclass(frozen=True, config=STRICT)
class DoReFa(LowBit):
    """Train weights of ``bits`` bits.

    The paper's levels end at one. A trained network starts nearer if they end at the kernel's largest weight, so the
    weights are measured in that; batch norms hide the difference.
    """

    bits: Annotated[int, Ge(1), Le(8)] = 2

    def quantizer(self, kernel: Kernel) -> LevelQuantizer:
        """Return the squashed quantizer."""
        return SquashedQuantizer(self.bits, max(float(np.abs(kernel.value).max()), 1e-6))
