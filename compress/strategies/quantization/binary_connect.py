"""BinaryConnect: every weight is one of two values of the same size.

Source: Courbariaux, Bengio, David (arXiv 1511.00363, sections 2.2 to 2.4).
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


class SignQuantizer:
    """The sign of the weight times a constant, beyond which no weight goes; gradients pass as they are."""

    def __init__(self, size: float) -> None:
        self.variables: list[tf.Variable] = []
        self.limit = size

    def __call__(self, latent: tf.Tensor) -> tf.Tensor:
        """Return plus or minus the constant."""
        return straight_through(tf.where(latent >= 0, self.limit, -self.limit), latent)

    def levels(self, quantized: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return minus and plus one, and the constant."""
        return np.array([-1.0, 1.0], np.float32), np.full([1] * quantized.ndim, self.limit, np.float32)


@dataclass(frozen=True, config=STRICT)
class BinaryConnect(LowBit):
    """Train binary weights; the constant of each kernel is the mean size of its weights before."""

    effects = LowBit.effects | {Effect.FILL}
    establishes = NonzeroLevels

    def quantizer(self, kernel: Kernel) -> LevelQuantizer:
        """Return the sign."""
        return SignQuantizer(max(float(np.abs(kernel.value).mean()), 1e-6))
