"""The guarantee of post-training quantization: the file stores its weights in a certain type."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tf_keras

from compress.candidate import Guarantee, Scheme, Violation
from compress.metrics.tflite_file import TFLiteFile

_TYPES = {"float16": np.dtype(np.float16), "int8": np.dtype(np.int8), "dynamic": np.dtype(np.int8)}
_DYNAMIC_MINIMUM = 1024
"""TFLite's dynamic range quantization leaves smaller tensors in float."""


@dataclass(frozen=True)
class Stored(Guarantee):
    """The exported file is written under ``scheme``."""

    scheme: Scheme

    @property
    def layers(self) -> frozenset[str]:
        """It binds the file, no single layer."""
        return frozenset()

    def describe(self) -> str:
        """Name the scheme."""
        return f"weights are stored as {self.scheme}"

    def check(self, model: tf_keras.Model) -> list[Violation]:
        """Nothing to check before the export."""
        return []

    def check_file(self, file: TFLiteFile) -> list[Violation]:
        """Look at the type of every stored weight tensor."""
        wanted = _TYPES.get(self.scheme, np.dtype(np.float32))
        return [
            Violation(tensor.name, f"stored as {tensor.dtype}, expected {wanted}")
            for _, tensor in file.weighted
            if tensor.dtype != wanted and not (self.scheme == "dynamic" and np.prod(tensor.shape) < _DYNAMIC_MINIMUM)
        ]
