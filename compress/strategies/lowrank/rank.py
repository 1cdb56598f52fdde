"""The guarantee of low rank: a layer's map goes through few channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import tf_keras

from compress.candidate import Guarantee, Violation
from compress.graph.kernels import kernel_attributes
from compress.metrics.tflite_file import TFLiteFile


def first_factor(layer: str) -> str:
    """Return the name of the first factor of ``layer``; the last factor keeps the layer's own name."""
    return f"{layer}_reduce"


@dataclass(frozen=True)
class Rank(Guarantee):
    """Layer ``name`` reads at most ``ranks[name]`` channels from its first factor."""

    ranks: Mapping[str, int]

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that it binds."""
        return frozenset(self.ranks) | frozenset(first_factor(name) for name in self.ranks)

    def describe(self) -> str:
        """Say how many layers are factorized."""
        return f"{len(self.ranks)} layers are products of rank at most {max(self.ranks.values())}"

    def check(self, model: tf_keras.Model) -> list[Violation]:
        """Look at the width between the factors."""
        layers = {layer.name: layer for layer in model.layers}
        found = []
        for name, rank in self.ranks.items():
            factor = layers.get(first_factor(name))
            if factor is None or name not in layers or not kernel_attributes(factor):
                found.append(Violation(name, "it is no longer a product of two layers"))
            elif factor.output_shape[-1] > rank:
                found.append(Violation(name, f"rank {factor.output_shape[-1]}, at most {rank}"))
        return found

    def check_file(self, file: TFLiteFile) -> list[Violation]:
        """Look at the number of channels that the first factor's operator writes."""
        found = []
        for name, rank in self.ranks.items():
            width = file.output_channels_of(first_factor(name))
            if width is None or file.operator_of(name) is None:
                found.append(Violation(name, "the file does not run it as a product of two layers"))
            elif width > rank:
                found.append(Violation(name, f"rank {width} in the file, at most {rank}"))
        return found
