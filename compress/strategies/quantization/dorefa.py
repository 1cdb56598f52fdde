"""DoReFa-Net: weights of a few bits between minus and plus one, after a squashing that is trained through; and inputs.

Source: Zhou et al. (arXiv 1606.06160, section 2.3; for one bit section 2.2, the sign times the kernel's mean size).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

import numpy as np
import tensorflow as tf
import tf_keras
from annotated_types import Ge, Le
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate, Effect
from compress.graph.kernels import Kernel
from compress.strategies.options import refuse_without_effect
from compress.strategies.quantization.binary_filters import ScaledSignQuantizer
from compress.strategies.quantization.calibration import check_activations
from compress.strategies.quantization.levels import NonzeroLevels
from compress.strategies.quantization.low_bit import LevelQuantizer, LowBit
from compress.strategies.quantization.low_bit_inputs import once_called, uniform_inputs, with_rounded_inputs
from compress.strategies.quantization.quantizers import straight_through
from compress.strategies.strategy import STRICT, Context


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

    Args:
        bits: of a weight.
        input_bits: of what the kernels multiply with; None leaves it as it is. The range, the paper's zero to one, is
            the one with the least squared error on ``calibration_images`` unlabelled images.
    """

    bits: Annotated[int, Ge(1), Le(8)] = 2
    input_bits: Annotated[int, Ge(1), Le(8)] | None = None
    calibration_images: Annotated[int, Ge(1)] = 128

    effects = LowBit.effects | {Effect.FILL}
    establishes = NonzeroLevels

    def __post_init__(self) -> None:
        """Refuse a field that has no effect."""
        refuse_without_effect(self, [(self.input_bits is not None, ("calibration_images",), "input_bits")])

    @property
    def rounds_inputs(self) -> bool:
        """Where that was asked for."""
        return self.input_bits is not None

    def prepared(self, model: tf_keras.Model, names: Collection[str], context: Context) -> tf_keras.Model:
        """Round the inputs of the layers."""
        if self.input_bits is None:
            return super().prepared(model, names, context)
        check_activations(Candidate(model), context.data, self.calibration_images)
        layers = once_called(model, names)
        samples = context.calibration_samples(self.calibration_images)
        return with_rounded_inputs(model, uniform_inputs(model, layers, samples, self.input_bits))

    def quantizer(self, kernel: Kernel) -> LevelQuantizer:
        """Return the squashed quantizer; for one bit the scaled sign."""
        if self.bits == 1:
            return ScaledSignQuantizer(tuple(range(kernel.value.ndim)))
        return SquashedQuantizer(self.bits, max(float(np.abs(kernel.value).max()), 1e-6))
