"""MobileNet v1 (Howard et al., arXiv 1704.04861) and the variants that its paper compares it with."""

from __future__ import annotations

from typing import Annotated, Any

import tf_keras
from annotated_types import Gt, Le
from pydantic.dataclasses import dataclass

from compress.data.source import STRICT
from compress.errors import CompressError
from compress.models.imagenet import PretrainedClassifier

layers = tf_keras.layers

_FIRST = 32
_BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *[(512, 1)] * 5,
    *((1024, 2), (1024, 1)),
)
"""Filters and stride of each block (table 1, where the stride 2 of the last one is a misprint: its maps stay 7x7)."""
_REPEATED = range(7, 12)
_TRAINED_AT = (128, 160, 192, 224)


@dataclass(frozen=True, config=STRICT)
class MobileNetV1(PretrainedClassifier):
    """A convolution, 13 blocks of a depthwise and a pointwise one, and one Dense layer.

    ``alpha``: width, the share of each layer's filters. Not ``separable``: each block is one 3x3 convolution (table 4).
    ``shallow``: without the five blocks of 14x14x512 (table 5). ``small``: the first stride is 1, for 32 pixels.
    """

    alpha: Annotated[float, Gt(0), Le(16)] = 1.0
    separable: bool = True
    shallow: bool = False
    small: bool = False

    def smallest(self) -> int:
        """Return the product of the strides."""
        return 16 if self.small else 32

    def network(self, image: Any, x: Any, classes: int) -> tf_keras.Model:
        """Return the model; layers are named as in Keras' MobileNet."""
        self._require_filters()
        x = layers.Rescaling(1.0 / 127.5, -1.0, name="normalise")(x)
        x = layers.Conv2D(self._width(_FIRST), 3, 1 if self.small else 2, padding="same", use_bias=False, name="conv1")(
            x
        )
        x = _normalised(x, "conv1")
        for index, (filters, stride) in enumerate(_BLOCKS, start=1):
            if not (self.shallow and index in _REPEATED):
                x = self._block(x, self._width(filters), stride, index)
        x = layers.GlobalAveragePooling2D(name="pool")(x)
        return tf_keras.Model(image, layers.Dense(classes, name="logits")(x), name="mobilenet_v1")

    def pretrained(self, resolution: int, with_classes: bool) -> tf_keras.Model:
        """Return Keras' MobileNet."""
        side = resolution if resolution in _TRAINED_AT else _TRAINED_AT[-1]
        return tf_keras.applications.MobileNet(
            (side, side, 3), alpha=self.alpha, include_top=with_classes, weights="imagenet"
        )

    def _block(self, x: Any, filters: int, stride: int, index: int) -> Any:
        if not self.separable:
            name = f"conv_full_{index}"
            x = layers.Conv2D(filters, 3, stride, padding="same", use_bias=False, name=name)(x)
            return _normalised(x, name)
        name = f"conv_dw_{index}"
        x = _normalised(layers.DepthwiseConv2D(3, stride, padding="same", use_bias=False, name=name)(x), name)
        name = f"conv_pw_{index}"
        return _normalised(layers.Conv2D(filters, 1, use_bias=False, name=name)(x), name)

    def _width(self, filters: int) -> int:
        return int(filters * self.alpha)

    def _require_filters(self) -> None:
        if self._width(_FIRST) < 1:
            raise CompressError(
                "model.alpha",
                expected=f"at least {1 / _FIRST}: the first of {_FIRST} filters",
                received=str(self.alpha),
                fix="Write a larger one, for example model.alpha=0.25.",
            )


def _normalised(x: Any, name: str) -> Any:
    return layers.ReLU(6.0, name=f"{name}_relu")(layers.BatchNormalization(name=f"{name}_bn")(x))
