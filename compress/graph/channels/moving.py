"""What layers that move or join values do with channels: Reshape, Concatenate, Add, attention, recurrent layers, ..."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras.src.applications.inception_resnet_v2 import CustomScaleLayer

from compress.graph.channels.trace import NONE, Call, ChannelIds, Handler, Kept, handle, is_tensor, pass_on
from compress.graph.channels.weighted import activation

Shape = Sequence[int | None]
OWN_NUMBERS = "it calculates with an array that belongs to certain channels"


def has_own_numbers(call: Call, most: int = 1) -> bool:
    """Say whether an argument holds more than ``most`` numbers in an array or a list, which no cut would follow."""
    for value in (*call.args, *call.kwargs.values()):
        own = [leaf for leaf in tf.nest.flatten(value) if leaf is not None and not is_tensor(leaf)]
        if not np.isscalar(value) and sum(int(np.size(leaf)) for leaf in own) > most:
            return True
    return False


def elementwise(call: Call) -> list[ChannelIds]:
    """Join tensors value by value, with broadcasting: corresponding channels are the same."""
    if has_own_numbers(call):
        return call.unknown(OWN_NUMBERS)
    rank = len(call.output_shapes[0])
    shape = call.output_shapes[0]
    aligned = [_aligned(ids, given, rank) for ids, given in zip(call.inputs, call.input_shapes, strict=True)]
    # A tensor that has no channels (or a single one for all) says nothing about the others' channels.
    voices = [(ids, given) for ids, given in aligned if not _is_broadcast(ids, given, shape, [i for i, _ in aligned])]
    if not voices:
        return [np.full([1] * rank, NONE)]
    first = max((ids for ids, _ in voices), key=lambda ids: ids.size)
    for ids, _ in voices:
        if ids is not first:
            call.tie(ids, first)
    return [first]


def _aligned(ids: ChannelIds, shape: Shape, rank: int) -> tuple[ChannelIds, tuple[int | None, ...]]:
    missing = rank - ids.ndim
    return ids.reshape((1,) * missing + ids.shape), (1,) * missing + tuple(shape)


def _is_broadcast(ids: ChannelIds, given: Shape, shape: Shape, every: Sequence[ChannelIds]) -> bool:
    """Say whether a tensor without channels of its own is spread over the channels of others."""
    varied = [axis for axis in range(ids.ndim) if any(other.shape[axis] > 1 for other in every)]
    return ids.size == 1 and bool(varied) and all(given[axis] == 1 != shape[axis] for axis in varied)


def concatenate(call: Call) -> list[ChannelIds]:
    """Put tensors side by side."""
    rank = len(call.output_shapes[0])
    axis = call.layer.axis % (rank + 1) - 1
    if axis < 0:
        return call.unknown("it joins along the batch")
    if has_own_numbers(call, 0):
        return call.unknown(OWN_NUMBERS)
    return [joined(call, call.inputs, call.input_shapes, axis)]


def joined(call: Call, parts: Sequence[ChannelIds], shapes: Sequence[Shape], axis: int) -> ChannelIds:
    """Return the ids of tensors put side by side along ``axis``."""
    if all(ids.shape[axis] == 1 for ids in parts) and any(ids.size > 1 for ids in parts):
        # Along time or space: every part has the same channels.
        first = max(parts, key=lambda ids: ids.size)
        for ids in parts:
            if ids is not first:
                call.tie(ids, first)
        return first
    widths = [size for shape in shapes if (size := shape[axis]) is not None]
    if len(widths) < len(shapes):
        return call.unknown("it joins tensors of open size")[0]
    rank = parts[0].ndim
    full = [max(ids.shape[a] for ids in parts) for a in range(rank)]
    whole = [
        np.broadcast_to(ids, [*full[:axis], width, *full[axis + 1 :]]) for ids, width in zip(parts, widths, strict=True)
    ]
    result = np.concatenate(whole, axis)
    call.note("puts side by side", result)
    return result


def moved(call: Call, full: ChannelIds) -> ChannelIds:
    """Return ids in their shortest form; where they vary along several axes, all but the last are tied."""
    varying = []
    for axis in range(full.ndim):
        if (full == full.take([0], axis)).all():
            full = full.take([0], axis)
        else:
            varying.append(axis)
    for axis in varying[:-1]:
        first = full.take([0], axis)
        call.tie(full, first, f"needs equally many in each of {full.shape[axis]} blocks:")
        full = first
    return full


def reshaped(call: Call, ids: ChannelIds, before: Shape, after: Shape) -> ChannelIds:
    """Return the ids of a tensor that is laid out anew."""
    if tuple(before) == tuple(after):
        return ids
    sizes = [size for shape in (before, after) for size in shape]
    if None in sizes or np.prod([size or 1 for size in before]) != np.prod([size or 1 for size in after]):
        only_last = all(size == 1 for size in ids.shape[:-1])
        if only_last and before and after and before[-1] == after[-1]:
            return ids.reshape([1] * (len(after) - 1) + [-1])
        return call.unknown("it lays out a tensor of open size, or the batch, anew")[0]
    known = [int(size or 1) for size in before]
    return moved(call, np.broadcast_to(ids, known).reshape([int(size or 1) for size in after]))


def reshape(call: Call) -> list[ChannelIds]:
    """Lay values out anew; the target shape follows the cut."""
    result = reshaped(call, call.inputs[0], call.input_shapes[0], call.output_shapes[0])
    shape = call.output_shapes[0]

    def edit(config: dict[str, Any], kept: Kept) -> None:
        # What Keras works out for each call (-1) it works out after the cut, too.
        sizes = zip(config["target_shape"], kept.shape(result, shape), strict=True)
        config["target_shape"] = [-1 if given == -1 or size is None else size for given, size in sizes]

    call.edit_config(edit)
    return [result]


def flatten(call: Call) -> list[ChannelIds]:
    """Lay all values out in one row."""
    if call.layer.data_format == "channels_first" and len(call.input_shapes[0]) > 1:
        return call.unknown("it flattens with channels first")
    return [reshaped(call, call.inputs[0], call.input_shapes[0], call.output_shapes[0])]


def permute(call: Call) -> list[ChannelIds]:
    """Change the order of the axes."""
    return [call.inputs[0].transpose([axis - 1 for axis in call.layer.dims])]


def repeat_vector(call: Call) -> list[ChannelIds]:
    """Repeat along a new first axis."""
    return [call.inputs[0][None]]


def masking(call: Call) -> list[ChannelIds]:
    """Leave out the steps at which all channels have one value."""
    return call.unknown("it looks at all channels to tell which steps count")


def windowed(call: Call) -> list[ChannelIds]:
    """Do something along space or time, the same to every channel."""
    axis = 0 if getattr(call.layer, "data_format", "") == "channels_first" else -1
    ids = call.inputs[0]
    if ids.size != ids.shape[axis]:
        return call.unknown("its windows lie along channels")
    return pass_on(call)


def rescaling(call: Call) -> list[ChannelIds]:
    """Scale and shift, each channel by numbers of its own where these are given."""
    numbers = {name: np.asarray(getattr(call.layer, name)) for name in ("scale", "offset")}
    if any(value.size > 1 for value in numbers.values()):
        vector = call.along()
        if any(value.size not in (1, vector.size) for value in numbers.values()):
            return call.unknown(OWN_NUMBERS)

        def edit(config: dict[str, Any], kept: Kept) -> None:
            left = kept.of(vector)
            config.update({name: value.reshape(-1)[left].tolist() for name, value in numbers.items() if value.size > 1})

        call.edit_config(edit)
    return [call.inputs[0]]


def global_pooling(call: Call) -> list[ChannelIds]:
    """Leave one value of each channel."""
    axis = 0 if call.layer.data_format == "channels_first" else -1
    vector = call.only_along(call.inputs[0], axis)
    return [call.spread(vector, axis if call.layer.keepdims else -1)]


def dot(call: Call) -> list[ChannelIds]:
    """Sum products along an axis of each of two tensors."""
    return call.unknown("it multiplies two tensors with each other")


def attention(call: Call) -> list[ChannelIds]:
    """Weigh values by products of queries and keys: channels of queries and keys are summed up together."""
    if getattr(call.layer, "scale", None) is not None or call.layer.weights:
        return call.unknown("an attention layer with weights")
    query, value = call.inputs[0], call.inputs[1]
    key = call.inputs[2] if len(call.inputs) > 2 else value
    if len(call.inputs) > 3:
        return call.unknown("an attention layer with masks")
    call.tie(call.only_along(query, -1), call.only_along(key, -1))
    call.mixes(0)
    outputs = [call.spread(call.only_along(value, -1))]
    return outputs + [np.full([1] * len(shape), NONE) for shape in call.output_shapes[1:]]


def multi_head_attention(call: Call) -> list[ChannelIds]:
    """Heads go as a whole; the sizes of keys and values within a head stay."""
    layer = call.layer
    names = ("query", "value", "key")
    given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    masked = len(call.args) > len(names) or any(is_tensor(given[name]) for name in given if name not in names)
    if masked or len(call.output_shapes) > 1:
        return call.unknown("masks and scores of attention are not traced")
    if len(layer._output_dense.kernel.shape) != 3:
        return call.unknown("its outputs have channels along several axes")
    query, value = (call.inputs[call.position(given[name])] for name in names[:2])
    key = value if given.get("key") is None else call.inputs[call.position(given["key"])]
    heads = call.write(layer._num_heads)
    dense = {"query": query, "key": key, "value": value}
    for name, ids in dense.items():
        part = getattr(layer, f"_{name}_dense")
        call.weight(part.kernel, call.only_along(ids, -1), heads, None, reads=0)
        call.weight(part.bias, heads, None)
    written = call.write(call.output_shapes[0][-1] or 1)
    call.weight(layer._output_dense.kernel, heads, None, written, reads=0, within=True)
    call.weight(layer._output_dense.bias, written)

    def edit(config: dict[str, Any], kept: Kept) -> None:
        config.update(num_heads=kept.count(heads), output_shape=[kept.count(written)])
        for name, ids in dense.items():
            # The shapes that the layer was built with.
            shape = list(config.get(f"{name}_shape") or [None, None, 1])
            config[f"{name}_shape"] = tf.TensorShape([*shape[:-1], kept.count(call.only_along(ids, -1))])

    call.edit_config(edit)
    for position in range(len(call.inputs)):
        call.mixes(position)
    return [call.spread(written)]


def recurrent(call: Call, configured: bool = True) -> list[ChannelIds]:
    """Units of LSTM, GRU and SimpleRNN: each has its column in every gate.

    ``configured``: the layer has a configuration of its own, which counts the units.
    """
    cell = getattr(call.layer, "cell", None)
    if cell is None or not hasattr(cell, "recurrent_kernel") or len(call.inputs) > 1:
        return call.unknown("a recurrent layer with several cells or a given state")
    read, written = call.along(), activation(call, call.write(cell.units))
    gates = np.tile(written, cell.kernel.shape[1] // cell.units)
    call.weight(cell.kernel, read, gates, reads=0)
    call.weight(cell.recurrent_kernel, written, gates, reads=0, within=True)
    if cell.use_bias:
        call.weight(cell.bias, *([None] * (len(cell.bias.shape) - 1)), gates)
    if configured:
        call.field("units", written)
    call.mixes()
    return [call.spread(written, output=index) for index in range(len(call.output_shapes))]


def bidirectional(call: Call) -> list[ChannelIds]:
    """Two recurrent layers of one size, one of them backwards."""
    layer, half = call.layer, call.output_shapes[0]
    if layer.return_state or layer.merge_mode is None:
        return call.unknown("a bidirectional layer that returns several tensors")
    units = layer.forward_layer.cell.units
    inner = [(*half[:-1], units)]
    forward = recurrent(call.within(layer.forward_layer, ("layer", "config"), output_shapes=inner))[0]
    other = call.within(layer.backward_layer, ("backward_layer", "config"), output_shapes=inner)
    backward = recurrent(other, configured="backward_layer" in layer.get_config())[0]
    call.tie(forward, backward, "needs as many forwards as backwards:")
    if layer.merge_mode == "concat":
        return [np.concatenate([forward, backward], -1)]
    return [forward]


def time_distributed(handlers: dict[type, Handler]) -> Handler:
    """Return the handler of a wrapper that applies a layer to every step."""

    def wrapped(call: Call) -> list[ChannelIds]:
        if isinstance(call.layer.layer, (tf_keras.layers.LayerNormalization, tf_keras.layers.GroupNormalization)):
            return call.unknown("a normalisation over channels at every step")
        inner = call.within(
            call.layer.layer,
            ("layer", "config"),
            inputs=[_one_step(call, ids) for ids in call.inputs],
            input_shapes=[shape[1:] for shape in call.input_shapes],
            output_shapes=[shape[1:] for shape in call.output_shapes],
        )
        return [ids[None] for ids in handle(inner, handlers)]

    return wrapped


def _one_step(call: Call, ids: ChannelIds) -> ChannelIds:
    """Return the ids of a single time step: they are those of every step."""
    if len(ids) > 1:
        call.tie(ids[1:], ids[:1])
    return ids[0]


def moving_handlers(others: dict[type, Handler]) -> dict[type, Handler]:
    """Return the handlers of this module by layer class; ``others`` handle what is wrapped."""
    kinds = tf_keras.layers
    joining = (kinds.Add, kinds.Subtract, kinds.Multiply, kinds.Average, kinds.Maximum, kinds.Minimum)
    pooling = (
        *(kinds.GlobalAveragePooling1D, kinds.GlobalAveragePooling2D, kinds.GlobalAveragePooling3D),
        *(kinds.GlobalMaxPooling1D, kinds.GlobalMaxPooling2D, kinds.GlobalMaxPooling3D),
    )
    windows = (
        *(kinds.MaxPooling1D, kinds.MaxPooling2D, kinds.MaxPooling3D, kinds.ZeroPadding1D, kinds.ZeroPadding2D),
        *(kinds.AveragePooling1D, kinds.AveragePooling2D, kinds.AveragePooling3D, kinds.ZeroPadding3D),
        *(kinds.UpSampling1D, kinds.UpSampling2D, kinds.UpSampling3D, kinds.Cropping1D, kinds.Cropping2D),
        kinds.Resizing,
    )
    along: dict[type, Handler] = dict.fromkeys(windows, windowed)
    table: dict[type, Handler] = {
        **along,
        kinds.Masking: masking,
        kinds.Rescaling: rescaling,
        **dict.fromkeys(joining, elementwise),
        **dict.fromkeys(pooling, global_pooling),
        **dict.fromkeys((kinds.LSTM, kinds.GRU, kinds.SimpleRNN), recurrent),
        CustomScaleLayer: elementwise,
        kinds.Concatenate: concatenate,
        kinds.Reshape: reshape,
        kinds.Flatten: flatten,
        kinds.Permute: permute,
        kinds.RepeatVector: repeat_vector,
        kinds.Dot: dot,
        kinds.Attention: attention,
        kinds.MultiHeadAttention: multi_head_attention,
        kinds.Bidirectional: bidirectional,
    }
    table[kinds.TimeDistributed] = time_distributed({**others, **table})
    return table
