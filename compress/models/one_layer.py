"""One convolution and nothing else: what a layer of some form costs, counted and measured."""

from __future__ import annotations

from typing import Annotated, Literal

import tf_keras
from annotated_types import Ge, Le
from pydantic.dataclasses import dataclass

from compress.data.source import STRICT
from compress.graph.grouped import grouped_convolution
from compress.models.classifier import Classifier

layers = tf_keras.layers


@dataclass(frozen=True, config=STRICT)
class OneLayer(Classifier):
    """A convolution in ``groups``, or depthwise and pointwise; the mean of each map is the score of a class."""

    kind: Literal["convolution", "separable"] = "convolution"
    filters: Annotated[int, Ge(1), Le(100_000)] = 10
    size: Annotated[int, Ge(1), Le(1000)] = 3
    groups: Annotated[int, Ge(1), Le(100_000)] = 1

    def __post_init__(self) -> None:
        """Refuse groups of what has none."""
        if self.kind == "separable" and self.groups > 1:
            raise ValueError("kind=convolution, for groups")

    def architecture(self, shape: tuple[int, ...], classes: int) -> tf_keras.Model:
        """Return the untrained model."""
        image = x = tf_keras.Input(shape, name="image")
        if self.kind == "separable":
            x = layers.DepthwiseConv2D(self.size, padding="same", use_bias=False, name="depthwise")(x)
            x = layers.Conv2D(self.filters, 1, use_bias=False, name="pointwise")(x)
        else:
            x = grouped_convolution(x, self.filters, self.groups, "conv", size=self.size)
        return tf_keras.Model(image, layers.GlobalAveragePooling2D(name="logits")(x), name="one_layer")
