"""VGG-16 for CIFAR-10, as Li et al. (arXiv 1608.08710) prune it."""

from __future__ import annotations

import tf_keras
from pydantic.dataclasses import dataclass

from compress.data.source import STRICT
from compress.models.classifier import Classifier

layers = tf_keras.layers

_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Filters and number of convolutions before each pooling (Simonyan and Zisserman, arXiv 1409.1556, table 1, D)."""


@dataclass(frozen=True, config=STRICT)
class Vgg16(Classifier):
    """Thirteen 3x3 convolutions, Dense of 512 and of the classes; batch norm after each but the last, no dropout."""

    def architecture(self, shape: tuple[int, ...], classes: int) -> tf_keras.Model:
        """Return the untrained model; convolutions are named ``conv1`` to ``conv13``."""
        image = tf_keras.Input(shape, name="image")
        x = layers.Rescaling(1.0 / 127.5, -1.0, name="normalise")(image)
        index = 0
        for stage, (filters, count) in enumerate(_STAGES, start=1):
            for _ in range(count):
                index += 1
                x = layers.Conv2D(
                    filters,
                    3,
                    padding="same",
                    use_bias=False,
                    kernel_initializer="he_normal",
                    name=f"conv{index}",
                )(x)
                x = layers.BatchNormalization(name=f"conv{index}_norm")(x)
                x = layers.ReLU(name=f"conv{index}_relu")(x)
            x = layers.MaxPooling2D(name=f"pool{stage}")(x)
        x = layers.Flatten(name="flatten")(x)
        x = layers.Dense(512, use_bias=False, kernel_initializer="he_normal", name="fc1")(x)
        x = layers.BatchNormalization(name="fc1_norm")(x)
        x = layers.ReLU(name="fc1_relu")(x)
        return tf_keras.Model(image, layers.Dense(classes, name="logits")(x), name="vgg16")
