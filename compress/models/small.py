"""Small classifiers: the default CNN for digits, LeNet-300-100 and LeNet-5."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

import tf_keras
from pydantic.dataclasses import dataclass

from compress.data.source import STRICT, Data
from compress.errors import CompressError
from compress.models.source import TrainableSource

layers = tf_keras.layers


@dataclass(frozen=True, config=STRICT)
class _Small(TrainableSource):
    """Shared by the small models: a Keras weights file, if any, is loaded into the architecture."""

    def build(self, data: Data, seed: int) -> tf_keras.Model:
        """Return the architecture for the data's shape, with weights from a file if one is named."""
        tf_keras.utils.set_random_seed(seed)
        shape = data.train.x.shape[1:]
        if len(shape) not in (2, 3):
            raise CompressError(
                "model",
                expected=f"images of shape [h, w] or [h, w, c], which {type(self).__name__} reads",
                received=f"samples of shape {shape} from data {data.name}",
                fix="Reshape the samples to images, or bring your own model with model=file.",
            )
        try:
            model = self.architecture(shape if len(shape) == 3 else (*shape, 1), data.classes)
        except ValueError as error:
            # Keras finds no room left for a convolution or a pooling.
            raise CompressError(
                "model",
                expected=f"images large enough for {type(self).__name__}",
                received=f"images of shape {shape} from data {data.name}",
                fix="Choose larger images, or another model.",
            ) from error
        file = self.origin().file
        if file is not None:
            _load_weights(model, file)
        return model

    @abstractmethod
    def architecture(self, shape: tuple[int, ...], classes: int) -> tf_keras.Model:
        """Return the untrained model for images of ``shape`` [h, w, c]."""


@dataclass(frozen=True, config=STRICT)
class DigitsCnn(_Small):
    """Three 3x3 convolutions with batch norm and two Dense layers, for 8x8 images with values 0 to 16."""

    def architecture(self, shape: tuple[int, ...], classes: int) -> tf_keras.Model:
        """Return the untrained model."""
        image = tf_keras.Input(shape, name="image")
        x = layers.Rescaling(1.0 / 16.0, name="rescale")(image)
        for index, (filters, pool) in enumerate(((32, False), (64, True), (64, True)), start=1):
            x = layers.Conv2D(filters, 3, padding="same", use_bias=False, name=f"conv{index}")(x)
            x = layers.BatchNormalization(momentum=0.9, name=f"norm{index}")(x)
            x = layers.ReLU(name=f"relu{index}")(x)
            if pool:
                x = layers.MaxPooling2D(name=f"pool{index}")(x)
        x = layers.Flatten(name="flatten")(x)
        x = layers.Dense(128, activation="relu", name="fc1")(x)
        return tf_keras.Model(image, layers.Dense(classes, name="logits")(x), name="digits_cnn")


@dataclass(frozen=True, config=STRICT)
class Lenet300100(_Small):
    """LeNet-300-100 (LeCun et al. 1998): 266,610 parameters on MNIST."""

    def architecture(self, shape: tuple[int, ...], classes: int) -> tf_keras.Model:
        """Return the untrained model."""
        image = tf_keras.Input(shape, name="image")
        x = layers.Rescaling(1.0 / 255.0, name="rescale")(image)
        x = layers.Flatten(name="flatten")(x)
        x = layers.Dense(300, activation="relu", name="fc1")(x)
        x = layers.Dense(100, activation="relu", name="fc2")(x)
        return tf_keras.Model(image, layers.Dense(classes, name="fc3")(x), name="lenet_300_100")


@dataclass(frozen=True, config=STRICT)
class Lenet5(_Small):
    """LeNet-5 as Caffe defines it (no activation after the convolutions): 431,080 parameters on MNIST."""

    def architecture(self, shape: tuple[int, ...], classes: int) -> tf_keras.Model:
        """Return the untrained model."""
        image = tf_keras.Input(shape, name="image")
        x = layers.Rescaling(1.0 / 255.0, name="rescale")(image)
        x = layers.Conv2D(20, 5, name="conv1")(x)
        x = layers.MaxPooling2D(name="pool1")(x)
        x = layers.Conv2D(50, 5, name="conv2")(x)
        x = layers.MaxPooling2D(name="pool2")(x)
        x = layers.Flatten(name="flatten")(x)
        x = layers.Dense(500, activation="relu", name="fc1")(x)
        return tf_keras.Model(image, layers.Dense(classes, name="fc2")(x), name="lenet5")


def _load_weights(model: tf_keras.Model, file: Path) -> None:
    try:
        model.load_weights(str(file))
    except (ValueError, OSError, KeyError) as error:
        raise CompressError(
            f"model.weights {file}",
            expected=f"weights saved by Keras for {model.name}",
            received=str(error)[:200],
            fix="Save them with model.save_weights('x.weights.h5'), or write model.weights=scratch.",
        ) from error
