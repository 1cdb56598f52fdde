"""ShuffleNet v1 (Zhang, Zhou, Lin and Sun, arXiv 1707.01083): grouped pointwise convolutions and shuffled channels."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import tf_keras
from annotated_types import Ge, Gt, Le
from pydantic.dataclasses import dataclass

from compress.data.source import STRICT
from compress.errors import CompressError
from compress.graph.grouped import grouped_convolution, shuffle_channels
from compress.models.imagenet import ImagenetClassifier

layers = tf_keras.layers

_FIRST = 24
_STAGE2 = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}
"""Groups -> channels of stage 2 (table 1); each further stage has twice as many."""
_UNITS = (4, 8, 4)
_BOTTLENECK = 4
_EXCITATION = 16


@dataclass(frozen=True, config=STRICT)
class ShuffleNet(ImagenetClassifier):
    """A convolution and 16 units: grouped pointwise, shuffle, depthwise, grouped pointwise.

    ``width``: times as many channels; ``first``: those of the first convolution, None: 24 times the width. Where groups
    do not divide the channels inside a unit, or those of the first convolution, these are rounded to the next multiple.
    ``excitation``: each unit weighs its channels (squeeze and excitation, Hu et al., arXiv 1709.01507).
    ``small``: for images of 32 pixels; the first stride is 1, and nothing is pooled after it.
    """

    groups: Literal[1, 2, 3, 4, 8] = 3
    width: Annotated[float, Gt(0), Le(16)] = 1.0
    first: Annotated[int, Ge(1), Le(4096)] | None = None
    shuffle: bool = True
    excitation: bool = False
    small: bool = False

    def smallest(self) -> int:
        """Return the product of the strides."""
        return 8 if self.small else 32

    def network(self, image: Any, x: Any, classes: int) -> tf_keras.Model:
        """Return the model; convolutions are named ``stage2_unit1_compress``, ``..._depthwise``, ``..._expand``."""
        first = self.first or self._rounded(_FIRST * self.width)
        stages = [self._channels(first, stage) for stage in range(len(_UNITS))]
        x = layers.Rescaling(1.0 / 127.5, -1.0, name="normalise")(x)
        x = layers.Conv2D(first, 3, 1 if self.small else 2, padding="same", use_bias=False, name="conv1")(x)
        x = layers.ReLU(name="conv1_relu")(_normalised(x, "conv1"))
        if not self.small:
            x = layers.MaxPooling2D(3, 2, padding="same", name="pool1")(x)
        for stage, (channels, units) in enumerate(zip(stages, _UNITS, strict=True), start=2):
            for unit in range(1, units + 1):
                x = self._unit(x, channels, 2 if unit == 1 else 1, f"stage{stage}_unit{unit}")
        x = layers.GlobalAveragePooling2D(name="pool")(x)
        return tf_keras.Model(image, layers.Dense(classes, name="logits")(x), name="shufflenet")

    def _unit(self, x: Any, channels: int, stride: int, name: str) -> Any:
        # The first one of all reads so few channels that it has no groups (section 3.2).
        groups = 1 if name == "stage2_unit1" else self.groups
        inside = self._rounded(channels / _BOTTLENECK)
        y = grouped_convolution(x, inside, groups, f"{name}_compress")
        y = layers.ReLU(name=f"{name}_compress_relu")(_normalised(y, f"{name}_compress"))
        if self.shuffle and self.groups > 1:
            y = shuffle_channels(y, self.groups, f"{name}_shuffle")
        y = layers.DepthwiseConv2D(3, stride, padding="same", use_bias=False, name=f"{name}_depthwise")(y)
        y = _normalised(y, f"{name}_depthwise")
        added = channels - (x.shape[-1] if stride > 1 else 0)
        y = _normalised(grouped_convolution(y, added, self.groups, f"{name}_expand"), f"{name}_expand")
        if self.excitation:
            y = _weighed(y, name)
        if stride > 1:
            x = layers.AveragePooling2D(3, 2, padding="same", name=f"{name}_pool")(x)
            y = layers.Concatenate(name=f"{name}_concat")([x, y])
        else:
            y = layers.Add(name=f"{name}_add")([x, y])
        return layers.ReLU(name=f"{name}_relu")(y)

    def _channels(self, first: int, stage: int) -> int:
        """Return the channels of a stage, counted from 0; the first unit of stage 2 adds to those of conv1."""
        wanted = _STAGE2[self.groups] * 2**stage * self.width
        channels = round(wanted)
        if channels != wanted or channels % self.groups or first % self.groups or channels <= first:
            raise CompressError(
                "model.width" if self.first is None else "model.first",
                expected=f"a number of channels that {self.groups} groups divide, more than conv1 has",
                received=f"{wanted:g} channels in stage {stage + 2} and {first} in conv1",
                fix="Write model.width=0.25, 0.5, 1.0, 1.5 or 2.0, other model.groups, or leave model.first out.",
            )
        return channels

    def _rounded(self, channels: float) -> int:
        return max(1, int(channels / self.groups + 0.5)) * self.groups


def _normalised(x: Any, name: str) -> Any:
    return layers.BatchNormalization(name=f"{name}_bn")(x)


def _weighed(x: Any, name: str) -> Any:
    channels = x.shape[-1]
    gate = layers.GlobalAveragePooling2D(name=f"{name}_squeeze")(x)
    gate = layers.Dense(max(1, channels // _EXCITATION), activation="relu", name=f"{name}_excite1")(gate)
    gate = layers.Dense(channels, activation="sigmoid", name=f"{name}_excite2")(gate)
    return layers.Multiply(name=f"{name}_weigh")([x, layers.Reshape((1, 1, channels), name=f"{name}_gate")(gate)])
