"""What layers with weights do with channels: Dense, convolutions, normalisations, embeddings, scales."""

from __future__ import annotations

import numpy as np
import tf_keras
from tf_keras.src.applications.convnext import LayerScale
from tf_keras.src.layers.normalization.unit_normalization import UnitNormalization

from compress.graph.channels.trace import Call, ChannelIds, Handler

_MIXING_ACTIVATIONS = ("softmax", "log_softmax")


def activation(call: Call, ids: ChannelIds) -> ChannelIds:
    """Keep the channels that the layer's own activation weighs against each other; return ``ids``."""
    functions = (getattr(call.layer, name, None) for name in ("activation", "recurrent_activation"))
    if any(str(getattr(function, "__name__", "")).startswith(_MIXING_ACTIVATIONS) for function in functions):
        call.pin(ids, "weighs its channels against each other (softmax)")
    return ids


def dense(call: Call) -> list[ChannelIds]:
    """Read along the last axis, write ``units``."""
    layer = call.layer
    read, written = call.along(), activation(call, call.write(layer.units))
    call.weight(layer.kernel, read, written, reads=0)
    call.weight(layer.bias, written)
    call.field("units", written)
    call.mixes()
    return [call.spread(written)]


def channel_axis(layer: tf_keras.layers.Layer) -> int:
    """Return the axis of a convolution's tensors that holds the channels, without the batch."""
    return 0 if layer.data_format == "channels_first" else -1


def convolution(call: Call) -> list[ChannelIds]:
    """Read channels, write ``filters``; grouped ones read and write equally many in each group."""
    layer, axis = call.layer, channel_axis(call.layer)
    read = call.along(0, axis)
    free: list[ChannelIds | None] = [None] * layer.rank
    groups = layer.groups
    if groups > 1 and read.size == groups:
        # One input channel for each group: a depthwise convolution by another name. Whole groups go.
        written = activation(call, np.repeat(read, layer.filters // groups))
        call.note("passes on, one by one,", read)
        call.weight(layer.kernel, *free, None, written)
        call.edit_config(lambda config, kept: config.update(groups=kept.count(read), filters=kept.count(written)))
    else:
        written = activation(call, call.write(layer.filters))
        block = call.tie_blocks(read, groups)
        call.tie_blocks(written, groups)
        call.weight(layer.kernel, *free, block, written, reads=layer.rank)
        call.field("filters", written)
        call.mixes()
    call.weight(layer.bias, written)
    return [call.spread(written, axis)]


def transposed_convolution(call: Call) -> list[ChannelIds]:
    """As a convolution, with the kernel's last two axes the other way round."""
    layer, axis = call.layer, channel_axis(call.layer)
    read, written = call.along(0, axis), activation(call, call.write(layer.filters))
    if layer.groups > 1:
        return call.unknown("a grouped transposed convolution")
    free: list[ChannelIds | None] = [None] * layer.rank
    call.weight(layer.kernel, *free, written, read, reads=layer.rank + 1)
    call.weight(layer.bias, written)
    call.field("filters", written)
    call.mixes()
    return [call.spread(written, axis)]


def depthwise_convolution(call: Call) -> list[ChannelIds]:
    """Each channel makes ``depth_multiplier`` channels, which go with it."""
    layer, axis = call.layer, channel_axis(call.layer)
    read = call.along(0, axis)
    written = activation(call, np.repeat(read, layer.depth_multiplier))
    call.note("passes on, one by one,", read)
    call.weight(layer.depthwise_kernel, *[None] * layer.rank, read, None)
    call.weight(layer.bias, written)
    return [call.spread(written, axis)]


def separable_convolution(call: Call) -> list[ChannelIds]:
    """A depthwise convolution, then a pointwise one that writes ``filters``."""
    layer, axis = call.layer, channel_axis(call.layer)
    read, written = call.along(0, axis), activation(call, call.write(layer.filters))
    free: list[ChannelIds | None] = [None] * layer.rank
    call.weight(layer.depthwise_kernel, *free, read, None)
    call.weight(layer.pointwise_kernel, *free, np.repeat(read, layer.depth_multiplier), written, reads=layer.rank)
    call.weight(layer.bias, written)
    call.field("filters", written)
    call.mixes()
    return [call.spread(written, axis)]


def batch_normalization(call: Call) -> list[ChannelIds]:
    """Scale and shift each channel by statistics of its own."""
    layer = call.layer
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    if len(axes) != 1:
        return call.unknown("a batch normalisation over several axes")
    vector = call.along(0, _own_axis(axes[0], call))
    call.note("scales", vector)
    for variable in (layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance):
        call.weight(variable, vector)
    return [call.inputs[0]]


def layer_normalization(call: Call) -> list[ChannelIds]:
    """Normalise over all channels: what goes is left out of the mean and the variance."""
    layer, ids = call.layer, call.inputs[0]
    axes = [_own_axis(a, call) for a in ([layer.axis] if isinstance(layer.axis, int) else layer.axis)]
    if axes != sorted(axes):
        return call.unknown("a layer normalisation whose axes are not in order")
    vectors = [call.along(0, axis) if ids.shape[axis] > 1 else None for axis in axes]
    for variable in (layer.gamma, layer.beta):
        call.weight(variable, *vectors)
    if any(ids.shape[a] > 1 for a in axes):
        call.mixes(normalises=True)
    return [ids]


def group_normalization(call: Call) -> list[ChannelIds]:
    """Normalise over groups of channels: equally many of each stay, or, with one channel each, whole groups go."""
    layer = call.layer
    axis = _own_axis(layer.axis, call)
    if axis != len(call.input_shapes[0]) - 1:
        return call.unknown("a group normalisation over another axis than the last")
    vector = call.along(0, axis)
    for variable in (layer.gamma, layer.beta):
        call.weight(variable, vector)
    if layer.groups == vector.size:
        call.note("normalises each of", vector)
        call.field("groups", vector)
    else:
        call.tie_blocks(vector, layer.groups)
        call.mixes(normalises=True)
    return [call.inputs[0]]


def _own_axis(axis: int, call: Call) -> int:
    """Return an axis of Keras, which counts the batch, as an axis without it."""
    return (axis % (len(call.input_shapes[0]) + 1)) - 1


def embedding(call: Call) -> list[ChannelIds]:
    """Write ``output_dim`` channels."""
    written = call.write(call.layer.output_dim)
    call.weight(call.layer.embeddings, None, written)
    call.field("output_dim", written)
    return [call.spread(written)]


def prelu(call: Call) -> list[ChannelIds]:
    """Scale what is negative, with a slope for each channel."""
    ids = call.inputs[0]
    shape = call.layer.alpha.shape
    axes = [call.along(0, axis) if ids.shape[axis] > 1 and shape[axis] > 1 else None for axis in range(ids.ndim)]
    call.weight(call.layer.alpha, *axes)
    return [ids]


def layer_scale(call: Call) -> list[ChannelIds]:
    """Scale each channel (ConvNeXt's LayerScale)."""
    vector = call.along()
    call.note("scales", vector)
    call.weight(call.layer.gamma, vector)
    call.field("projection_dim", vector)
    return [call.inputs[0]]


def softmax(call: Call) -> list[ChannelIds]:
    """Keep the channels that are weighed against each other; other axes do not matter."""
    ids = call.inputs[0]
    axes = call.layer.axis if isinstance(call.layer.axis, (list, tuple)) else [call.layer.axis]
    if any(ids.shape[_own_axis(a, call)] > 1 for a in axes):
        call.pin(ids, "weighs its channels against each other (softmax)")
    return [ids]


def plain_activation(call: Call) -> list[ChannelIds]:
    """Apply a function to each value; softmax is none of these."""
    return [activation(call, call.inputs[0])]


def fixed(reason: str) -> Handler:
    """Return a handler for layers whose channels must all stay."""
    return lambda call: call.unknown(reason)


def weighted_handlers() -> dict[type, Handler]:
    """Return the handlers of this module by layer class."""
    kinds = tf_keras.layers
    convolutions: dict[type, Handler] = dict.fromkeys((kinds.Conv1D, kinds.Conv2D, kinds.Conv3D), convolution)
    transposed = dict.fromkeys(
        (kinds.Conv1DTranspose, kinds.Conv2DTranspose, kinds.Conv3DTranspose), transposed_convolution
    )
    return {
        **convolutions,
        **transposed,
        kinds.Dense: dense,
        kinds.DepthwiseConv1D: depthwise_convolution,
        kinds.DepthwiseConv2D: depthwise_convolution,
        kinds.SeparableConv1D: separable_convolution,
        kinds.SeparableConv2D: separable_convolution,
        kinds.BatchNormalization: batch_normalization,
        kinds.LayerNormalization: layer_normalization,
        kinds.GroupNormalization: group_normalization,
        kinds.Embedding: embedding,
        LayerScale: layer_scale,
        kinds.PReLU: prelu,
        kinds.Softmax: softmax,
        kinds.Activation: plain_activation,
        kinds.Normalization: fixed("its statistics belong to the input"),
        UnitNormalization: fixed("it normalises over its channels"),
        kinds.Lambda: fixed("nobody knows what a Lambda does"),
    }
