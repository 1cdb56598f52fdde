"""SqueezeNet (Iandola et al., arXiv 1602.07360): Fire modules, and no Dense layer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import tf_keras
from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from compress.data.source import STRICT
from compress.models.imagenet import ImagenetClassifier

layers = tf_keras.layers

_FIRE = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
"""Filters of the 1x1 convolution that squeezes, and of each of the two that expand, fire2 to fire9 (table 1)."""
_STEM = {"1.0": (96, 7), "1.1": (64, 3)}
_POOLED_BEFORE = {"1.0": (2, 5, 9), "1.1": (2, 4, 6)}
"""The first Fire module after each pooling."""


@dataclass(frozen=True, config=STRICT)
class SqueezeNet(ImagenetClassifier):
    """``version``: 1.0 is the paper's; 1.1, its authors', pools earlier and needs 2.4 times fewer multiply-adds."""

    version: Annotated[Literal["1.0", "1.1"], BeforeValidator(str)] = "1.1"

    def smallest(self) -> int:
        """Return what leaves one pixel after the four strides, whose windows lie inside the image."""
        return {"1.0": 35, "1.1": 31}[self.version]

    def network(self, image: Any, x: Any, classes: int) -> tf_keras.Model:
        """Return the model."""
        x = layers.Rescaling(1.0 / 127.5, -1.0, name="normalise")(x)
        filters, size = _STEM[self.version]
        x = layers.Conv2D(filters, size, 2, activation="relu", kernel_initializer="he_uniform", name="conv1")(x)
        for index, (squeezed, expanded) in enumerate(_FIRE, start=2):
            if index in _POOLED_BEFORE[self.version]:
                x = layers.MaxPooling2D(3, 2, name=f"pool{index - 1}")(x)
            x = _fire(x, squeezed, expanded, f"fire{index}")
        x = layers.Dropout(0.5, name="drop9")(x)
        x = layers.Conv2D(classes, 1, activation="relu", name="conv10")(x)
        return tf_keras.Model(image, layers.GlobalAveragePooling2D(name="logits")(x), name="squeezenet")


def _fire(x: Any, squeezed: int, expanded: int, name: str) -> Any:
    def convolution(x: Any, filters: int, size: int, part: str) -> Any:
        settings = {"padding": "same", "activation": "relu", "kernel_initializer": "he_uniform"}
        return layers.Conv2D(filters, size, name=f"{name}_{part}", **settings)(x)

    x = convolution(x, squeezed, 1, "squeeze")
    parts = [convolution(x, expanded, 1, "expand1x1"), convolution(x, expanded, 3, "expand3x3")]
    return layers.Concatenate(name=f"{name}_concat")(parts)
