"""Normalisations as depthwise convolutions of one pixel: a product and a sum in one operator.

An integer file rounds what each operator gives; a convolution sums up in 32 bits, with a scale for each channel.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from compress.graph.fold import gain_of
from compress.graph.kernels import kernel_attributes
from compress.graph.rewrite import NewLayer, nodes, rewrite

_NORMS = (tf_keras.layers.BatchNormalization, tf_keras.layers.Normalization, tf_keras.layers.Rescaling)
_TRAINING_ONLY = (
    tf_keras.layers.Dropout,
    tf_keras.layers.GaussianDropout,
    tf_keras.layers.GaussianNoise,
    tf_keras.layers.AlphaDropout,
    tf_keras.layers.ActivityRegularization,
)


def with_norms_as_convolutions(model: tf_keras.Model) -> tf_keras.Model:
    """Return the flat ``model`` with convolutions of the same names and outputs in place of normalisations of channels.

    What is right behind a linear layer is left: the converter merges it into the kernel. So is rescaling without a sum
    or by one number for all channels, which is quick; by one for each, LiteRT computes it pixel by pixel. Without
    others, it is the model itself.
    """
    readers = Counter(id(tensor) for node in nodes(model) for tensor in node.keras_inputs)
    readers.update(id(tensor) for tensor in model.outputs)
    left: set[str] = set()
    norms: dict[str, tf_keras.layers.Layer] = {}
    for node in nodes(model):
        if not isinstance(node.layer, _NORMS):
            continue
        source = node.keras_inputs[0]
        masked = getattr(source, "_keras_mask", None) is not None
        # A convolution takes floats; a norm makes them of the integers of an image.
        floats = source.dtype.is_floating
        if masked or not floats or not _normalises_channels(node.layer, source.shape) or _is_merged(source, readers):
            left.add(node.layer.name)
        norms[node.layer.name] = node.layer
    replacements = {name: _convolution(norm) for name, norm in norms.items() if name not in left}
    edits = {(name, call): _without_mode for name in replacements for call in range(len(norms[name].inbound_nodes))}
    return rewrite(model, replacements, edits) if replacements else model


def _normalises_channels(norm: tf_keras.layers.Layer, shape: tf.TensorShape) -> bool:
    if isinstance(norm, tf_keras.layers.Rescaling):
        return shape.rank == 4 and (shape[-1] or 1) > 1 and _rescales_each_channel(norm, shape[-1])
    if shape.rank not in (2, 3, 4):
        return False
    if isinstance(norm, tf_keras.layers.Normalization):
        return np.size(norm.mean) in (1, shape[-1]) and np.shape(norm.mean)[-1:] in ((1,), (shape[-1],), ())
    axes = [norm.axis] if isinstance(norm.axis, int) else list(norm.axis)
    return [axis % shape.rank for axis in axes] == [shape.rank - 1]


def _rescales_each_channel(layer: tf_keras.layers.Rescaling, channels: int) -> bool:
    parts = [np.shape(part) for part in (layer.scale, layer.offset)]
    return (
        (channels,) in parts and all(part in ((), (1,), (channels,)) for part in parts) and bool(np.any(layer.offset))
    )


def _is_merged(source: Any, readers: Counter[int]) -> bool:
    """Say whether the converter merges what normalises this tensor, and alone reads it, into the kernel before it."""
    node = source.node
    if readers[id(source)] > 1:
        return False
    if isinstance(node.layer, _TRAINING_ONLY):
        return _is_merged(node.keras_inputs[0], readers)
    linear = getattr(node.layer, "activation", None) is tf_keras.activations.linear
    return linear and bool(kernel_attributes(node.layer)) and not isinstance(node.layer, tf_keras.layers.Conv3D)


def _convolution(norm: tf_keras.layers.Layer) -> list[NewLayer]:
    if isinstance(norm, tf_keras.layers.Normalization):
        deviation = np.maximum(np.sqrt(np.asarray(norm.variance)), tf_keras.backend.epsilon())
        gain = deviation if norm.invert else 1 / deviation
        shift = np.asarray(norm.mean) * (1 if norm.invert else -gain)
    elif isinstance(norm, tf_keras.layers.Rescaling):
        gain, shift = np.asarray(norm.scale), np.asarray(norm.offset)
    else:
        gain = gain_of(norm)
        shift = (np.asarray(norm.beta) if norm.center else 0.0) - np.asarray(norm.moving_mean) * gain
    shape = norm.get_input_shape_at(0)
    channels, rank = shape[-1], len(shape)
    kernel = np.broadcast_to(gain.reshape(-1), channels).reshape(1, 1, channels, 1)
    bias = np.broadcast_to(shift.reshape(-1), channels)
    convolution = NewLayer(
        tf_keras.layers.DepthwiseConv2D(1, name=norm.name), (kernel.astype(np.float32), bias.astype(np.float32))
    )
    if rank == 4:
        return [convolution]
    inner = (channels,) if rank == 2 else (-1, channels)
    return [
        NewLayer(tf_keras.layers.Reshape((1, -1, channels), name=f"{norm.name}_image")),
        convolution,
        NewLayer(tf_keras.layers.Reshape(inner, name=f"{norm.name}_shape")),
    ]


def _without_mode(args: list[Any], kwargs: dict[str, Any]) -> None:
    """Take the arguments away that only normalisations have."""
    kwargs.pop("training", None)
    kwargs.pop("mask", None)
