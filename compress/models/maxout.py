"""Convolutional maxout networks for MNIST: the teacher of FitNets, and a thin and deep student of it.

Sources: Goodfellow et al., maxout networks (arXiv 1302.4389); Romero et al., FitNets (arXiv 1412.6550, table 4).
"""

from __future__ import annotations

from typing import Annotated, Any

import tf_keras
from annotated_types import Ge, Lt
from pydantic.dataclasses import dataclass

from compress.data.source import STRICT
from compress.models.classifier import Classifier

layers = tf_keras.layers


@dataclass(frozen=True, config=STRICT)
class MaxoutTeacher(Classifier):
    """Three maxout convolutions of 48, 48 and 24 units with two pieces each: 361,066 parameters on MNIST."""

    dropout: Annotated[float, Ge(0), Lt(1)] = 0.5

    def architecture(self, shape: tuple[int, ...], classes: int) -> tf_keras.Model:
        """Return the untrained model."""
        image = tf_keras.Input(shape, name="image")
        x = layers.Rescaling(1.0 / 255.0, name="rescale")(image)
        x = layers.MaxPooling2D(4, 2, name="pool1")(_maxout(x, 48, 8, "valid", "maxout1"))
        x = layers.ZeroPadding2D(3, name="pad2")(x)
        x = layers.MaxPooling2D(4, 2, name="pool2")(_maxout(x, 48, 8, "valid", "maxout2"))
        x = layers.ZeroPadding2D(3, name="pad3")(x)
        x = layers.MaxPooling2D(2, 2, padding="same", name="pool3")(_maxout(x, 24, 5, "valid", "maxout3"))
        x = layers.Dropout(self.dropout, name="dropout")(layers.Flatten(name="flatten")(x))
        return tf_keras.Model(image, layers.Dense(classes, name="logits")(x), name="maxout")


@dataclass(frozen=True, config=STRICT)
class FitNet(Classifier):
    """Six maxout convolutions of 3x3 and few units, twice as deep as the teacher: 29,090 parameters on MNIST."""

    def architecture(self, shape: tuple[int, ...], classes: int) -> tf_keras.Model:
        """Return the untrained model."""
        image = tf_keras.Input(shape, name="image")
        x = layers.Rescaling(1.0 / 255.0, name="rescale")(image)
        for stage, (units, size) in enumerate(((16, 4), (16, 4), (20, 2)), start=1):
            for index in (2 * stage - 1, 2 * stage):
                x = _maxout(x, units, 3, "same", f"maxout{index}")
            x = layers.MaxPooling2D(size, 2, padding="same" if size == 2 else "valid", name=f"pool{stage}")(x)
        x = layers.Flatten(name="flatten")(x)
        return tf_keras.Model(image, layers.Dense(classes, name="logits")(x), name="fitnet")


def _maxout(x: Any, units: int, size: int, padding: str, name: str) -> Any:
    """Return the larger one of two convolutions, for each unit."""
    pieces = [
        layers.Conv2D(units, size, padding=padding, kernel_initializer="he_normal", name=f"{name}_{piece}")(x)
        for piece in ("one", "other")
    ]
    return layers.Maximum(name=name)(pieces)
