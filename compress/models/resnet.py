"""Residual networks for CIFAR-10: ResNet-20/32/44/56/110 (He et al., arXiv 1512.03385) and MLPerf Tiny's ResNet-8."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow as tf
import tf_keras
from pydantic.dataclasses import dataclass

from compress.data.source import STRICT, Data
from compress.errors import CompressError
from compress.models.source import TrainableSource

layers = tf_keras.layers

_MEAN = np.array([0.485, 0.456, 0.406])
_DEVIATION = np.array([0.229, 0.224, 0.225])
_EPSILON = 1e-5


@dataclass(frozen=True, config=STRICT)
class CifarResNet(TrainableSource):
    """A CIFAR ResNet of depth 6n + 2 with parameter-free (option A) shortcuts; reads raw pixels 0 to 255.

    ``weights`` may be an ``.npz`` with the names of a torch state dictionary (``layer1.0.conv1.weight``).
    """

    depth: Literal[8, 14, 20, 32, 44, 56, 110] = 20

    def build(self, data: Data, seed: int) -> tf_keras.Model:
        """Return the network, with weights from a file if one is named."""
        tf_keras.utils.set_random_seed(seed)
        model = cifar_resnet(self.depth, classes=data.classes)
        file = self.origin().file
        if file is not None:
            load_torch_weights(model, file)
        return model


@dataclass(frozen=True, config=STRICT)
class ResNet8(TrainableSource):
    """MLPerf Tiny's image classification network (Banbury et al., arXiv 2106.07597); reads raw pixels 0 to 255."""

    def build(self, data: Data, seed: int) -> tf_keras.Model:
        """Return the network, with weights from MLPerf Tiny's ``.h5`` if it is named."""
        tf_keras.utils.set_random_seed(seed)
        model = resnet8(data.classes)
        file = self.origin().file
        if file is not None:
            from compress.models.file import load_model_file

            trained = load_model_file(file, allow_code=False)
            try:
                model.set_weights(trained.get_weights())
            except ValueError as error:
                raise _wrong_weights(file, "resnet8", str(error)[:200]) from error
        return model


def cifar_resnet(depth: int, classes: int = 10) -> tf_keras.Model:
    """Return an untrained CIFAR ResNet; blocks are named ``stage1_block1_conv1`` and so on."""
    image = tf_keras.Input((32, 32, 3), name="image")
    x = layers.Rescaling((1.0 / 255.0 / _DEVIATION).tolist(), (-_MEAN / _DEVIATION).tolist(), name="normalise")(image)
    x = _convolution(x, 16, 1, "stem")
    x = layers.ReLU(name="stem_relu")(x)
    for stage, filters in enumerate((16, 32, 64), start=1):
        for block in range(1, (depth - 2) // 6 + 1):
            stride = 2 if stage > 1 and block == 1 else 1
            x = _block(x, filters, stride, f"stage{stage}_block{block}")
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return tf_keras.Model(image, layers.Dense(classes, name="logits")(x), name=f"resnet{depth}")


def _block(x: Any, filters: int, stride: int, name: str) -> Any:
    shortcut = x
    if stride > 1:
        # Option A: every second pixel, zeros for the new channels. Operations, so no layer code is stored.
        added = filters - x.shape[-1]
        shortcut = layers.MaxPooling2D(1, strides=stride, name=f"{name}_subsample")(x)
        shortcut = tf.pad(shortcut, [[0, 0], [0, 0], [0, 0], [added // 2, added - added // 2]])
    y = _convolution(x, filters, stride, f"{name}_conv1")
    y = layers.ReLU(name=f"{name}_relu1")(y)
    y = _convolution(y, filters, 1, f"{name}_conv2")
    y = layers.Add(name=f"{name}_add")([y, shortcut])
    return layers.ReLU(name=f"{name}_relu2")(y)


def _convolution(x: Any, filters: int, stride: int, name: str) -> Any:
    padding = "same"
    if stride > 1:
        # torch pads one pixel on every side; "same" would pad only below and to the right.
        x = layers.ZeroPadding2D(1, name=f"{name}_pad")(x)
        padding = "valid"
    x = layers.Conv2D(
        filters, 3, strides=stride, padding=padding, use_bias=False, kernel_initializer="he_normal", name=name
    )(x)
    return layers.BatchNormalization(epsilon=_EPSILON, name=f"{name}_norm")(x)


def load_torch_weights(model: tf_keras.Model, file: Path) -> None:
    """Fill a network of :func:`cifar_resnet` from an ``.npz`` with torch state-dictionary names.

    Raises:
        CompressError: if the file is not such an archive, lacks an array, or one has another shape.
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {key.removeprefix("module."): archive[key] for key in archive.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise _wrong_weights(file, model.name, f"{type(error).__name__}: {str(error)[:160]}") from error

    def take(name: str, layer: str, shape: tuple[int, ...]) -> np.ndarray:
        value = arrays.pop(name, None)
        if value is None or value.shape != shape:
            received = "no such array" if value is None else f"shape {value.shape}"
            raise _wrong_weights(file, model.name, f"{received} for {name} (layer {layer}, {shape})")
        return np.asarray(value)

    for layer in model.layers:
        if isinstance(layer, layers.Conv2D):
            height, width, channels, filters = layer.kernel.shape
            value = take(f"{_torch_name(layer.name)}.weight", layer.name, (filters, channels, height, width))
            layer.set_weights([value.transpose(2, 3, 1, 0)])
        elif isinstance(layer, layers.BatchNormalization):
            name = _torch_name(layer.name.removesuffix("_norm")).replace("conv", "bn")
            size = tuple(layer.gamma.shape)
            parts = ("weight", "bias", "running_mean", "running_var")
            layer.set_weights([take(f"{name}.{part}", layer.name, size) for part in parts])
        elif isinstance(layer, layers.Dense):
            inputs, outputs = layer.kernel.shape
            kernel = take("linear.weight", layer.name, (outputs, inputs))
            layer.set_weights([kernel.T, take("linear.bias", layer.name, (outputs,))])
    left = sorted(name for name in arrays if not name.endswith("num_batches_tracked"))
    if left:
        raise _wrong_weights(file, model.name, f"{len(left)} arrays more than it has, such as {left[0]}")


def _torch_name(layer: str) -> str:
    """Return ``layer2.0.conv1`` for ``stage2_block1_conv1``."""
    if layer == "stem":
        return "conv1"
    stage, block, convolution = layer.split("_")
    return f"layer{stage.removeprefix('stage')}.{int(block.removeprefix('block')) - 1}.{convolution}"


def _wrong_weights(file: Path, model: str, received: str) -> CompressError:
    return CompressError(
        f"model.weights {file}",
        expected=f"the weights of {model}",
        received=received,
        fix="Name the file that belongs to this model, or write model.weights=scratch.",
    )


def resnet8(classes: int = 10) -> tf_keras.Model:
    """Return MLPerf Tiny's untrained ResNet-8: three stages of one block, 1x1 convolutions as shortcuts."""
    regularizer = tf_keras.regularizers.l2(1e-4)

    def convolution(x: Any, filters: int, size: int, stride: int, name: str) -> Any:
        return layers.Conv2D(
            filters,
            size,
            strides=stride,
            padding="same",
            kernel_initializer="he_normal",
            kernel_regularizer=regularizer,
            name=name,
        )(x)

    image = tf_keras.Input((32, 32, 3), name="image")
    x = convolution(image, 16, 3, 1, "stem")
    x = layers.ReLU(name="stem_relu")(layers.BatchNormalization(name="stem_norm")(x))
    for stage, (filters, stride) in enumerate(((16, 1), (32, 2), (64, 2)), start=1):
        y = convolution(x, filters, 3, stride, f"stage{stage}_conv1")
        y = layers.BatchNormalization(name=f"stage{stage}_conv1_norm")(y)
        y = layers.ReLU(name=f"stage{stage}_relu1")(y)
        y = convolution(y, filters, 3, 1, f"stage{stage}_conv2")
        y = layers.BatchNormalization(name=f"stage{stage}_conv2_norm")(y)
        if stride > 1:
            x = convolution(x, filters, 1, stride, f"stage{stage}_shortcut")
        x = layers.ReLU(name=f"stage{stage}_relu2")(layers.Add(name=f"stage{stage}_add")([x, y]))
    x = layers.AveragePooling2D(8, name="pool")(x)
    x = layers.Flatten(name="flatten")(x)
    return tf_keras.Model(image, layers.Dense(classes, activation="softmax", name="probabilities")(x), name="resnet8")
