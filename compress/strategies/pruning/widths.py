"""The guarantee of channel pruning: layers write few channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import tf_keras

from compress.candidate import Guarantee, Violation
from compress.metrics.tflite_file import TFLiteFile


@dataclass(frozen=True)
class Widths(Guarantee):
    """Layer ``name`` writes at most ``channels[name]`` channels."""

    channels: Mapping[str, int]

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that it binds."""
        return frozenset(self.channels)

    def describe(self) -> str:
        """Say how many layers are narrower."""
        return f"{len(self.channels)} layers have lost channels"

    def check(self, model: tf_keras.Model) -> list[Violation]:
        """Look at the shapes of the outputs."""
        layers = {layer.name: layer for layer in model.layers}
        return [
            Violation(name, f"{layers[name].output_shape[-1]} channels, at most {count}")
            for name, count in self.channels.items()
            if name in layers and layers[name].output_shape[-1] > count
        ]

    def check_file(self, file: TFLiteFile) -> list[Violation]:
        """Look at what the operators write; a layer that the file does not name is not looked at."""
        widths = {name: file.output_channels_of(name) for name in self.channels}
        return [
            Violation(name, f"{width} channels in the file, at most {self.channels[name]}")
            for name, width in widths.items()
            if width is not None and width > self.channels[name]
        ]
