"""XNOR-Net: binary weights with a scale for each filter, and binary inputs.

Source: Rastegari et al. (arXiv 1603.05279, section 3.2).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

import tf_keras
from annotated_types import Ge
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate
from compress.strategies.quantization.binary_filters import BinaryFilters
from compress.strategies.quantization.calibration import check_activations
from compress.strategies.quantization.low_bit_inputs import once_called, sign_inputs, with_rounded_inputs
from compress.strategies.strategy import STRICT, Context


@dataclass(frozen=True, config=STRICT)
class XnorNet(BinaryFilters):
    """Train binary weights behind binary inputs.

    Args:
        calibration_images: unlabelled images on which the batch norms before the signs get their first statistics.
    """

    calibration_images: Annotated[int, Ge(2)] = 128

    @property
    def rounds_inputs(self) -> bool:
        """It is what makes it XNOR-Net."""
        return True

    def prepared(self, model: tf_keras.Model, names: Collection[str], context: Context) -> tf_keras.Model:
        """Put a batch norm and the sign before each layer."""
        check_activations(Candidate(model), context.data, self.calibration_images)
        layers = once_called(model, names)
        samples = context.calibration_samples(self.calibration_images)
        return with_rounded_inputs(model, sign_inputs(model, layers, samples))
