"""What TensorFlow functions in a model (``TFOpLambda``, ``SlicingOpLambda``) do with channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tf_keras.src.layers.core.tf_op_layer import SlicingOpLambda, TFOpLambda

from compress.graph.channels.moving import OWN_NUMBERS, elementwise, has_own_numbers, joined, reshaped
from compress.graph.channels.trace import NONE, Call, ChannelIds, Handler, Kept, is_tensor, pass_on

_UNARY = frozenset(
    (
        *("__operators__.abs", "__operators__.neg", "abs", "cast", "clip_by_value"),
        *("compat.v1.clip_by_value", "compat.v1.image.resize", "identity", "image.resize"),
        *("keras.activations.elu", "keras.activations.gelu", "keras.activations.hard_sigmoid"),
        *("keras.activations.linear", "keras.activations.relu", "keras.activations.selu"),
        *("keras.activations.sigmoid", "keras.activations.swish", "keras.activations.tanh"),
        *("keras.backend.relu", "keras.backend.sigmoid", "math.abs", "math.ceil", "math.cos", "math.erf"),
        *("math.exp", "math.floor", "math.log", "math.log1p", "math.negative", "math.reciprocal"),
        *("math.round", "math.rsqrt", "math.sigmoid", "math.sign", "math.sin", "math.softplus", "math.sqrt"),
        *("math.square", "math.tanh", "nn.avg_pool", "nn.avg_pool2d", "nn.dropout", "nn.elu", "nn.gelu"),
        *("nn.leaky_relu", "nn.max_pool", "nn.max_pool2d", "nn.relu", "nn.relu6", "nn.selu", "nn.silu"),
        *("nn.softplus", "nn.softsign", "nn.swish", "sigmoid", "round", "sign", "stop_gradient", "tanh"),
    )
)
_BINARY = frozenset(
    (
        *("__operators__.add", "__operators__.mul", "__operators__.pow", "__operators__.radd"),
        *("__operators__.rmul", "__operators__.rpow", "__operators__.rsub", "__operators__.rtruediv"),
        *("__operators__.sub", "__operators__.truediv", "compat.v1.div", "math.add", "math.add_n"),
        *("math.divide", "math.divide_no_nan", "math.maximum", "math.minimum", "math.multiply", "math.pow"),
        *("math.squared_difference", "math.subtract", "math.truediv"),
    )
)
_REDUCTIONS = frozenset(
    (
        *("compat.v1.reduce_max", "compat.v1.reduce_mean", "compat.v1.reduce_min", "compat.v1.reduce_sum"),
        *("keras.backend.mean", "math.reduce_max", "math.reduce_mean", "math.reduce_min", "math.reduce_std"),
        *("math.reduce_sum", "math.reduce_variance"),
    )
)


def operation(call: Call) -> list[ChannelIds]:
    """Handle a TensorFlow function by its name."""
    name = call.layer.symbol
    if name in _UNARY:
        limits = name.endswith("clip_by_value") and has_own_numbers(call)
        return call.unknown(OWN_NUMBERS) if limits else pass_on(call)
    if name in _BINARY:
        return elementwise(call)
    if name in _REDUCTIONS:
        return _reduction(call)
    handler = _OTHERS.get(name)
    return handler(call) if handler else call.unknown(f"no handler knows tf.{name}")


def _argument(call: Call, position: int, *names: str, default: Any = None) -> Any:
    for name in names:
        if call.kwargs.get(name) is not None:
            return call.kwargs[name]
    value = call.args[position] if position < len(call.args) else None
    return default if value is None else value


def _set(args: list[Any], kwargs: dict[str, Any], position: int, name: str, value: Any) -> None:
    if kwargs.get(name) is not None or position >= len(args):
        kwargs[name] = value
    else:
        args[position] = value


def _reduction(call: Call) -> list[ChannelIds]:
    ids, rank = call.inputs[0], len(call.input_shapes[0])
    axis = _argument(call, 1, "axis", "reduction_indices")
    keep = bool(_argument(call, 2, "keepdims", "keep_dims", default=False))
    if axis is None:
        return call.unknown("it reduces over everything")
    axes = {int(a) % (rank + 1) - 1 for a in np.ravel(axis)}
    if -1 in axes or any(ids.shape[a] > 1 for a in axes):
        return call.unknown("it reduces over channels")
    return [ids if keep else ids.reshape([size for a, size in enumerate(ids.shape) if a not in axes])]


def _concat(call: Call) -> list[ChannelIds]:
    axis = int(_argument(call, 1, "axis", default=0)) % (len(call.output_shapes[0]) + 1) - 1
    if axis < 0:
        return call.unknown("it joins along the batch")
    if has_own_numbers(call, 0):
        return call.unknown(OWN_NUMBERS)
    return [joined(call, call.inputs, call.input_shapes, axis)]


def _reshape(call: Call) -> list[ChannelIds]:
    result = reshaped(call, call.inputs[0], call.input_shapes[0], call.output_shapes[0])
    shape = call.output_shapes[0]

    def edit(args: list[Any], kwargs: dict[str, Any], kept: Kept) -> None:
        # What the model calculates itself (the batch) stays as it is.
        known = [-1, *[-1 if size is None else size for size in kept.shape(result, shape)]]
        given = kwargs["shape"] if kwargs.get("shape") is not None else args[1]
        fresh = [g if is_tensor(g) else k for g, k in zip(list(given), known, strict=True)]
        _set(args, kwargs, 1, "shape", fresh)

    call.edit_call(edit)
    return [result]


def _transpose(call: Call) -> list[ChannelIds]:
    order = _argument(call, 1, "perm")
    if order is None or int(order[0]) != 0:
        return call.unknown("it moves the batch")
    return [call.inputs[0].transpose([int(axis) - 1 for axis in order[1:]])]


def _expand(call: Call) -> list[ChannelIds]:
    axis = int(_argument(call, 1, "axis")) % (len(call.output_shapes[0]) + 1) - 1
    return [np.expand_dims(call.inputs[0], axis)] if axis >= 0 else call.unknown("it moves the batch")


def _squeeze(call: Call) -> list[ChannelIds]:
    return [reshaped(call, call.inputs[0], call.input_shapes[0], call.output_shapes[0])]


def _split(call: Call) -> list[ChannelIds]:
    ids, rank = call.inputs[0], len(call.input_shapes[0])
    axis = int(_argument(call, 2, "axis", default=0)) % (rank + 1) - 1
    if axis < 0:
        return call.unknown("it splits the batch")
    if ids.shape[axis] == 1:
        return [ids for _ in call.output_shapes]
    bounds = np.cumsum([int(shape[axis] or 0) for shape in call.output_shapes])[:-1]
    parts = np.split(ids, bounds, axis)

    def edit(args: list[Any], kwargs: dict[str, Any], kept: Kept) -> None:
        sizes = [kept.shape(part, shape)[axis] for part, shape in zip(parts, call.output_shapes, strict=True)]
        _set(args, kwargs, 1, "num_or_size_splits", sizes)

    call.edit_call(edit)
    call.note("splits", ids)
    return parts


def _pad(call: Call) -> list[ChannelIds]:
    """New channels of zeros are channels, too: they may go with those that they are added to."""
    ids = call.inputs[0]
    paddings = np.asarray(_argument(call, 1, "paddings"))[1:]
    mode = str(_argument(call, 2, "mode", default="CONSTANT")).upper()
    zeros: list[tuple[ChannelIds, ChannelIds]] = []
    for axis, (before, after) in enumerate(paddings):
        first, last = np.zeros(0, np.int64), np.zeros(0, np.int64)
        if (before or after) and ids.shape[axis] > 1:
            if mode != "CONSTANT":
                return call.unknown("it pads channels with others")
            if max(ids.shape[:axis] + ids.shape[axis + 1 :], default=1) > 1:
                return call.unknown("it pads channels that lie along several axes")
            first, last = call.write(int(before)), call.write(int(after))
            ids = np.concatenate([first, np.ravel(ids), last]).reshape(
                [-1 if a == axis else 1 for a in range(ids.ndim)]
            )
        zeros.append((first, last))

    def edit(args: list[Any], kwargs: dict[str, Any], kept: Kept) -> None:
        cut = [[0, 0]]
        for (before, after), (first, last) in zip(paddings, zeros, strict=True):
            cut.append(
                [
                    kept.count(first) if first.size else int(before) * (not last.size),
                    kept.count(last) if last.size else int(after) * (not first.size),
                ]
            )
        _set(args, kwargs, 1, "paddings", cut)

    call.edit_call(edit)
    return [ids]


def _shape_of(call: Call) -> list[ChannelIds]:
    return [np.full([1] * len(shape), NONE) for shape in call.output_shapes]


def _softmax(call: Call) -> list[ChannelIds]:
    ids = call.inputs[0]
    axis = int(_argument(call, 1, "axis", default=-1)) % (len(call.input_shapes[0]) + 1) - 1
    if axis < 0 or ids.shape[axis] > 1:
        call.pin(ids, "weighs its channels against each other (softmax)")
    return [ids]


def _matmul(call: Call) -> list[ChannelIds]:
    """Sum over an axis of each: its channels are the same; those of the other axes are channels of the product."""
    if len(call.inputs) != 2 or min(ids.ndim for ids in call.inputs) < 2:
        return call.unknown("it multiplies two tensors with each other")
    turned = [
        bool(_argument(call, 2 + i, name, default=False)) for i, name in enumerate(("transpose_a", "transpose_b"))
    ]
    left, right = (ids.swapaxes(-1, -2) if turn else ids for ids, turn in zip(call.inputs, turned, strict=True))
    one_axis = all(max(ids.shape, default=1) == ids.size for ids in (left, right))
    outside = any(size > 1 for ids in (left, right) for size in ids.shape[:-2])
    single = any(ids.size == 1 and (ids != NONE).any() for ids in (left, right))
    if not one_axis or outside or single or (left.shape[-2] > 1 and right.shape[-1] > 1):
        return call.unknown("it multiplies two tensors with each other")
    if left.shape[-1] > 1 or right.shape[-2] > 1:
        call.tie(call.only_along(left, -1), call.only_along(right, -2))
        call.mixes(0 if left.shape[-1] > 1 else 1)
    rank = len(call.output_shapes[0])
    if left.shape[-2] > 1:
        return [call.spread(call.only_along(left, -2), rank - 2)]
    return [call.spread(call.only_along(right, -1))] if right.shape[-1] > 1 else [np.full([1] * rank, NONE)]


def slicing(call: Call) -> list[ChannelIds]:
    """Handle ``x[...]``: a range of channels stays a range; new axes and other axes do not matter."""
    if len(call.inputs) != 1:
        return call.unknown("it slices at places that the model calculates")
    given = _argument(call, 1, "slice_spec")
    # A model that was saved and loaded has a list.
    given = list(given) if isinstance(given, (tuple, list)) else [given]
    rank = len(call.input_shapes[0]) + 1
    if rank == 1:
        return _shape_of(call)
    missing = [_EVERYTHING] * (rank - sum(item is not None and item is not Ellipsis for item in given))
    place = given.index(Ellipsis) if Ellipsis in given else len(given)
    given[place : place + 1] = missing
    if given[0] is None:
        return call.unknown("it moves the batch")
    places = [index for index, item in enumerate(given) if item is not None]
    spec = [given[index] for index in places]
    if spec[0] != _EVERYTHING:
        return call.unknown("it slices the batch") if (call.inputs[0] != NONE).any() else _shape_of(call)
    ids = call.inputs[0]
    changed: dict[int, tuple[ChannelIds, ChannelIds]] = {}
    for axis in range(rank - 2, -1, -1):
        item = spec[axis + 1]
        if item == _EVERYTHING:
            continue
        if ids.shape[axis] == 1 and call.input_shapes[0][axis] != 1:
            if not isinstance(item, dict):
                ids = ids.take(0, axis)
            continue
        if not isinstance(item, dict):
            return call.unknown("it takes single channels")
        if item["step"] not in (None, 1):
            return call.unknown("it takes channels in steps")
        start, stop, _ = slice(item["start"], item["stop"]).indices(ids.shape[axis])
        vector = call.only_along(ids, axis)
        changed[places[axis + 1]] = (vector[:start], vector[start:stop])
        ids = ids.take(range(start, stop), axis)
    if changed:
        call.note("slices", ids)

        def edit(args: list[Any], kwargs: dict[str, Any], kept: Kept) -> None:
            fresh = list(given)
            for axis, (before, inside) in changed.items():
                first = kept.count(before)
                fresh[axis] = {"start": first, "stop": first + kept.count(inside), "step": None}
            _set(args, kwargs, 1, "slice_spec", tuple(fresh))

        call.edit_call(edit)
    left = [item for item in given if item is None or isinstance(item, dict)]
    return [np.expand_dims(ids, [axis - 1 for axis, item in enumerate(left) if item is None])]


_EVERYTHING = {"start": None, "stop": None, "step": None}

_OTHERS: dict[str, Callable[[Call], list[ChannelIds]]] = {
    "concat": _concat,
    "reshape": _reshape,
    "compat.v1.transpose": _transpose,
    "transpose": _transpose,
    "expand_dims": _expand,
    "squeeze": _squeeze,
    "compat.v1.squeeze": _squeeze,
    "split": _split,
    "pad": _pad,
    "compat.v1.pad": _pad,
    "compat.v1.shape": _shape_of,
    "shape": _shape_of,
    "linalg.matmul": _matmul,
    "nn.softmax": _softmax,
}


def operation_handlers() -> dict[type, Handler]:
    """Return the handlers of this module by layer class."""
    return {TFOpLambda: operation, SlicingOpLambda: slicing}
