"""The guarantee of channel pruning: layers write few channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import tf_keras

from compress.candidate import Guarantee, Violation
from compress.metrics.tflite_file import TFLiteFile
from compress.words import counted


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
        return f"{counted(len(self.channels), 'layer has', 'layers have')} lost channels"

    def check(self, model: tf_keras.Model) -> list[Violation]:
        """Look at what the layers say of themselves."""
        widths = {layer.name: written_channels(layer) for layer in model.layers if layer.name in self.channels}
        return [
            Violation(name, f"{counted(width, 'channel')}, at most {self.channels[name]}")
            for name, width in widths.items()
            if width is not None and width > self.channels[name]
        ]

    def check_file(self, file: TFLiteFile) -> list[Violation]:
        """Look at what the operators write; a layer that the file does not name is not looked at."""
        widths = {name: file.output_channels_of(name) for name in self.channels}
        return [
            Violation(name, f"{counted(width, 'channel')} in the file, at most {self.channels[name]}")
            for name, width in widths.items()
            if width is not None and width > self.channels[name]
        ]


def written_channels(layer: tf_keras.layers.Layer) -> int | None:
    """Return how many channels the layer writes, wherever its outputs hold them; None if its kind does not say.

    Shapes do not tell: a layer may have several outputs, or be called on inputs of several sizes.
    """
    kinds = tf_keras.layers
    if isinstance(layer, kinds.TimeDistributed):
        return written_channels(layer.layer)
    if isinstance(layer, kinds.Bidirectional):
        return int(layer.forward_layer.units) * (2 if layer.merge_mode == "concat" else 1)
    if isinstance(layer, kinds.MultiHeadAttention):
        return int(layer._output_dense.kernel.shape[-1])
    for name in ("filters", "units", "output_dim"):
        if isinstance(count := getattr(layer, name, None), int):
            return count
    kernel = getattr(layer, "depthwise_kernel", None)
    return None if kernel is None else int(kernel.shape[-2] * kernel.shape[-1])
