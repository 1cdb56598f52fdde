"""The ImageNet classifiers that Keras brings along, with their preprocessing inside."""

from __future__ import annotations

import inspect
from typing import Annotated, Any, Literal

import numpy as np
import tf_keras
from annotated_types import Gt, Le
from pydantic.dataclasses import dataclass

from compress.data.source import STRICT
from compress.errors import CompressError
from compress.models.imagenet import PretrainedClassifier

Architecture = Literal[
    "DenseNet121",
    "DenseNet169",
    "DenseNet201",
    "InceptionResNetV2",
    "InceptionV3",
    "MobileNetV2",
    "ResNet101",
    "ResNet152",
    "ResNet50",
    "VGG16",
    "VGG19",
    "Xception",
]

_SMALLEST = {"InceptionResNetV2": 75, "InceptionV3": 75, "Xception": 71}
"""As Keras documents them; 32 for all others, the product of their strides."""
_BLUE_FIRST = ("ResNet50", "ResNet101", "ResNet152", "VGG16", "VGG19")
"""Trained with Caffe's convention: blue, green, red, the mean colour of the data set taken away."""
_MEAN_COLOUR = (123.68, 116.779, 103.939)
_MEAN, _DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
"""Of DenseNets, whose weights come from torch: of pixels from 0 to 1."""


@dataclass(frozen=True, config=STRICT)
class KerasApplication(PretrainedClassifier):
    """One of ``tf_keras.applications``; ``alpha``: width, for MobileNetV2 alone."""

    name: Architecture = "ResNet50"
    alpha: Annotated[float, Gt(0), Le(16)] = 1.0

    def smallest(self) -> int:
        """Return what Keras documents."""
        return _SMALLEST.get(self.name, 32)

    def network(self, image: Any, x: Any, classes: int) -> tf_keras.Model:
        """Return Keras' model behind its preprocessing."""
        x = self._preprocessed(x)
        return self._keras(input_tensor=x, weights=None, classes=classes, classifier_activation=None)

    def pretrained(self, resolution: int, with_classes: bool) -> tf_keras.Model:
        """Return Keras' model."""
        return self._keras(weights="imagenet", include_top=with_classes)

    def adapted(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """Have the first kernel read red, green, blue."""
        return [values[0][:, :, ::-1], *values[1:]] if self.name in _BLUE_FIRST else values

    def _keras(self, **settings: Any) -> tf_keras.Model:
        make = getattr(tf_keras.applications, self.name)
        if "alpha" in inspect.signature(make).parameters:
            settings["alpha"] = self.alpha
        elif self.alpha != 1.0:
            raise CompressError(
                "model.alpha",
                expected=f"1.0: {self.name} has no width",
                received=str(self.alpha),
                fix="Leave it out, or choose model=mobilenet_v1, mobilenet_v2 or shufflenet.",
            )
        return make(**settings)

    def _preprocessed(self, x: Any) -> Any:
        scale: Any = 1.0 / 127.5
        offset: Any = -1.0
        if self.name in _BLUE_FIRST:
            scale, offset = 1.0, [-colour for colour in _MEAN_COLOUR]
        elif self.name.startswith("DenseNet"):
            scale, offset = (1.0 / 255.0 / _DEVIATION).tolist(), (-_MEAN / _DEVIATION).tolist()
        if x.shape[-1] != len(_MEAN):
            scale, offset = float(np.mean(scale)), float(np.mean(offset))
        return tf_keras.layers.Rescaling(scale, offset, name="normalise")(x)
