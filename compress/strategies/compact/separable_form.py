"""The guarantee of the compact family's separable form: a layer is a depthwise and a pointwise convolution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import tf_keras

from compress.candidate import Violation
from compress.metrics.tflite_file import TFLiteFile
from compress.strategies.compact.guarantees import Compacted


@dataclass(frozen=True)
class SeparableForm(Compacted):
    """Layer ``name`` is preceded by the depthwise convolution ``pairs[name]``."""

    pairs: Mapping[str, str]

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that it binds."""
        return frozenset(self.pairs) | frozenset(self.pairs.values())

    def describe(self) -> str:
        """Say how many layers are separable."""
        return f"{len(self.pairs)} convolutions are depthwise-separable"

    def check(self, model: tf_keras.Model) -> list[Violation]:
        """Look for the depthwise layers."""
        present = {layer.name for layer in model.layers if isinstance(layer, tf_keras.layers.DepthwiseConv2D)}
        return [
            Violation(name, f"its depthwise part {depthwise} is gone")
            for name, depthwise in self.pairs.items()
            if depthwise not in present
        ]

    def check_file(self, file: TFLiteFile) -> list[Violation]:
        """Look for the depthwise operators in the file."""
        return [
            Violation(name, f"the file runs no depthwise convolution for {depthwise}")
            for name, depthwise in self.pairs.items()
            if not file.is_depthwise(depthwise)
        ]
