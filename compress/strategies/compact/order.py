"""The order of a network's channels in which compact forms lose least; the network computes the same in any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
import tf_keras
from scipy.optimize import linear_sum_assignment

from compress.candidate import Candidate, Guarantee
from compress.graph.channels.groups import Channels
from compress.graph.channels.order import Order as ChannelOrder
from compress.graph.channels.order import exchangeable
from compress.graph.channels.trace import NONE
from compress.graph.fold import folding_gains
from compress.strategies.compact.form import Form, Order

_STARTS, _ROUNDS = 4, 20
_SAMPLES = 256
_WHITE = 0.75
"""What averages of two by two pixels lose of the energy of an input of which nothing is known."""


def ordered(candidate: Candidate, forms: Mapping[str, Form], samples: np.ndarray | None, seed: int) -> Candidate:
    """Return the candidate with its channels in the best order for these layers to have these forms.

    Channels of weights whose values an earlier stage has bound stay where they are. ``samples``: calibration inputs, if
    energies are to be those of outputs and not of weights.
    """
    inputs = _powers(candidate.model, list(forms), samples)
    gains = folding_gains(candidate.model)
    wanted = {}
    for name, form in forms.items():
        # A batch norm behind it says how much each filter matters, and its sign.
        kernel = np.asarray(candidate.model.get_layer(name).kernel) * gains.get(name, 1.0)
        order = form.order(kernel, inputs[name])
        if order is not None:
            wanted[name] = order
    if not wanted:
        return candidate
    channels = Channels(candidate.model)
    source = best_source(channels, movable(channels, candidate.guarantees), wanted, seed)
    return candidate.evolve(model=ChannelOrder(channels, source).model())


def movable(channels: Channels, guarantees: Sequence[Guarantee]) -> list[np.ndarray]:
    """Return the sets of units that may change places, without those of weights whose values are bound."""
    bound = {name for guarantee in guarantees for name in guarantee.weights()}
    fixed = np.zeros(channels.count, bool)
    for weight in channels.trace.weights.values():
        if f"{weight.layer}/{weight.attribute}" in bound:
            for ids in weight.axes:
                units = np.zeros(0, np.int64) if ids is None else channels.units_of(ids)
                fixed[units[units != NONE]] = True
    return [left for units in exchangeable(channels) if (left := units[~fixed[units]]).size > 1]


def free_filters(model: tf_keras.Model, guarantees: Sequence[Guarantee]) -> frozenset[str]:
    """Return the convolutions whose filters may all change places with each other."""
    channels = Channels(model)
    sets = movable(channels, guarantees)
    return frozenset(name for name, ends in _Ends.all(channels).items() if ends.writes_freely(sets))


@dataclass(frozen=True)
class _Ends:
    """The units that a convolution reads and writes, place by place."""

    read: np.ndarray
    written: np.ndarray

    @classmethod
    def all(cls, channels: Channels) -> dict[str, _Ends]:
        """Return those of all convolutions that read and write nothing but channels."""
        found = {}
        for weight in channels.trace.weights.values():
            if weight.attribute == "kernel" and len(weight.axes) == 4:
                read, written = (None if ids is None else channels.units_of(ids) for ids in weight.axes[2:])
                if read is not None and written is not None and not (np.append(read, written) == NONE).any():
                    found[weight.layer] = cls(read, written)
        return found

    def writes_freely(self, sets: Sequence[np.ndarray]) -> bool:
        """Say whether any two of the channels written may change places."""
        distinct = np.unique(self.written).size == self.written.size
        return distinct and any(np.isin(self.written, units).all() for units in sets)


def best_source(channels: Channels, sets: Sequence[np.ndarray], wanted: Mapping[str, Order], seed: int) -> np.ndarray:
    """Return for each unit the one whose channels had best lie in its place [count].

    One of the ``sets`` of units that may change places is assigned its places after the other, the others held, until
    nothing is gained; from several starts.
    """
    ends = _Ends.all(channels)
    fixed = np.arange(channels.count)
    for name, order in wanted.items():
        if order.filters is not None and name in ends and ends[name].writes_freely(sets):
            fixed[ends[name].written] = ends[name].written[order.filters]
    layers = [(ends[name], order) for name, order in wanted.items() if order.energy is not None and name in ends]
    if not layers:
        return fixed
    problem = _Assignment(channels.count, layers)
    rng = np.random.default_rng(seed)
    touched = [units for units in sets if problem.touches(units)]
    best, most = fixed, problem.kept(fixed)
    for start in range(_STARTS):
        source = fixed.copy()
        for units in touched if start else ():
            source[units] = rng.permutation(source[units])
        source, kept = problem.improved(source, touched)
        if kept > most * (1 + 1e-9):
            best, most = source, kept
    return best


class _Assignment:
    """Units to places, so that the most energy is where the forms leave the weights whole."""

    def __init__(self, count: int, layers: list[tuple[_Ends, Order]]) -> None:
        self._layers = []
        for ends, order in layers:
            assert order.energy is not None
            assert order.whole is not None
            places = [np.full(count, -1) for _ in range(2)]
            for side, units in zip(places, (ends.read, ends.written), strict=True):
                side[units[::-1]] = np.arange(len(units))[::-1]
            self._layers.append((ends, places, order.energy, order.whole.astype(np.float64)))

    def touches(self, units: np.ndarray) -> bool:
        """Say whether one of the layers reads or writes these units."""
        return any((side[units] >= 0).any() for _, places, *_ in self._layers for side in places)

    def kept(self, source: np.ndarray) -> float:
        """Return the energy that is left."""
        total = 0.0
        for ends, (read, written), energy, whole in self._layers:
            total += float(np.sum(energy[np.ix_(read[source[ends.read]], written[source[ends.written]])] * whole))
        return total

    def improved(self, source: np.ndarray, sets: list[np.ndarray]) -> tuple[np.ndarray, float]:
        """Return a source in which no set alone could lie better, and what it keeps."""
        kept = self.kept(source)
        for _ in range(_ROUNDS):
            before = kept
            for units in sets:
                trial = source.copy()
                rows, columns = linear_sum_assignment(self._gain(source, units), maximize=True)
                trial[units[columns]] = units[rows]
                if (now := self.kept(trial)) > kept:
                    source, kept = trial, now
            if kept <= before * (1 + 1e-9):
                break
        return source, kept

    def _gain(self, source: np.ndarray, units: np.ndarray) -> np.ndarray:
        """Return [unit, place] what is kept of each unit's channels at the place of each other."""
        total = np.zeros((len(units), len(units)))
        for ends, (read, written), energy, whole in self._layers:
            if (read[units] >= 0).all():
                others = energy[:, written[source[ends.written]]] @ whole.T
                total += others[np.ix_(read[units], read[units])]
            if (written[units] >= 0).all():
                others = energy[read[source[ends.read]]].T @ whole
                total += others[np.ix_(written[units], written[units])]
        return total


def _powers(model: tf_keras.Model, names: list[str], samples: np.ndarray | None) -> dict[str, dict[str, np.ndarray]]:
    """Return layer -> ``whole``: mean square of each of its inputs; ``fine``: of what averages of 2 x 2 pixels lose."""
    if samples is None:
        sizes = {name: model.get_layer(name).kernel.shape[2] for name in names}
        return {name: {"whole": np.ones(size), "fine": np.full(size, _WHITE)} for name, size in sizes.items()}
    look = tf_keras.Model(model.inputs, [model.get_layer(name).input for name in names])
    found: dict[str, dict[str, list[np.ndarray]]] = {name: {"whole": [], "fine": []} for name in names}
    few = samples[:_SAMPLES]
    for start in range(0, len(few), 64):
        values = look(few[start : start + 64], training=False)
        for name, tensor in zip(names, tf.nest.flatten(values), strict=True):
            x = np.asarray(tensor)
            found[name]["whole"].append(np.mean(x**2, (1, 2)))
            even = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
            blocks = even.reshape(len(x), even.shape[1] // 2, 2, even.shape[2] // 2, 2, x.shape[3])
            # The mean over an empty map would be no number.
            fine = np.var(blocks, (2, 4)).mean((1, 2)) if blocks.size else np.zeros((len(x), x.shape[3]))
            found[name]["fine"].append(fine)
    return {name: {key: np.concatenate(parts).mean(0) for key, parts in rows.items()} for name, rows in found.items()}
