"""Grouped convolutions and shuffled channels.

A grouped ``Conv2D`` stays one layer: LiteRT has a kernel for it that is as fast as one convolution for each group in
floats, and twice as fast in integers. TensorFlow on a CPU has none for its gradients, so training goes another way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from compress.errors import CompressError

layers = tf_keras.layers

_MOST_PARTS = 64
_MOST_GROUPS_TOGETHER = 8
"""Up to so many, one pointwise convolution with zeros between the groups takes less time than one for each group."""
_OPERATION = "_jit_compiled_convolution_op"
"""What Keras' layer calls where it has groups."""


def grouped_convolution(x: Any, filters: int, groups: int, name: str, size: int = 1) -> Any:
    """Return a convolution of ``x`` in ``groups``, without a bias.

    Raises:
        CompressError: if the groups do not divide the channels.
    """
    if x.shape[-1] % groups or filters % groups:
        raise CompressError(
            f"layer {name}",
            expected=f"numbers of channels that {groups} groups divide",
            received=f"{x.shape[-1]} channels in, {filters} out",
            fix="Choose other groups, or other numbers of channels.",
        )
    return layers.Conv2D(filters, size, padding="same", groups=groups, use_bias=False, name=name)(x)


def shuffle_channels(x: Any, groups: int, name: str) -> Any:
    """Return ``x`` with its channels in the order that gives each of ``groups`` some of every group before it."""
    height, width, channels = x.shape[1:]
    x = layers.Reshape((height, width, groups, channels // groups), name=f"{name}_apart")(x)
    x = layers.Permute((1, 2, 4, 3), name=f"{name}_swap")(x)
    return layers.Reshape((height, width, channels), name=f"{name}_together")(x)


@contextmanager
def groups_apart(model: tf_keras.Model) -> Iterator[None]:
    """Have what is traced inside compute grouped convolutions of the flat ``model`` as one convolution for each group.

    The gradients of TensorFlow's own operator take 8 (3 groups) to 18 times (8 groups) as long on a CPU. Pointwise
    convolutions of few groups become one convolution with zeros between the groups: half of the time once more.
    """
    grouped = [
        layer
        for layer in model.layers
        if isinstance(layer, (layers.Conv1D, layers.Conv2D, layers.Conv3D))
        and not isinstance(layer, (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose))
        and 1 < layer.groups <= _MOST_PARTS
    ]
    for layer in grouped:
        together = set(layer.kernel_size) == {1} and layer.groups <= _MOST_GROUPS_TOGETHER
        setattr(layer, _OPERATION, _with_zeros(layer) if together else _in_parts(layer))
    try:
        yield
    finally:
        for layer in grouped:
            delattr(layer, _OPERATION)


def _in_parts(layer: tf_keras.layers.Layer) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    axis = 1 if layer.data_format == "channels_first" else -1

    def convolution(inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        parts = tf.split(inputs, layer.groups, axis)
        kernels = tf.split(kernel, layer.groups, -1)
        return tf.concat([layer.convolution_op(*pair) for pair in zip(parts, kernels, strict=True)], axis)

    return convolution


def _with_zeros(layer: tf_keras.layers.Layer) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    *_, inputs_each, filters = layer.kernel.shape
    group_of_input = np.repeat(np.arange(layer.groups), inputs_each)
    group_of_filter = np.repeat(np.arange(layer.groups), filters // layer.groups)
    own = (group_of_input[:, None] == group_of_filter).astype(np.float32)
    times = [*[1] * layer.rank, layer.groups, 1]

    def convolution(inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        return layer.convolution_op(inputs, tf.tile(kernel, times) * tf.cast(own, kernel.dtype))

    return convolution
