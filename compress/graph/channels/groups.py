"""Groups: channels that must go together, found from a trace; what each costs and why it is one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import tf_keras
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from compress.graph.channels.handlers import default_handlers
from compress.graph.channels.trace import NONE, ChannelIds, Event, Handler, Kept, Trace, WeightChannels, trace_channels
from compress.graph.macs import weight_macs


@dataclass(frozen=True)
class IndexMap:
    """Where the units of a group lie along one axis of a weight: ``units[i]`` is the unit at place ``places[i]``.

    Units are counted within the group.
    """

    weight: WeightChannels
    axis: int
    places: np.ndarray
    units: np.ndarray

    @property
    def reads(self) -> bool:
        """Whether the weight sums over these channels (else it writes, scales or shifts them)."""
        return self.weight.reads == self.axis


@dataclass(frozen=True)
class Group:
    """Channels of one or several layers, coupled so that each *unit* stays or goes as a whole.

    A residual stage is one group: unit 3 is channel 3 of every convolution, normalisation and sum in it.
    """

    number: int
    units: np.ndarray
    """Labels of the units in :class:`Channels`."""
    members: tuple[IndexMap, ...]
    events: tuple[Event, ...]
    kept_because: str | None
    """Why none of it may go; None if it may."""

    def __len__(self) -> int:
        return len(self.units)

    @property
    def name(self) -> str:
        """The first layer that writes it."""
        writers = [event.layer for event in self.events if event.verb == "writes"]
        return writers[0] if writers else self.events[0].layer

    @property
    def writers(self) -> tuple[str, ...]:
        """The layers that write it, in order."""
        return tuple(dict.fromkeys(event.layer for event in self.events if event.verb == "writes"))

    @property
    def readers(self) -> tuple[str, ...]:
        """The layers that sum over it, in order."""
        return tuple(dict.fromkeys(member.weight.layer for member in self.members if member.reads))

    def describe(self) -> str:
        """Return the chain of causes, one line for each layer that the channels pass."""
        lines = [
            f"group {self.name}: {len(self)} units" + (f", kept: {self.kept_because}" if self.kept_because else "")
        ]
        seen: set[tuple[str, str]] = set()
        for event in self.events:
            if (event.layer, event.verb) not in seen:
                seen.add((event.layer, event.verb))
                lines.append(f"  {event.layer} {event.verb} them")
        return "\n".join(lines)


class Channels:
    """All channels of a flat model: units, groups, and what is left when units go.

    Raises:
        CompressError: if the model has no graph of layers.
    """

    def __init__(self, model: tf_keras.Model, handlers: Mapping[type, Handler] | None = None) -> None:
        self.model = model
        self.trace: Trace = trace_channels(model, default_handlers() if handlers is None else handlers)
        self.labels = _components(self.trace)
        self.count = int(self.labels.max(initial=-1)) + 1
        """Number of units."""
        self.pinned = np.zeros(self.count, bool)
        self._reasons: dict[int, str] = {}
        for ids, reason in self.trace.pins:
            units = np.unique(self.labels[ids])
            self.pinned[units] = True
            for unit in units:
                self._reasons.setdefault(int(unit), reason)
        self._macs = weight_macs(model)

    def viable(self, stay: np.ndarray, preference: np.ndarray | None = None) -> np.ndarray:
        """Return ``stay`` [count] with a unit put back wherever a layer would have nothing left to read or to write.

        ``preference`` [count]: of several units the one with the highest is put back.
        """
        stay = stay | self.pinned
        for weight in self.trace.weights.values():
            for ids in weight.axes:
                units = np.zeros(0, np.int64) if ids is None else self.units_of(ids)
                if units.size and not (units == NONE).any() and not stay[units].any():
                    stay[units[0] if preference is None else units[np.argmax(preference[units])]] = True
        return stay

    def units_of(self, ids: ChannelIds) -> np.ndarray:
        """Return the units that ids belong to; ``NONE`` stays ``NONE``."""
        return np.where(ids == NONE, NONE, self.labels[ids])

    def kept(self, stay: np.ndarray) -> Kept:
        """Return the cut that leaves the units [count] for which ``stay`` is true."""
        return Kept(stay[self.labels])

    def cut(self, name: str, value: np.ndarray, kept: Kept) -> np.ndarray:
        """Return what a cut leaves of an array in the shape of the weight ``"<layer>/<attribute>"``."""
        layer, _, attribute = name.rpartition("/")
        for weight in self.trace.weights.values():
            if (weight.layer, weight.attribute) == (layer, attribute):
                return cut_axes(value, weight.axes, kept)
        return value

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The groups in the order of the model."""
        written = [self.labels[event.ids] for event in self.trace.events if event.verb == "writes" and event.ids.size]
        pairs = [(units[1:], np.repeat(units[:1], len(units) - 1)) for units in written]
        of_unit = _connect(self.count, pairs)
        members: dict[int, list[IndexMap]] = {}
        events: dict[int, list[Event]] = {}
        # Numbered in the order in which they are first written.
        order: dict[int, int] = {}
        for units in written:
            order.setdefault(int(of_unit[units[0]]), len(order))
        within = np.zeros(self.count, np.int64)
        group_units: dict[int, np.ndarray] = {}
        by_group = np.argsort(of_unit, kind="stable")
        for units in np.split(by_group, np.cumsum(np.bincount(of_unit))[:-1]) if self.count else []:
            within[units] = np.arange(units.size)
            group_units[int(of_unit[units[0]])] = units
        for weight in self.trace.weights.values():
            for axis, ids in enumerate(weight.axes):
                if ids is None:
                    continue
                units = self.units_of(ids)
                owners = np.where(units == NONE, NONE, of_unit[units])
                for owner in np.unique(owners[owners != NONE]):
                    places = np.flatnonzero(owners == owner)
                    members.setdefault(int(owner), []).append(IndexMap(weight, axis, places, within[units[places]]))
        for event in self.trace.events:
            real = event.ids[event.ids != NONE]
            for owner in np.unique(of_unit[self.labels[real]]):
                events.setdefault(int(owner), []).append(event)
        return tuple(
            Group(
                number,
                group_units[owner],
                tuple(members.get(owner, ())),
                tuple(events.get(owner, ())),
                self._reason(group_units[owner]),
            )
            for owner, number in order.items()
        )

    def _reason(self, units: np.ndarray) -> str | None:
        """Say why none of the units may go, if so."""
        if len(units) == 1 and not self.pinned[units[0]]:
            written = (event.ids for event in self.trace.events if event.verb == "writes")
            several = any(ids.size > 1 and (self.labels[ids] == units[0]).any() for ids in written)
            why = "channels that can only go all together" if several else "a single channel"
            return f"{why}; nothing would be left"
        return self._reasons[int(units[0])] if self.pinned[units].all() else None

    @cached_property
    def _counts(self) -> list[tuple[WeightChannels, float, int, list[_Count]]]:
        """For each weight: its multiply-adds, its size without channel axes, how often each unit is on each axis."""
        table = []
        variables = {layer.name: layer.weights for layer in self.model.layers}
        for weight in self.trace.weights.values():
            shape = variables[weight.layer][weight.index].shape
            rest, counts = 1, []
            for size, ids in zip(shape, weight.axes, strict=True):
                if ids is None:
                    rest *= int(size)
                else:
                    units, times = np.unique(self.units_of(ids), return_counts=True)
                    real = units != NONE
                    counts.append(_Count(units[real], times[real], int(times[~real].sum())))
            table.append((weight, float(self._macs.get((weight.layer, weight.index), 0)), rest, counts))
        return table

    def costs(self, stay: np.ndarray) -> tuple[float, int]:
        """Return (multiply-adds, trainable parameters) of what is left, of the weights that hold channels."""
        macs, params = 0.0, 0
        for weight, whole, rest, counts in self._counts:
            left = [int(count.times[stay[count.units]].sum()) + count.fixed for count in counts]
            wholes = [int(count.times.sum()) + count.fixed for count in counts]
            macs += whole * math.prod(left) / math.prod(wholes)
            params += rest * math.prod(left) if weight.trainable else 0
        return macs, params


@dataclass(frozen=True)
class _Count:
    """What lies along one axis of a weight: ``units``, each so many ``times``, and places that are no channels."""

    units: np.ndarray
    times: np.ndarray
    fixed: int


def transferred(source: Channels, stay: np.ndarray, groups: Sequence[Group], target: Channels) -> np.ndarray:
    """Return which units of ``target`` stay when those of ``source`` in ``groups`` do that ``stay`` [count] says.

    The two models have layers of the same names that write the groups, and may number their units differently.
    """
    written = {event.layer: event.ids for event in target.trace.events if event.verb == "writes"}
    result = np.ones(target.count, bool)
    wanted = {name for group in groups for name in group.writers}
    for event in source.trace.events:
        if event.verb == "writes" and event.layer in wanted:
            result[target.labels[written[event.layer]]] = stay[source.labels[event.ids]]
    return result


def cut_axes(value: np.ndarray, axes: Sequence[ChannelIds | None], kept: Kept) -> np.ndarray:
    """Return an array, with these ids along its axes, without the channels that go."""
    for axis, ids in enumerate(axes):
        if ids is not None:
            value = np.compress(kept.of(ids), value, axis)
    return value


def _components(trace: Trace) -> np.ndarray:
    return _connect(trace.count, trace.ties)


def _connect(count: int, pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return the component of each of ``count`` things, numbered in the order of their first members."""
    if not count:
        return np.zeros(0, np.int64)
    rows = np.concatenate([one for one, _ in pairs]) if pairs else np.zeros(0, np.int64)
    columns = np.concatenate([other for _, other in pairs]) if pairs else np.zeros(0, np.int64)
    graph = coo_matrix((np.ones(rows.size, bool), (rows, columns)), shape=(count, count))
    _, labels = connected_components(graph, directed=False)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty_like(first)
    rank[np.argsort(first)] = np.arange(first.size)
    return rank[inverse]
