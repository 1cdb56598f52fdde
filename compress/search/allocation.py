"""Which level of which technique each layer gets: the least loss within budgets, as an integer program.

Errors add: each layer alone changes the outputs a little, and what they change together is taken for the sum; but for
levels of which layers were seen to lose more together. Source of the program: Yao et al., HAWQ-V3 (arXiv 2011.10680,
section 3.4), there for bits alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from compress.search.program import Option, choose
from compress.search.sensitivity import Cost, Interaction, Pair, Probe
from compress.search.technique import Kind, Technique, Value
from compress.tracking.pareto import non_dominated

_ATTEMPTS = 12
_TOLERANCE = 2e-6
"""Of a limit: by less the solver may exceed it, again and again."""
_MOST_JOINT = 20_000
"""So many choices for layers that depend on one another are tried all together; where there are more, one by one."""


Combination = tuple[Probe, ...]
"""What is done to one layer: at most one probe of each kind; none: it is left as it is."""


@dataclass(frozen=True)
class _Unit:
    """Layers of which no technique saves anything elsewhere, and what may become of them: the undominated choices.

    ``costs`` [choices, 2]: bytes and milliseconds of all of the layers. ``counts`` [choices, interactions].
    """

    choices: Sequence[Mapping[str, Combination]]
    errors: np.ndarray
    costs: np.ndarray
    counts: np.ndarray


Saving = tuple[str, Value, str]
"""Technique, level and layer."""


@dataclass(frozen=True)
class Way:
    """A way to write the file, and what the whole model costs so, before anything is taken away.

    Args:
        storage: the technique that decides how weights are written; None: floats.
        rest_bytes: of the packed file besides the kernels.
        times: layer -> milliseconds on the board; empty if there is no such budget.
        rest_milliseconds: of the file besides.
        saving: which part of the time that its saved multiply-adds stand for a level saves on the board; 1 for the
            others.
    """

    storage: Technique | None
    rest_bytes: float
    times: Mapping[str, float] = field(default_factory=dict)
    rest_milliseconds: float = 0.0
    saving: Mapping[Saving, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the files are called."""
        return self.storage.name if self.storage is not None else "float"


@dataclass(frozen=True)
class Limits:
    """What the file may cost: bytes of the packed file, milliseconds on the board; None: any."""

    bytes: float | None
    milliseconds: float | None

    @property
    def given(self) -> list[float]:
        """The limits that are set, bytes first."""
        return [limit for limit in (self.bytes, self.milliseconds) if limit is not None]


@dataclass(frozen=True)
class Allocation:
    """What each layer gets, what it is expected to lose, and to cost."""

    way: Way
    chosen: Mapping[str, Combination]
    divergence: float
    costs: tuple[float, ...]
    """In the order of :attr:`Limits.given`."""


class Allocator:
    """Allocates over the probes of a sensitivity table, for one way to write the file.

    A layer's bytes are those that it has, times the share that each technique leaves of them (zeros and few values
    together: the share that was measured of both, where it was); so its milliseconds, by what each level leaves of its
    multiply-adds and what the board saves by that. A technique that takes channels away saves in
    the layers that read them, too.
    """

    def __init__(
        self,
        layers: Mapping[str, Cost],
        probes: Sequence[Probe],
        techniques: Sequence[Technique],
        way: Way,
        pairs: Sequence[Pair] = (),
        interactions: Sequence[Interaction] = (),
    ) -> None:
        self.way = way
        self._interactions = interactions
        self._concerned: dict[Saving, list[int]] = {}
        for place, item in enumerate(interactions):
            for name in item.layers:
                self._concerned.setdefault((item.technique, item.value, name), []).append(place)
        self._layers = layers
        self._techniques = {technique.name: technique for technique in techniques}
        usable = [p for p in probes if p.refused is None and self._fits(self._techniques[p.technique])]
        self._pairs = {(pair.layer, pair.zeros, pair.values): pair.bytes_kept for pair in pairs}
        self._combinations = {name: self._combined([p for p in usable if p.layer == name]) for name in layers}
        components = _components(layers, [combo for own in self._combinations.values() for combo in own])
        joint = [c for c in components if math.prod(len(self._combinations[name]) for name in c) <= _MOST_JOINT]
        self._units = [self._unit(names) for names in joint]
        self._single = [name for names in components if names not in joint for name in names]

    def _fits(self, technique: Technique) -> bool:
        storage = self.way.storage
        return technique.strategy.stores is None or (storage is not None and technique.name == storage.name)

    def _combined(self, probes: Sequence[Probe]) -> list[Combination]:
        slots: dict[Kind, list[Probe | None]] = {kind: [None] for kind in Kind}
        for probe in probes:
            slots[self._techniques[probe.technique].kind].append(probe)
        storage = self.way.storage
        stored = [p for p in probes if storage is not None and p.technique == storage.name]
        if stored:
            # Floats in between would be converted to and fro.
            slots[Kind.VALUES] = list(stored)
        every = itertools.product(*(slots[kind] for kind in Kind))
        return [found for found in (tuple(p for p in combo if p is not None) for combo in every) if self._agree(found)]

    def _agree(self, combination: Combination) -> bool:
        strategies = [self._techniques[probe.technique].strategy for probe in combination]
        return all(
            later.clashes_with(earlier) is None
            for position, later in enumerate(strategies)
            for earlier in strategies[:position]
        )

    def _unit(self, names: Sequence[str]) -> _Unit:
        every = itertools.product(*(self._combinations[name] for name in names))
        choices = [dict(zip(names, picked, strict=True)) for picked in every]
        errors = np.array([_divergence(choice) for choice in choices])
        counts = np.array([self._counts(choice) for choice in choices]).reshape(len(choices), -1)
        costs = np.array(
            [
                (sum(self.bytes_of(choice, names).values()), sum(self.milliseconds_of(choice, names).values()))
                for choice in choices
            ]
        )
        columns = np.column_stack([errors, costs, counts[:, np.ptp(counts, axis=0) > 0]])
        best = np.flatnonzero(non_dominated(columns, [False] * columns.shape[1]))
        return _Unit([choices[place] for place in best], errors[best], costs[best], counts[best])

    def _counts(self, chosen: Mapping[str, Combination]) -> tuple[int, ...]:
        """Return how many layers of each interaction come to its level."""
        found = [0] * len(self._interactions)
        for combination in chosen.values():
            for probe in combination:
                for place in self._concerned.get((probe.technique, probe.value, probe.layer), ()):
                    found[place] += 1
        return tuple(found)

    def divergences(self, chosen: Mapping[str, Combination]) -> dict[str, float]:
        """Return what each layer loses: by itself, and half of what each pair with another one adds."""
        found = {name: sum(probe.divergence for probe in combination) for name, combination in chosen.items()}
        counts = self._counts(chosen)
        for name, combination in chosen.items():
            for probe in combination:
                for place in self._concerned.get((probe.technique, probe.value, name), ()):
                    found[name] += self._interactions[place].per_pair * (counts[place] - 1) / 2
        return found

    def bytes_of(self, chosen: Mapping[str, Combination], among: Collection[str] | None = None) -> dict[str, float]:
        """Return the bytes of each layer's kernels; ``among``: of these layers, where no others are chosen for."""
        names = self._layers if among is None else among
        left = {name: float(self._layers[name].bytes) for name in names}
        for layer, combination in chosen.items():
            left[layer] *= self._own_bytes_kept(layer, combination)
            for probe in combination:
                for name, share in probe.bytes_kept.items():
                    left[name] *= share if name != layer else 1.0
        return left

    def _own_bytes_kept(self, layer: str, combination: Combination) -> float:
        """Return the share of a layer's bytes that what is done to it leaves."""
        kept = math.prod(probe.bytes_kept.get(layer, 1.0) for probe in combination)
        by_kind = {self._techniques[probe.technique].kind: probe for probe in combination}
        zeros, values = by_kind.get(Kind.ZEROS), by_kind.get(Kind.VALUES)
        if zeros is None or values is None:
            return kept
        apart = zeros.bytes_kept.get(layer, 1.0) * values.bytes_kept.get(layer, 1.0)
        key = (layer, (zeros.technique, zeros.value), (values.technique, values.value))
        return kept / apart * self._pairs.get(key, apart) if apart else kept

    def milliseconds_of(
        self, chosen: Mapping[str, Combination], among: Collection[str] | None = None
    ) -> dict[str, float]:
        """Return the time of each layer; zero if it is not known; ``among`` as for :meth:`bytes_of`."""
        left = {name: self.way.times.get(name, 0.0) for name in (self._layers if among is None else among)}
        for combination in chosen.values():
            for probe in combination:
                for name, share in probe.macs_kept.items():
                    left[name] *= self._time_kept(probe, share)
        return left

    def _time_kept(self, probe: Probe, share: float) -> float:
        saving = self.way.saving.get((probe.technique, probe.value, probe.layer), 1.0)
        return max(1 - saving * (1 - share), 0.0)

    def costs_of(self, chosen: Mapping[str, Combination], limits: Limits) -> tuple[float, ...]:
        """Return what the whole file costs, in the order of ``limits.given``."""
        found = []
        if limits.bytes is not None:
            found.append(self.way.rest_bytes + sum(self.bytes_of(chosen).values()))
        if limits.milliseconds is not None:
            found.append(self.way.rest_milliseconds + sum(self.milliseconds_of(chosen).values()))
        return tuple(found)

    def cheapest(self, limits: Limits) -> Allocation:
        """Return the allocation that costs least, as a share of the limits, all of them together."""
        return self._solved(limits, limits.given, self._cost_alone(limits)) or self._made({}, limits)

    def best(self, limits: Limits) -> Allocation | None:
        """Return the allocation of least divergence within the limits; None if there is none.

        Where too many layers depend on one another to try all that may become of them, savings in other layers are
        linear only where these do not change: they are valued by what the last solution leaves of them, and the program
        is solved again until what it chose keeps to the limits all together.
        """
        goals = list(limits.given)
        start = self.cheapest(limits)
        if any(cost > goal for cost, goal in zip(start.costs, goals, strict=True)):
            return None
        found, latest = start, start
        for _ in range(_ATTEMPTS):
            solved = self._solved(limits, goals, None, latest.chosen)
            if solved is None:
                break
            over = [cost - limit for cost, limit in zip(solved.costs, limits.given, strict=True)]
            if max(over) <= 0:
                if solved.divergence >= found.divergence:
                    break
                found = solved
            goals = [
                goal - (max(1.05 * excess, _TOLERANCE * goal) if excess > 0 else 0.0)
                for goal, excess in zip(goals, over, strict=True)
            ]
            latest = solved
        return found

    def _cost_alone(self, limits: Limits) -> np.ndarray:
        return 1 / np.maximum(np.array(limits.given), 1e-30)

    def _solved(
        self,
        limits: Limits,
        goals: Sequence[float],
        weights: np.ndarray | None,
        near: Mapping[str, Combination] | None = None,
    ) -> Allocation | None:
        """Solve the program; with ``weights`` the objective is the costs times these, and nothing is limited."""
        names = self._single
        options = [
            [
                Option(float(error), tuple(self._given(costs, limits)), tuple(counts))
                for error, costs, counts in zip(u.errors, u.costs, u.counts, strict=True)
            ]
            for u in self._units
        ]
        base_bytes, base_time = self.bytes_of(near or {}), self.milliseconds_of(near or {})
        fixed = [self.way.rest_bytes] if limits.bytes is not None else []
        fixed += [self.way.rest_milliseconds] if limits.milliseconds is not None else []
        for name in names:
            own = []
            for combination in self._combinations[name]:
                costs = self._given(self._linear(name, combination, base_bytes, base_time, near), limits)
                error = sum(probe.divergence for probe in combination)
                own.append(Option(error, tuple(costs), self._counts({name: combination})))
            options.append(own)
        if weights is not None:
            options = [[Option(float(weights @ np.array(o.costs)), o.costs) for o in own] for own in options]
            shift = min((o.error for own in options for o in own), default=0.0)
            options = [[Option(o.error - shift, ()) for o in own] for own in options]
            picked = choose(options, [])
        else:
            allowed = [goal - part for goal, part in zip(goals, fixed, strict=True)]
            per_pair = [item.per_pair for item in self._interactions]
            picked = choose(options, allowed, per_pair) if min(allowed, default=1.0) > 0 else None
        if picked is None:
            return None
        units, single = picked[: len(self._units)], picked[len(self._units) :]
        chosen = {n: c for u, i in zip(self._units, units, strict=True) for n, c in u.choices[i].items()}
        chosen |= {n: self._combinations[n][i] for n, i in zip(names, single, strict=True)}
        return self._made({name: chosen[name] for name in self._layers}, limits)

    def _given(self, costs: Sequence[float], limits: Limits) -> list[float]:
        """Return bytes and milliseconds, those of the two that are limited."""
        return [
            float(cost)
            for cost, limit in zip(costs, (limits.bytes, limits.milliseconds), strict=True)
            if limit is not None
        ]

    def _linear(
        self,
        name: str,
        combination: Combination,
        base_bytes: Mapping[str, float],
        base_time: Mapping[str, float],
        near: Mapping[str, Combination] | None,
    ) -> tuple[float, float]:
        """Return a layer's bytes and milliseconds under a combination, less what it saves in other layers."""
        time = self.way.times.get(name, 0.0)
        size = self._layers[name].bytes * self._own_bytes_kept(name, combination)
        for probe in combination:
            time *= self._time_kept(probe, probe.macs_kept.get(name, 1.0))
            taken = near is not None and probe in near.get(name, ())
            for other, share in probe.bytes_kept.items():
                if other != name:
                    # What the other has at the last solution; without this probe, if that is among it.
                    size -= (1 - share) * base_bytes[other] / (max(share, 1e-3) if taken else 1.0)
            for other, share in probe.macs_kept.items():
                if other != name:
                    kept = self._time_kept(probe, share)
                    time -= (1 - kept) * base_time[other] / (max(kept, 1e-3) if taken else 1.0)
        return size, time

    def _made(self, chosen: Mapping[str, Combination], limits: Limits) -> Allocation:
        return Allocation(self.way, chosen, sum(self.divergences(chosen).values()), self.costs_of(chosen, limits))


def _divergence(chosen: Mapping[str, Combination]) -> float:
    return sum(probe.divergence for combination in chosen.values() for probe in combination)


def _components(layers: Iterable[str], combinations: Iterable[Combination]) -> list[tuple[str, ...]]:
    """Return the layers in groups: a technique in one layer of a group saves in no layer of another."""
    group = {name: {name} for name in layers}
    for probe in (probe for combination in combinations for probe in combination):
        joined = set().union(*(group[name] for name in (probe.layer, *probe.bytes_kept, *probe.macs_kept)))
        group |= dict.fromkeys(joined, joined)
    return list(dict.fromkeys(tuple(name for name in group if name in group[own]) for own in group))
