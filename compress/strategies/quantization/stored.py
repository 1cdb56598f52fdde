"""The guarantee of post-training quantization: the file stores its weights in a certain type."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import tf_keras

from compress.candidate import Effect, Guarantee, Scheme, Skipped, Violation
from compress.graph.kernels import has_integer_operator, kernels
from compress.metrics.tflite_file import TFLiteFile

_INT8 = np.dtype(np.int8)
_TYPES: dict[Scheme, np.dtype] = {
    "float16": np.dtype(np.float16),
    "int8": _INT8,
    "int16": _INT8,
    "dynamic": _INT8,
    "weight_only": _INT8,
}
_SPARE_SMALL, _SPARE_SMALL_BELOW = ("dynamic", "weight_only"), 1024
"""Schemes that leave kernels with fewer weights than this in float."""


def stays_float(scheme: Scheme, weights: int) -> bool:
    """Say whether a kernel of so many weights is too small for the scheme to round it."""
    return scheme in _SPARE_SMALL and weights < _SPARE_SMALL_BELOW


def float_only(model: tf_keras.Model, chosen: Collection[str]) -> list[Skipped]:
    """Return those of the chosen layers that stay floats where activations are integers, whatever is asked for."""
    return [
        Skipped(kernel.layer.name, f"LiteRT has no integer operator for {type(kernel.layer).__name__} layers")
        for kernel in kernels(model)
        if kernel.layer.name in chosen and not has_integer_operator(kernel.layer)
    ]


def refuses_floats(earlier: Scheme | None) -> str | None:
    """Say why a stage that leaves layers as floats cannot follow one that stores weights as ``earlier``."""
    return None if earlier is None else "it leaves layers as floats"


@dataclass(frozen=True)
class Stored(Guarantee):
    """The exported file is written under ``scheme``, all but the weights of ``floats``, a few layers."""

    scheme: Scheme
    floats: Sequence[str] = ()

    @property
    def layers(self) -> frozenset[str]:
        """It binds the file, no single layer."""
        return frozenset()

    def replaced(self, layers: Mapping[str, Collection[str]]) -> Stored:
        """What has taken the place of a float stays one."""
        floats = dict.fromkeys(new for old in self.floats for new in (old, *layers.get(old, ())))
        return replace(self, floats=tuple(floats))

    def describe(self) -> str:
        """Name the scheme."""
        return f"weights are stored as {self.scheme}"

    def check(self, model: tf_keras.Model) -> list[Violation]:
        """Nothing to check before the export."""
        return []

    def check_file(self, file: TFLiteFile) -> list[Violation]:
        """Look at the type of every stored weight tensor."""
        wanted = _TYPES.get(self.scheme, np.dtype(np.float32))
        # The kernels of loops are in other subgraphs.
        some = any(tensor.dtype == wanted for _, tensor in file.weighted) or file.holds(wanted, _SPARE_SMALL_BELOW)
        if self.scheme in _SPARE_SMALL and not some:
            others = " but for those that have no integer operator" if self.floats else ""
            few = f"fewer than {_SPARE_SMALL_BELOW} weights{others}: {self.scheme} leaves them floats"
            return [Violation("every layer", few)]
        spared = {op for layer in self.floats for op in file.operators_of(layer)}
        return [
            Violation(tensor.name, f"stored as {tensor.dtype}, expected {wanted}")
            for op, tensor in file.weighted
            if tensor.dtype != wanted and op not in spared and not stays_float(self.scheme, int(np.prod(tensor.shape)))
        ]


@dataclass(frozen=True)
class FinalStorage(Stored):
    """Which layers stay floats was chosen by measuring: writing the file anew would lose those."""

    broken_by: ClassVar[frozenset[Effect]] = frozenset({Effect.STORE})
