"""Channels in another order: the network computes the same, and its weights lie otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tf_keras

from compress.graph.channels.groups import Channels
from compress.graph.channels.trace import NONE, ChannelIds
from compress.graph.rewrite import copy_model


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


def reordered(channels: Channels, source: np.ndarray) -> tf_keras.Model:
    """Return a copy of the model in which the channels of unit ``source[u]`` lie where those of unit ``u`` were.

    ``source`` may exchange units within the sets of :func:`exchangeable` only; the outputs stay equal up to rounding.
    """
    model = copy_model(channels.model)
    values = {layer.name: layer.get_weights() for layer in model.layers}
    for (name, index), weight in channels.trace.weights.items():
        values[name][index] = _moved(values[name][index], weight.axes, channels, source)
    for layer in model.layers:
        layer.set_weights(values[layer.name])
    return model


def _moved(value: np.ndarray, axes: Sequence[ChannelIds | None], channels: Channels, source: np.ndarray) -> np.ndarray:
    """Return an array, with these ids along its axes, in the new order."""
    for axis, ids in enumerate(axes):
        if ids is not None:
            value = np.take(value, _places(channels.units_of(ids), source), axis)
    return value


def _places(units: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Return for each place along an axis the place whose values it gets; the n-th of a unit from the n-th."""
    order = np.argsort(units, kind="stable")
    ranked = units[order]
    times = np.empty(len(units), np.int64)
    times[order] = np.arange(len(units)) - np.searchsorted(ranked, ranked)
    wanted = np.where(units == NONE, NONE, source[units])
    return order[np.searchsorted(ranked, wanted) + times]
