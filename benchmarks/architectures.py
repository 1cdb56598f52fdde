"""The architectures of ``tf_keras.applications`` that coverage is measured on: random weights, small random images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tf_keras

from compress.data.source import Augmentation, Data, Split

ARCHITECTURES = (
    *("VGG16", "VGG19", "MobileNet", "MobileNetV2", "MobileNetV3Small", "MobileNetV3Large", "Xception"),
    *("ResNet50", "ResNet101", "ResNet152", "ResNet50V2", "ResNet101V2", "ResNet152V2", "ResNetRS50", "ResNetRS101"),
    *("DenseNet121", "DenseNet169", "DenseNet201", "InceptionV3", "InceptionResNetV2", "NASNetMobile", "NASNetLarge"),
    *("EfficientNetB0", "EfficientNetB3", "EfficientNetB7", "EfficientNetV2B0", "EfficientNetV2S", "EfficientNetV2L"),
    *("RegNetX002", "RegNetX032", "RegNetX320", "RegNetY002", "RegNetY032", "RegNetY320"),
    *("ConvNeXtTiny", "ConvNeXtBase", "ConvNeXtXLarge"),
)
_MAGNIFIED = 1000.0
_SIZES = {"InceptionV3": 96, "InceptionResNetV2": 96, "Xception": 96, "NASNetMobile": 96, "NASNetLarge": 96}


def build(name: str) -> tf_keras.Model:
    size = _SIZES.get(name, 64)
    make = getattr(tf_keras.applications, name)
    return make(weights=None, input_shape=(size, size, 3), classes=10, classifier_activation=None)


def randomise(model: tf_keras.Model) -> None:
    """Give normalisations scales, shifts and statistics of their own: fresh ones would hide mistakes.

    Where activations then grow so that rounding errors drown the outputs, as in the deepest networks, the statistics
    are those of random images instead.
    """
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if any(part in weight.name for part in ("gamma", "variance")):
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
        elif any(part in weight.name for part in ("beta", "moving_mean")):
            weight.assign(rng.normal(size=weight.shape) * 0.2)
    for layer in model.submodules:
        if isinstance(layer, tf_keras.layers.Normalization):
            # It computes with numbers that it has made of these weights before.
            layer.finalize_state()
    images = random_data(model).test.x
    if _magnified(model, images) > _MAGNIFIED:
        settle(model, images)


def settle(model: tf_keras.Model, images: np.ndarray) -> None:
    """Give batch norms the statistics of the images, as training would have: ranges hold for no others."""
    norms = [layer for layer in model.submodules if isinstance(layer, tf_keras.layers.BatchNormalization)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    model(images, training=True)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum


def _magnified(model: tf_keras.Model, images: np.ndarray) -> float:
    """Return the relative change of the outputs for each relative change of the inputs, of the size of rounding."""
    tiny = np.float32(4e-7)
    outputs = np.asarray(model(images))
    return float(np.abs(model(images * (1 + tiny)) - outputs).max() / np.abs(outputs).max() / tiny)


def random_data(model: tf_keras.Model) -> Data:
    """Return 32 images; all parts are the same."""
    rng = np.random.default_rng(0)
    split = Split(rng.uniform(0, 255, (32, *model.input_shape[1:])).astype(np.float32), np.arange(32) % 10)
    return Data("random", split, split, split, 10, Augmentation(), "")


def accepts(action: Callable[[], object]) -> str:
    try:
        action()
    except Exception as error:  # TFMOT raises what it likes; any of it is a refusal.
        return f"no: {' '.join(str(error).split())[:90]}"
    return "yes"
