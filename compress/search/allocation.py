"""Which level of which technique each layer gets: the least loss within budgets, as an integer program.

Errors add: each layer alone changes the outputs a little, and what they change together is taken for the sum. Source of
the program: Yao et al., HAWQ-V3 (arXiv 2011.10680, section 3.4), there for bits alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import LinearConstraint, milp

from compress.search.sensitivity import Cost, Probe
from compress.search.technique import Kind, Technique

_ATTEMPTS = 12
_TOLERANCE = 2e-6
"""Of a limit: by less the solver may exceed it, again and again."""
_GAP = 1e-6


@dataclass(frozen=True)
class Option:
    """What one layer may become: its error, and its costs in the units of the budgets, [budgets]."""

    error: float
    costs: tuple[float, ...]


def choose(options: Sequence[Sequence[Option]], budgets: Sequence[float]) -> list[int] | None:
    """Return which option each layer takes: the least sum of errors whose costs add up to at most the budgets.

    None if there is no such choice. Solved exactly, as a program in one binary variable for each option.

    Args:
        options: of each layer.
        budgets: one for each cost.
    """
    sizes = [len(own) for own in options]
    every = [option for own in options for option in own]
    errors = np.array([option.error for option in every])
    costs = np.array([option.costs for option in every]).reshape(len(every), -1).T
    once = np.zeros((len(options), len(every)))
    for row, (start, size) in enumerate(zip(np.cumsum([0, *sizes]), sizes, strict=False)):
        once[row, start : start + size] = 1
    constraints = [LinearConstraint(once, 1, 1)]
    # The solver's tolerances are absolute.
    scale = np.maximum(np.abs(budgets), 1e-30)
    if len(budgets):
        constraints.append(LinearConstraint(costs / scale[:, None], -np.inf, np.asarray(budgets) / scale))
    solved = milp(
        errors / max(errors.max(initial=0.0), 1e-30),
        integrality=np.ones(len(every)),
        bounds=(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": _GAP, "time_limit": 60.0},
    )
    if solved.x is None:
        return None
    parts = np.split(solved.x, np.cumsum(sizes)[:-1])
    return [int(np.argmax(part)) for part in parts]


Combination = tuple[Probe, ...]
"""What is done to one layer: at most one probe of each kind; none: it is left as it is."""


@dataclass(frozen=True)
class Way:
    """A way to write the file, and what the whole model costs so, before anything is taken away.

    Args:
        storage: the technique that decides how weights are written; None: floats.
        rest_bytes: of the packed file besides the kernels.
        milliseconds: of the file on the board; None if there is no such budget.
        saving: technique -> which part of the time that its saved multiply-adds stand for it saves on the board.
    """

    storage: Technique | None
    rest_bytes: float
    milliseconds: float | None
    saving: Mapping[str, float]

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

    A layer's bytes are those that it has, times the share that each technique leaves of them; its milliseconds the part
    of the whole that its multiply-adds are, times what is left of these. A technique that takes channels away saves in
    the layers that read them, too.
    """

    def __init__(
        self, layers: Mapping[str, Cost], probes: Sequence[Probe], techniques: Sequence[Technique], way: Way
    ) -> None:
        self.way = way
        self._layers = layers
        self._techniques = {technique.name: technique for technique in techniques}
        self._macs = max(sum(cost.macs for cost in layers.values()), 1)
        usable = [p for p in probes if p.refused is None and self._fits(self._techniques[p.technique])]
        self._combinations = {name: self._combined([p for p in usable if p.layer == name]) for name in layers}

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

    def bytes_of(self, chosen: Mapping[str, Combination]) -> dict[str, float]:
        """Return the bytes of each layer's kernels."""
        left = {name: float(cost.bytes) for name, cost in self._layers.items()}
        for combination in chosen.values():
            for probe in combination:
                for name, share in probe.bytes_kept.items():
                    left[name] *= share
        return left

    def milliseconds_of(self, chosen: Mapping[str, Combination]) -> dict[str, float]:
        """Return the time of each layer; zero if it is not known."""
        whole = self.way.milliseconds or 0.0
        left = {name: whole * cost.macs / self._macs for name, cost in self._layers.items()}
        for combination in chosen.values():
            for probe in combination:
                for name, share in probe.macs_kept.items():
                    left[name] *= self._time_kept(probe, share)
        return left

    def _time_kept(self, probe: Probe, share: float) -> float:
        return max(1 - self.way.saving.get(probe.technique, 1.0) * (1 - share), 0.0)

    def costs_of(self, chosen: Mapping[str, Combination], limits: Limits) -> tuple[float, ...]:
        """Return what the whole file costs, in the order of ``limits.given``."""
        found = []
        if limits.bytes is not None:
            found.append(self.way.rest_bytes + sum(self.bytes_of(chosen).values()))
        if limits.milliseconds is not None:
            found.append(sum(self.milliseconds_of(chosen).values()))
        return tuple(found)

    def cheapest(self, limits: Limits) -> Allocation:
        """Return the allocation that costs least, as a share of the limits, all of them together."""
        return self._solved(limits, limits.given, self._cost_alone(limits)) or self._made({}, limits)

    def best(self, limits: Limits) -> Allocation | None:
        """Return the allocation of least divergence within the limits; None if there is none.

        Savings in other layers are linear only where these do not change: they are valued by what the last solution
        leaves of them, and the program is solved again until what it chose keeps to the limits all together.
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
        names, options = list(self._layers), []
        base_bytes, base_time = self.bytes_of(near or {}), self.milliseconds_of(near or {})
        fixed = [self.way.rest_bytes] if limits.bytes is not None else []
        fixed += [0.0] if limits.milliseconds is not None else []
        for name in names:
            own = []
            for combination in self._combinations[name]:
                size, time = self._linear(name, combination, base_bytes, base_time, near)
                costs = [size] if limits.bytes is not None else []
                costs += [time] if limits.milliseconds is not None else []
                error = sum(probe.divergence for probe in combination)
                own.append(Option(error if weights is None else float(weights @ np.array(costs)), tuple(costs)))
            options.append(own)
        if weights is not None:
            shift = min((o.error for own in options for o in own), default=0.0)
            options = [[Option(o.error - shift, ()) for o in own] for own in options]
            picked = choose(options, [])
        else:
            allowed = [goal - part for goal, part in zip(goals, fixed, strict=True)]
            picked = choose(options, allowed) if min(allowed, default=1.0) > 0 else None
        if picked is None:
            return None
        return self._made({n: self._combinations[n][i] for n, i in zip(names, picked, strict=True)}, limits)

    def _linear(
        self,
        name: str,
        combination: Combination,
        base_bytes: Mapping[str, float],
        base_time: Mapping[str, float],
        near: Mapping[str, Combination] | None,
    ) -> tuple[float, float]:
        """Return a layer's bytes and milliseconds under a combination, less what it saves in other layers."""
        whole = self.way.milliseconds or 0.0
        size, time = float(self._layers[name].bytes), whole * self._layers[name].macs / self._macs
        for probe in combination:
            size *= probe.bytes_kept.get(name, 1.0)
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
        divergence = sum(probe.divergence for combination in chosen.values() for probe in combination)
        return Allocation(self.way, chosen, divergence, self.costs_of(chosen, limits))
