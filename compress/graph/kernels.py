"""The kernels of a flat model: which layers have one, what it is called, what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
import tf_keras

from compress.graph.rewrite import Shape, positions


@dataclass(frozen=True)
class Kernel:
    """One weight tensor that multiplies activations.

    ``name`` is ``"<layer>/<attribute>"``; ``macs`` is the number of multiply-adds that it takes part in,
    for one sample, over all calls of its layer.
    """

    layer: tf_keras.layers.Layer
    attribute: str
    macs: int

    @property
    def name(self) -> str:
        """Name of the weight, as guarantees spell it."""
        return f"{self.layer.name}/{self.attribute}"

    @property
    def value(self) -> np.ndarray:
        """The weight's value."""
        return np.asarray(getattr(self.layer, self.attribute))

    @property
    def size(self) -> int:
        """Number of weights."""
        return int(np.prod(getattr(self.layer, self.attribute).shape))

    @property
    def output_axes(self) -> tuple[int, ...]:
        """The axes of the outputs, counted from the last."""
        if self.attribute == "depthwise_kernel":
            return (-2, -1)
        transposed = isinstance(self.layer, (tf_keras.layers.Conv1DTranspose, tf_keras.layers.Conv2DTranspose))
        return (-2,) if transposed else (-1,)

    @property
    def inner_axes(self) -> tuple[int, ...]:
        """The axes that one output sums over, counted from the last."""
        rank = len(getattr(self.layer, self.attribute).shape)
        return tuple(axis for axis in range(-rank, 0) if axis not in self.output_axes)

    @property
    def macs_per_weight(self) -> float:
        """Multiply-adds that one weight takes part in."""
        return self.macs / self.size


def kernel_attributes(layer: tf_keras.layers.Layer) -> tuple[str, ...]:
    """Return the names of the attributes of ``layer`` that hold kernels, in order of use; none for other layers."""
    kinds = tf_keras.layers
    if isinstance(layer, (kinds.SeparableConv1D, kinds.SeparableConv2D)):
        return ("depthwise_kernel", "pointwise_kernel")
    if isinstance(layer, (kinds.DepthwiseConv1D, kinds.DepthwiseConv2D)):
        return ("depthwise_kernel",)
    plain = (kinds.Dense, kinds.Conv1D, kinds.Conv2D, kinds.Conv3D, kinds.Conv1DTranspose, kinds.Conv2DTranspose)
    return ("kernel",) if isinstance(layer, plain) else ()


def kernels(model: tf_keras.Model) -> list[Kernel]:
    """Return the kernels of the flat ``model`` in the order of its layers."""
    macs: dict[str, int] = {}
    layers: dict[str, tf_keras.layers.Layer] = {}
    for layer, inputs, outputs in positions(model):
        for attribute in kernel_attributes(layer):
            key = f"{layer.name}/{attribute}"
            layers[key] = layer
            macs[key] = macs.get(key, 0) + macs_of_call(layer, attribute, inputs[0], outputs[0])
    return [Kernel(layers[key], key.rpartition("/")[2], count) for key, count in macs.items()]


def has_integer_operator(layer: tf_keras.layers.Layer) -> bool:
    """Say whether LiteRT can compute a layer with a kernel in integers."""
    return not isinstance(layer, (tf_keras.layers.Conv3D, tf_keras.layers.Conv3DTranspose))


def without_kernel(model: tf_keras.Model) -> list[tf_keras.layers.Layer]:
    """Return the layers whose weight matrices no strategy here works on yet: recurrent, attention, embedding, ..."""
    return [
        layer
        for layer in model.layers
        if not kernel_attributes(layer)
        and any(len(w.shape) > 1 for inner in layer._flatten_layers() for w in inner._trainable_weights)
    ]


def get_weight(model: tf_keras.Model, name: str) -> np.ndarray:
    """Return the value of the weight ``"<layer>/<attribute>"``."""
    return np.asarray(get_variable(model, name))


def get_variable(model: tf_keras.Model, name: str) -> tf.Variable:
    """Return the variable ``"<layer>/<attribute>"``."""
    layer, _, attribute = name.rpartition("/")
    return getattr(model.get_layer(layer), attribute)


def macs_of_call(layer: tf_keras.layers.Layer, attribute: str, input_shape: Shape, output_shape: Shape) -> int:
    """Return the multiply-adds of one call: size of the kernel times the positions it is applied at."""
    shape = getattr(layer, attribute).shape
    size = int(np.prod(shape))
    if isinstance(layer, tf_keras.layers.Dense):
        return size * _product(output_shape[1:-1])
    if isinstance(
        layer, (tf_keras.layers.Conv1DTranspose, tf_keras.layers.Conv2DTranspose, tf_keras.layers.Conv3DTranspose)
    ):
        # Every input position is multiplied by the whole kernel.
        output_shape = input_shape
    spatial = output_shape[2:] if getattr(layer, "data_format", "") == "channels_first" else output_shape[1:-1]
    return size * _product(spatial)


def _product(values: Sequence[int | None]) -> int:
    return int(np.prod([1 if value is None else value for value in values], dtype=np.int64))
