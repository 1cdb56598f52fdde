"""Traces channels through a flat model: every tensor's channels get identities, and layers tie them together.

A tensor's channels are an integer array of *ids* in the tensor's shape without the batch: size 1 along an axis on
which nothing changes (height, width, time), the full size along the channel axis. ``NONE`` marks what is no channel.
Layers say which ids they read and write, along which axes of which weights, and which ids are one and the same channel;
the connected components of these ties are the units that stay or go as one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from compress.graph.rewrite import nodes, require_functional

ChannelIds = np.ndarray
NONE = -1

ConfigEdit = Callable[[dict[str, Any], "Kept"], None]
"""Changes the configuration of a layer so that it fits the channels that are left."""
CallEdit = Callable[[list[Any], dict[str, Any], "Kept"], None]
"""The same for the literal arguments of a call."""


@dataclass(frozen=True)
class Kept:
    """Which channels stay: ``mask`` [ids] says it of every id."""

    mask: np.ndarray

    def of(self, ids: ChannelIds) -> np.ndarray:
        """Return booleans of the shape of ``ids``; what is no channel stays."""
        left: np.ndarray = np.where(ids == NONE, True, self.mask[ids])
        return left

    def count(self, ids: ChannelIds) -> int:
        """Return how many of ``ids`` stay."""
        return int(self.of(ids).sum())

    def shape(self, ids: ChannelIds, shape: Sequence[int | None]) -> list[int | None]:
        """Return the shape of a tensor after the cut; ``ids`` and ``shape`` are those before."""
        left = self.of(ids)
        result: list[int | None] = []
        for axis, size in enumerate(shape):
            others = tuple(a for a in range(ids.ndim) if a != axis)
            result.append(size if ids.shape[axis] == 1 and size != 1 else int(left.any(axis=others).sum()))
        return result


@dataclass(frozen=True)
class WeightChannels:
    """A weight variable and, for each of its axes, the ids along it (None: the axis holds no channels)."""

    layer: str
    index: int
    """Position in ``layer.weights``."""
    attribute: str
    trainable: bool
    axes: tuple[ChannelIds | None, ...]
    reads: int | None
    """The axis along which channels are summed up, if any."""
    within: bool = False
    """Whether these are channels of the layer's own, as the state of a recurrent layer, and not of its input."""


@dataclass(frozen=True)
class Event:
    """Something that a layer does with channels, for :meth:`Group.describe`."""

    layer: str
    verb: str
    ids: ChannelIds


@dataclass(frozen=True)
class Mixing:
    """A call whose result depends on all channels of an input: the oracle masks that input, or the statistics."""

    input: int
    ids: ChannelIds
    normalises: bool = False


@dataclass(frozen=True)
class CallKey:
    """One call of a layer of the flat model: ``index`` counts the calls of that layer."""

    layer: str
    index: int


@dataclass
class Trace:
    """Everything that a walk through the model has found out about channels."""

    count: int = 0
    ties: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    pins: list[tuple[np.ndarray, str]] = field(default_factory=list)
    weights: dict[tuple[str, int], WeightChannels] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    config_edits: dict[str, list[ConfigEdit]] = field(default_factory=dict)
    call_edits: dict[CallKey, list[CallEdit]] = field(default_factory=dict)
    mixing: dict[CallKey, list[Mixing]] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)
    """Layer -> why the channels that it touches stay."""
    tensors: dict[int, ChannelIds] = field(default_factory=dict)
    first_edits: dict[str, tuple[int, list[ChannelIds]]] = field(default_factory=dict)
    """Layer whose configuration changes -> the first of its calls that says so, and the inputs of that."""

    def fresh(self, count: int) -> ChannelIds:
        """Return ``count`` new ids."""
        self.count += count
        return np.arange(self.count - count, self.count)

    def tie(self, one: ChannelIds, other: ChannelIds) -> None:
        """Say that corresponding ids (after broadcasting) are the same channel. What is tied to no channel stays."""
        first, second = (side.ravel() for side in np.broadcast_arrays(one, other))
        real = (first != NONE) & (second != NONE)
        self.ties.append((first[real], second[real]))
        alone = np.concatenate([first[(second == NONE) & (first != NONE)], second[(first == NONE) & (second != NONE)]])
        if alone.size:
            self.pins.append((alone, "joined with something that is no channel"))

    def pin(self, ids: ChannelIds, reason: str) -> None:
        """Say that these channels must stay."""
        flat = np.unique(ids)
        self.pins.append((flat[flat != NONE], reason))


@dataclass
class Call:
    """One call of a layer while its channels are traced: what a handler works with."""

    trace: Trace
    key: CallKey
    outer: tf_keras.layers.Layer
    """The outermost layer: it owns the weights."""
    layer: tf_keras.layers.Layer
    """The layer that a handler looks at: the same, or one inside a wrapper."""
    inputs: list[ChannelIds]
    input_shapes: list[tuple[int | None, ...]]
    output_shapes: list[tuple[int | None, ...]]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    path: tuple[str, ...] = ()
    """Where the layer's configuration lies within that of the outermost layer (wrappers)."""

    @property
    def name(self) -> str:
        """Name of the outermost layer."""
        return self.key.layer

    def position(self, tensor: Any) -> int:
        """Return which of the inputs a tensor among the arguments is."""
        given = [value for value in tf.nest.flatten((self.args, dict(self.kwargs))) if is_tensor(value)]
        return next(index for index, value in enumerate(given) if value is tensor)

    def along(self, position: int = 0, axis: int = -1) -> ChannelIds:
        """Return the ids of input ``position`` along ``axis`` as a vector; what varies on other axes is tied."""
        ids, size = self.inputs[position], self.input_shapes[position][axis]
        vector = self.only_along(ids, axis)
        if vector.size == 1 and size not in (1, None):
            vector = np.repeat(vector, int(size or 1))
        return vector

    def only_along(self, ids: ChannelIds, axis: int) -> ChannelIds:
        """Tie ``ids`` along every axis but ``axis``; return what is left as a vector."""
        moved: np.ndarray = np.moveaxis(ids, axis, -1).reshape(-1, ids.shape[axis])
        if len(moved) > 1:
            self.trace.tie(moved[1:], moved[:1])
        return moved[0]

    def spread(self, vector: ChannelIds, axis: int = -1, output: int = 0) -> ChannelIds:
        """Return the ids of an output whose channels ``vector`` lie along ``axis``."""
        shape = [1] * len(self.output_shapes[output])
        shape[axis] = vector.size
        return vector.reshape(shape)

    def write(self, count: int) -> ChannelIds:
        """Return new ids that this layer makes."""
        ids = self.trace.fresh(count)
        self.note("writes", ids)
        return ids

    def note(self, verb: str, ids: ChannelIds) -> None:
        """Remember what the layer does with ``ids``."""
        self.trace.events.append(Event(self.name, verb, ids))

    def tie(self, one: ChannelIds, other: ChannelIds, verb: str = "joins") -> None:
        """Say that ``one`` and ``other`` are the same channels."""
        self.trace.tie(one, other)
        self.note(verb, np.concatenate([one.ravel(), other.ravel()]))

    def tie_blocks(self, vector: ChannelIds, blocks: int) -> ChannelIds:
        """Tie the channels at the same place of equal ``blocks``; return the first block."""
        table: np.ndarray = vector.reshape(blocks, -1)
        if blocks > 1:
            self.tie(table[1:], table[:1], f"needs equally many in each of {blocks} blocks:")
        return table[0]

    def pin(self, ids: ChannelIds, reason: str) -> None:
        """Say that ``ids`` must stay."""
        self.trace.pin(ids, f"{self.name} {reason}")

    def weight(self, variable: Any, *axes: ChannelIds | None, reads: int | None = None, within: bool = False) -> None:
        """Say which ids lie along the axes of a weight.

        ``reads``: the axis that sums over channels: of the input or, if ``within``, of the layer's own.
        """
        if variable is None:
            return
        if len(axes) != len(variable.shape):
            # Left undescribed, so all that the layer touches stays.
            for ids in axes:
                if ids is not None:
                    self.pin(
                        ids, f"({type(self.layer).__name__}): its handler knows {len(axes)} axes of {variable.name}"
                    )
            return
        index = next(i for i, weight in enumerate(self.outer.weights) if weight is variable)
        before = self.trace.weights.get((self.name, index))
        if before is None:
            own = (name for name in _ATTRIBUTES if getattr(self.outer, name, None) is variable)
            attribute = next(own, variable.name.rpartition("/")[2].split(":")[0])
            self.trace.weights[self.name, index] = WeightChannels(
                self.name, index, attribute, bool(variable.trainable), axes, reads, within
            )
            return
        # A layer called again: the same entries of its weights, so the same channels.
        for one, other in zip(before.axes, axes, strict=True):
            if one is not None and other is not None:
                self.trace.tie(one, other)

    def field(self, name: str, ids: ChannelIds) -> None:
        """Say that the configuration's ``name`` counts ``ids``."""
        self.edit_config(lambda config, kept: config.update({name: kept.count(ids)}))

    def edit_config(self, edit: ConfigEdit) -> None:
        """Have the layer's configuration changed when channels are cut."""

        def inner(config: dict[str, Any], kept: Kept) -> None:
            for part in self.path:
                config = config[part]
            edit(config, kept)

        first_call, inputs = self.trace.first_edits.setdefault(self.name, (self.key.index, self.inputs))
        if self.key.index == first_call:
            self.trace.config_edits.setdefault(self.name, []).append(inner)
        elif not self.outer.weights:
            # No weights tie the calls; the one configuration does.
            for ids, first in zip(self.inputs, inputs, strict=True):
                if ids.shape == first.shape:
                    self.tie(ids, first, "is called again on")
                else:
                    self.pin(ids, "is called on inputs of several shapes")
                    self.pin(first, "is called on inputs of several shapes")

    def edit_call(self, edit: CallEdit) -> None:
        """Have the literal arguments of this call changed when channels are cut."""
        self.trace.call_edits.setdefault(self.key, []).append(edit)

    def mixes(self, position: int = 0, *, normalises: bool = False) -> None:
        """Say that every output depends on all channels of input ``position``."""
        ids = self.inputs[position]
        self.trace.mixing.setdefault(self.key, []).append(Mixing(position, ids, normalises))
        self.note("normalises over" if normalises else "reads", ids)

    def within(self, layer: tf_keras.layers.Layer, path: Sequence[str], **changes: Any) -> Call:
        """Return the call as the inner ``layer`` of a wrapper sees it."""
        return replace(self, layer=layer, path=(*self.path, *path), **changes)

    def unknown(self, reason: str) -> list[ChannelIds]:
        """Keep all channels that this call touches, and say why; its outputs hold no channels to cut."""
        for ids in self.inputs:
            self.pin(ids, f"({type(self.layer).__name__}): {reason}")
        self.trace.unsupported.setdefault(self.name, reason)
        return [np.full([1] * len(shape), NONE) for shape in self.output_shapes]


Handler = Callable[[Call], list[ChannelIds]]
"""Says of one call what it does with channels; returns the ids of its outputs."""


_ATTRIBUTES = (
    *("kernel", "bias", "depthwise_kernel", "pointwise_kernel", "embeddings"),
    *("gamma", "beta", "moving_mean", "moving_variance", "alpha"),
)


def trace_channels(model: tf_keras.Model, handlers: Mapping[type, Handler]) -> Trace:
    """Walk through the flat ``model`` and return what is known of its channels.

    ``handlers``: layer class -> handler; the nearest class in a layer's inheritance counts, and its own
    ``trace_channels``, if it has one, comes first. A layer without weights and without a handler passes channels on.

    Raises:
        CompressError: if the model has no graph of layers.
    """
    require_functional(model)
    trace = Trace()
    for tensor in model.inputs:
        ids = trace.fresh(tensor.shape[-1] or 1) if tensor.shape.rank > 1 else np.array(NONE)
        trace.pin(ids, "an input of the model")
        trace.tensors[id(tensor)] = ids.reshape([1] * max(0, tensor.shape.rank - 2) + [-1] * (tensor.shape.rank > 1))
    times: dict[str, int] = {}
    for node in nodes(model):
        name = node.layer.name
        if node.is_input:
            continue
        inputs = node.keras_inputs
        call = Call(
            trace,
            CallKey(name, times.get(name, 0)),
            node.layer,
            node.layer,
            [trace.tensors[id(tensor)] for tensor in inputs],
            [_shape(tensor) for tensor in inputs],
            [_shape(tensor) for tensor in tf.nest.flatten(node.outputs)],
            node.call_args,
            node.call_kwargs,
        )
        times[name] = call.key.index + 1
        outputs = handle(call, handlers)
        _pin_undescribed(call)
        for tensor, ids in zip(tf.nest.flatten(node.outputs), outputs, strict=True):
            trace.tensors[id(tensor)] = ids
    for tensor in model.outputs:
        trace.pin(trace.tensors[id(tensor)], "an output of the model")
    return trace


def _pin_undescribed(call: Call) -> None:
    """Keep all channels of a layer that has a weight of which its handler knows nothing."""
    described = {index for name, index in call.trace.weights if name == call.name}
    if not described or call.name in call.trace.unsupported:
        return
    for index, weight in enumerate(call.outer.weights):
        if index not in described and np.prod(weight.shape) > 1:
            reason = f"no handler knows its weight {weight.name.rpartition('/')[2].split(':')[0]}"
            call.unknown(reason)
            for (name, _), held in call.trace.weights.items():
                if name == call.name:
                    for ids in held.axes:
                        call.pin(np.array([NONE]) if ids is None else ids, f"({type(call.layer).__name__}): {reason}")


def handle(call: Call, handlers: Mapping[type, Handler]) -> list[ChannelIds]:
    """Return the ids of the call's outputs by the handler that is responsible for it."""
    for kind in type(call.layer).__mro__:
        if "trace_channels" in vars(kind):
            return list(call.layer.trace_channels(call))
        if kind in handlers:
            return handlers[kind](call)
    if call.layer.weights:
        return call.unknown("no handler knows its weights")
    return pass_on(call)


def is_tensor(value: Any) -> bool:
    """Say whether an argument is a tensor of the model and no literal."""
    return hasattr(value, "_keras_history")


def pass_on(call: Call) -> list[ChannelIds]:
    """Handle a layer that does the same to every channel and moves none: the default for layers without weights."""
    if len(call.inputs) != 1 or len(call.output_shapes) != 1:
        return call.unknown("no handler knows what it does with several tensors")
    ids, before, after = call.inputs[0], call.input_shapes[0], call.output_shapes[0]
    same_axes = len(before) == len(after) and all(
        ids.shape[axis] == 1 or before[axis] == after[axis] for axis in range(len(before))
    )
    if not same_axes:
        return call.unknown(f"it makes {after} of {before}, and no handler knows how")
    return [ids]


def _shape(tensor: Any) -> tuple[int | None, ...]:
    return tuple(tensor.shape)[1:]
