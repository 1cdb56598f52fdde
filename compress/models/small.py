"""Small classifiers: the default CNN for digits, LeNet-300-100, LeNet-5, and the CNN of TFMOT's tutorials."""

from __future__ import annotations

import tf_keras
from pydantic.dataclasses import dataclass

from compress.data.source import STRICT
from compress.models.classifier import Classifier

layers = tf_keras.layers


@dataclass(frozen=True, config=STRICT)
class DigitsCnn(Classifier):
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
class Lenet300100(Classifier):
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
class Lenet5(Classifier):
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


@dataclass(frozen=True, config=STRICT)
class TutorialCnn(Classifier):
    """One convolution and one Dense layer: 20,410 parameters on MNIST.

    Source: the tutorials of the TensorFlow Model Optimization Toolkit (pruning, clustering, quantization with Keras).
    """

    def architecture(self, shape: tuple[int, ...], classes: int) -> tf_keras.Model:
        """Return the untrained model."""
        image = tf_keras.Input(shape, name="image")
        x = layers.Rescaling(1.0 / 255.0, name="rescale")(image)
        x = layers.Conv2D(12, 3, activation="relu", name="conv")(x)
        x = layers.MaxPooling2D(name="pool")(x)
        x = layers.Flatten(name="flatten")(x)
        return tf_keras.Model(image, layers.Dense(classes, name="logits")(x), name="tutorial_cnn")
