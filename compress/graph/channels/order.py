"""Channels in another order: the network computes the same, and its weights lie otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tf_keras

from compress.graph.channels.groups import Channels, Group
from compress.graph.channels.trace import NONE, ChannelIds
from compress.graph.rewrite import copy_model


def can_be_ordered(group: Group) -> bool:
    """Say whether every weight of the group holds all its units, each as often: then any order of them will do."""
    counts = [np.bincount(member.units, minlength=len(group)) for member in group.members]
    return all((count == count[0]).all() for count in counts)


def exchangeable(channels: Channels) -> list[np.ndarray]:
    """Return sets of units that may change places: they lie in the same tensors and weights, equally often."""
    free = ~channels.pinned
    mark = np.random.default_rng(0).integers(1, 2**62, len(channels.trace.tensors) + _most_axes(channels), np.int64)
    signature = np.zeros(channels.count, np.int64)
    weights = [ids for weight in channels.trace.weights.values() for ids in weight.axes if ids is not None]
    for ids, number in zip([*channels.trace.tensors.values(), *weights], mark, strict=False):
        units = channels.units_of(ids)
        signature += number * np.bincount(units[units != NONE], minlength=channels.count)
    _, member = np.unique(signature, return_inverse=True)
    sets = [np.flatnonzero((member == number) & free) for number in range(member.max(initial=-1) + 1)]
    return [units for units in sets if units.size > 1]


def _most_axes(channels: Channels) -> int:
    return sum(len(weight.axes) for weight in channels.trace.weights.values())


@dataclass(frozen=True)
class Order:
    """A new order: the channels of unit ``source[u]`` lie where those of unit ``u`` were.

    It may exchange units within the sets of :func:`exchangeable`, or within groups that :func:`can_be_ordered`, only;
    the model's outputs stay equal up to rounding.
    """

    channels: Channels
    source: np.ndarray

    @classmethod
    def of(cls, channels: Channels, orders: Mapping[str, np.ndarray]) -> Order:
        """Return the order in which channel ``i`` of a layer is what was channel ``order[i]``; layer -> order.

        Each layer is the only one that writes its group.
        """
        source = np.arange(channels.count)
        for event in channels.trace.events:
            if event.verb == "writes" and event.layer in orders:
                units = channels.units_of(event.ids)
                source[units] = units[orders[event.layer]]
        return cls(channels, source)

    def model(self) -> tf_keras.Model:
        """Return a copy of the model with its channels in the new order."""
        model = copy_model(self.channels.model)
        values = {layer.name: layer.get_weights() for layer in model.layers}
        for (name, index), weight in self.channels.trace.weights.items():
            values[name][index] = self._moved(values[name][index], weight.axes)
        for layer in model.layers:
            layer.set_weights(values[layer.name])
        return model

    def array(self, name: str, value: np.ndarray, without: int | None = None) -> np.ndarray:
        """Return an array in the shape of the weight ``"<layer>/<attribute>"`` in the new order.

        The axis ``without`` stays as it is, and may have another length.
        """
        layer, _, attribute = name.rpartition("/")
        for weight in self.channels.trace.weights.values():
            if (weight.layer, weight.attribute) == (layer, attribute):
                return self._moved(value, [None if n == without else ids for n, ids in enumerate(weight.axes)])
        return value

    def _moved(self, value: np.ndarray, axes: Sequence[ChannelIds | None]) -> np.ndarray:
        for axis, ids in enumerate(axes):
            if ids is not None:
                value = np.take(value, _places(self.channels.units_of(ids), self.source), axis)
        return value


def _places(units: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Return for each place along an axis the place whose values it gets; the n-th of a unit from the n-th."""
    order = np.argsort(units, kind="stable")
    ranked = units[order]
    times = np.empty(len(units), np.int64)
    times[order] = np.arange(len(units)) - np.searchsorted(ranked, ranked)
    wanted = np.where(units == NONE, NONE, source[units])
    return order[np.searchsorted(ranked, wanted) + times]
