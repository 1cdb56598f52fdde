"""Twelve small networks with random weights, as float and as int8 files: what boards are tried on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tf_keras
from architectures import random_data

from compress.candidate import Calibration, Candidate, Storage
from compress.deploy.tflite import export
from compress.models.resnet import cifar_resnet, resnet8
from compress.models.small import DigitsCnn, Lenet5, Lenet300100
from compress.models.vgg import Vgg16

layers, applications = tf_keras.layers, tf_keras.applications
TYPES = ("float32", "int8")
_SAMPLES = 4


def ds_cnn() -> tf_keras.Model:
    """MLPerf Tiny's keyword spotting (Banbury et al., arXiv 2106.07597), without its batch norms, which fold away."""
    spectrogram = tf_keras.Input((49, 10, 1))
    x = layers.Conv2D(64, (10, 4), 2, padding="same", activation="relu")(spectrogram)
    for _ in range(4):
        x = layers.DepthwiseConv2D(3, padding="same", activation="relu")(x)
        x = layers.Conv2D(64, 1, activation="relu")(x)
    return tf_keras.Model(spectrogram, layers.Dense(12)(layers.GlobalAveragePooling2D()(x)))


def autoencoder() -> tf_keras.Model:
    """MLPerf Tiny's anomaly detection, without its batch norms."""
    given = tf_keras.Input((640,))
    x = given
    for width in (128, 128, 128, 128, 8, 128, 128, 128, 128):
        x = layers.Dense(width, activation="relu")(x)
    return tf_keras.Model(given, layers.Dense(640)(x))


def _application(make: Callable[..., tf_keras.Model], size: int, alpha: float) -> tf_keras.Model:
    return make(weights=None, input_shape=(size, size, 3), alpha=alpha, classes=10, classifier_activation=None)


MODELS: dict[str, Callable[[], tf_keras.Model]] = {
    "digits_cnn": lambda: DigitsCnn().architecture((8, 8, 1), 10),
    "LeNet-300-100": lambda: Lenet300100().architecture((28, 28, 1), 10),
    "LeNet-5": lambda: Lenet5().architecture((28, 28, 1), 10),
    "ResNet-8": lambda: resnet8(10),
    "ResNet-20": lambda: cifar_resnet(20),
    "ResNet-56": lambda: cifar_resnet(56),
    "VGG-16, 32x32": lambda: Vgg16().architecture((32, 32, 3), 10),
    "DS-CNN": ds_cnn,
    "autoencoder": autoencoder,
    "MobileNet 0.25, 96x96": lambda: _application(applications.MobileNet, 96, 0.25),
    "MobileNetV2 0.35, 96x96": lambda: _application(applications.MobileNetV2, 96, 0.35),
    "MobileNetV3Small, 64x64": lambda: _application(applications.MobileNetV3Small, 64, 1.0),
}


def write(name: str, kind: str, folder: Path) -> Path:
    """Write the file of a model, unless it is there, and return its path."""
    path = folder / f"{list(MODELS).index(name)}-{kind}.tflite"
    if path.is_file():
        return path
    tf_keras.utils.set_random_seed(0)
    model = MODELS[name]()
    candidate = Candidate(model, storage=Storage(kind, Calibration(_SAMPLES)))
    return export(candidate, random_data(model), path).path
