"""The guarantees of the compact family's forms: a layer is of the cheaper kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import tf_keras

from compress.candidate import Guarantee, Violation
from compress.metrics.tflite_file import TFLiteFile
from compress.words import counted


class Compacted(Guarantee):
    """The layers that it binds were put in the place of an ordinary convolution."""


@dataclass(frozen=True)
class GroupedForm(Compacted):
    """Layer ``name`` is a convolution of ``groups[name]`` groups."""

    groups: Mapping[str, int]

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that it binds."""
        return frozenset(self.groups)

    def describe(self) -> str:
        """Say how many layers are grouped."""
        convolutions = counted(len(self.groups), "convolution is", "convolutions are")
        return f"{convolutions} of {max(self.groups.values())} groups"

    def check(self, model: tf_keras.Model) -> list[Violation]:
        """Look at the layers' groups."""
        groups = {layer.name: getattr(layer, "groups", 1) for layer in model.layers}
        return [
            Violation(name, f"{groups.get(name, 0)} groups instead of {count}")
            for name, count in self.groups.items()
            if groups.get(name) != count
        ]

    def check_file(self, file: TFLiteFile) -> list[Violation]:
        """Look for convolutions that read so many groups; their kernels have no layer's name in a file."""
        left = list(file.groups)
        found = []
        for name, count in self.groups.items():
            if count in left:
                left.remove(count)
            else:
                found.append(Violation(name, f"the file has too few convolutions of {count} groups"))
        return found


@dataclass(frozen=True)
class _WithPart(Compacted):
    """Layer ``name`` has beside it the convolution ``parts[name]``."""

    parts: Mapping[str, str]

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that it binds."""
        return frozenset(self.parts) | frozenset(self.parts.values())

    def check(self, model: tf_keras.Model) -> list[Violation]:
        """Look for the parts."""
        layers = {layer.name: layer for layer in model.layers}
        return [
            Violation(name, f"its part {part} is gone")
            for name, part in self.parts.items()
            if not {name, part} <= set(layers) or not self._holds(layers[name], layers[part])
        ]

    def check_file(self, file: TFLiteFile) -> list[Violation]:
        """Look for the operators of the parts."""
        return [
            Violation(name, f"the file runs no operator of {part}, a part of it")
            for name, part in self.parts.items()
            if file.operator_of(part) is None
        ]

    def _holds(self, layer: tf_keras.layers.Layer, part: tf_keras.layers.Layer) -> bool:
        """Say whether layer and part are what they should be to each other."""
        return True


@dataclass(frozen=True)
class FireForm(_WithPart):
    """Layer ``name`` reads the few channels that ``parts[name]`` squeezes its input to."""

    def describe(self) -> str:
        """Say how many layers are fire modules."""
        return counted(len(self.parts), "convolution is a fire module", "convolutions are fire modules")

    def _holds(self, layer: tf_keras.layers.Layer, part: tf_keras.layers.Layer) -> bool:
        return bool(layer.input_shape[-1] <= part.output_shape[-1])


@dataclass(frozen=True)
class OctaveForm(_WithPart):
    """Layer ``name`` leaves the rest to ``parts[name]``, which works at half its resolution."""

    def describe(self) -> str:
        """Say how many layers work at two resolutions."""
        return f"{counted(len(self.parts), 'convolution works', 'convolutions work')} at two resolutions"

    def _holds(self, layer: tf_keras.layers.Layer, part: tf_keras.layers.Layer) -> bool:
        return bool(part.output_shape[1] * 2 == layer.output_shape[1])


@dataclass(frozen=True)
class PairedForm(_WithPart):
    """Layer ``name`` makes two channels of each that ``parts[name]`` gives."""

    def describe(self) -> str:
        """Say how many layers have half the filters."""
        convolutions = counted(len(self.parts), "convolution has", "convolutions have")
        return f"{convolutions} half the filters, each used twice before the ReLU"

    def _holds(self, layer: tf_keras.layers.Layer, part: tf_keras.layers.Layer) -> bool:
        return bool(layer.output_shape[-1] <= 2 * part.output_shape[-1])
