"""The guarantee of low rank: a layer's map goes through few channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import tf_keras

from compress.candidate import Guarantee, Violation
from compress.graph.kernels import kernel_attributes
from compress.metrics.tflite_file import TFLiteFile
from compress.words import counted


def first_factor(layer: str) -> str:
    """Return the name of the first factor of ``layer``; the last factor keeps the layer's own name."""
    return f"{layer}_reduce"


@dataclass(frozen=True)
class Rank(Guarantee):
    """Layer ``name`` is a chain whose first factor writes at most ``ranks[name]`` channels."""

    ranks: Mapping[str, int]
    forms: Mapping[str, str] = field(default_factory=dict)
    """Layer -> the name of its chain's form."""
    inner: Mapping[str, int] = field(default_factory=dict)
    """Layer in the middle of a chain -> how many channels it writes at most."""

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that it binds."""
        return frozenset(self.ranks) | frozenset(self._widths)

    @property
    def _widths(self) -> dict[str, int]:
        """Layer of a chain, but the last -> how many channels it writes at most."""
        return {first_factor(name): rank for name, rank in self.ranks.items()} | dict(self.inner)

    def describe(self) -> str:
        """Say how many layers are factorized."""
        layers = counted(len(self.ranks), "layer is a product", "layers are products")
        return f"{layers} of rank at most {max(self.ranks.values())}"

    def check(self, model: tf_keras.Model) -> list[Violation]:
        """Look at the widths between the factors."""
        layers = {layer.name: layer for layer in model.layers}
        found = [Violation(name, "it is no longer a product of layers") for name in self.ranks if name not in layers]
        for name, width in self._widths.items():
            factor = layers.get(name)
            if factor is None or not kernel_attributes(factor):
                found.append(Violation(name, "it is no longer a factor"))
            elif factor.output_shape[-1] > width:
                found.append(Violation(name, f"rank {factor.output_shape[-1]}, at most {width}"))
        return found

    def check_file(self, file: TFLiteFile) -> list[Violation]:
        """Look at the number of channels that the factors' operators write."""
        lost = "the file does not run it as a product of layers"
        found = [Violation(name, lost) for name in self.ranks if file.operator_of(name) is None]
        for name, width in self._widths.items():
            written = file.output_channels_of(name)
            if written is None:
                found.append(Violation(name, lost))
            elif written > width:
                found.append(Violation(name, f"rank {written} in the file, at most {width}"))
        return found
