"""Allocation over all techniques and layers under a budget, from one sensitivity table."""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, InstanceOf
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate, Effect, Guarantee, Skipped
from compress.errors import CompressError
from compress.metrics.accuracy import file_accuracy
from compress.search.allocation import Allocation, Allocator, Limits
from compress.search.as_trained import as_trained
from compress.search.realise import realise, table
from compress.search.sensitivity import Sensitivity, measure_sensitivity
from compress.search.stored import measure_files
from compress.search.technique import Technique
from compress.search.ways import measure_ways, storages
from compress.strategies.strategy import Context, Strategy

_LOG = logging.getLogger("compress")
_ROUNDS = 4
_STEP = 1.005
"""How much more than measured is expected next where a file was too large or too slow."""
_NEAR = 0.97
"""A file that takes this part of a budget has used it."""
_OVER = 1.03
"""Where no file keeps free all that training is given, one that keeps most of it will do."""
_NOISE = 1.02
"""Two files of one structure take as long as each other, but for this."""
_TRAINING_MARGIN = 0.9
"""Part of the budget of bytes that is aimed at where training follows: it changes how well levels can be coded."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=True))
class Auto(Strategy):
    """Choose for every layer what is done to it, so that the file keeps to a budget and its outputs change least.

    The sensitivity of each layer to each level of each technique is measured once (see
    :func:`~compress.search.sensitivity.measure_sensitivity`); what several changes do together is taken for the
    sum, but for levels that were seen to lose more (:class:`~compress.search.sensitivity.Interaction`). The choice is
    made by integer programming, built, and measured: bytes of the packed file, latency on the board. Where these are
    not what was expected, the expectation is corrected and the choice made again, a few times. Training comes after
    that, once: the recovery's epochs are those of the whole stage.

    A layer gets at most one technique that changes its structure, one that makes zeros, and one that binds values.

    Attributes:
        latency: share of the time of the original's file, at most, as the board measures both in turns.
        latency_ms: milliseconds of one sample on the board, at most, instead.
        bytes: of the packed file, at most.
        accuracy_drop: points that the file may lose at most against the reference's, on the part of the data that
            accuracies are measured on. It decides nothing, and is looked at once, in the end: more is an error, as for
            any budget that is not met. Null: not looked at.
        techniques: what may be done.
        images: of the validation part, for the sensitivities.
    """

    latency: Annotated[float, Gt(0), Le(1)] | None = None
    latency_ms: Annotated[float, Gt(0), Lt(float("inf"))] | None = None
    bytes: Annotated[int, Gt(0)] | None = None
    accuracy_drop: Annotated[float, Ge(0), Le(100)] | None = None
    techniques: tuple[InstanceOf[Technique], ...] = ()
    images: Annotated[int, Ge(1), Le(1_000_000)] = 512

    def __post_init__(self) -> None:
        """Refuse a search without a budget.

        Raises:
            CompressError: if there is none, or two of latency, or nothing that may be done.
        """
        if self.latency is not None and self.latency_ms is not None:
            raise CompressError(
                "budget",
                expected="budget.latency (share of the original's) or budget.latency_ms",
                received="both",
                fix="Leave one of them out.",
            )
        if self.latency is None and self.latency_ms is None and self.bytes is None:
            raise CompressError(
                "budget",
                expected="budget.bytes (of the packed file), or budget.latency (share of the original's on the board) "
                "or budget.latency_ms, or bytes and one of these",
                received="neither" if self.accuracy_drop is None else "budget.accuracy_drop alone",
                fix="Write for example budget.bytes=50000.",
            )
        if not self.techniques:
            raise CompressError(
                "techniques", expected="at least one", received="none", fix="Write techniques=standard."
            )

    @property
    def effects(self) -> frozenset[Effect]:  # type: ignore[override]
        """All that its techniques do."""
        return frozenset({Effect.TRAIN}).union(*(technique.strategy.effects for technique in self.techniques))

    @property
    def establishes(self) -> type[Guarantee]:  # type: ignore[override]
        """A property that is broken by whatever breaks that of one of its techniques."""
        kinds = [t.strategy.establishes for t in self.techniques if t.strategy.establishes is not None]
        broken: frozenset[Effect] = reduce(frozenset.union, (kind.broken_by for kind in kinds), frozenset())
        return type("Allocated", (Guarantee,), {"broken_by": broken})

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Measure, choose, build, measure again; train; check."""
        limits = Limits(self.bytes, self._milliseconds(context))
        aim = limits
        if context.recovery.trains and self.bytes is not None:
            aim = replace(limits, bytes=self.bytes * _TRAINING_MARGIN)
        stores, left_out = storages(candidate, self.techniques, context, limits)
        sensitivity = measure_sensitivity(candidate, self.techniques, context, self.images)
        if context.recovery.trains:
            sensitivity = as_trained(candidate, sensitivity, self.techniques, context, self.images)
        if all(probe.refused is not None for probe in sensitivity.probes):
            reasons = dict.fromkeys(f"{p.technique}: {p.refused}" for p in sensitivity.probes)
            raise CompressError(
                f"stage {context.stage}",
                expected="a layer that a technique can change",
                received=f"none ({'; '.join(list(reasons)[:3])})",
                fix="Add techniques, or leave the stage out.",
            )
        ways = measure_ways(candidate, sensitivity, self.techniques, stores, context, limits)
        layers, probes, pairs = sensitivity.layers, sensitivity.probes, sensitivity.pairs
        together = sensitivity.interactions
        allocators = [Allocator(layers, probes, self.techniques, way, pairs, together) for way in ways]
        best = self._within(candidate, allocators, aim, limits, context)
        found, allocator = best.allocation, best.allocator
        if context.recovery.trains:
            result = realise(candidate, found, self.techniques, context, trains=True)
            share = self._check_costs(best, result, limits, context)
        else:
            share = None
            result = best.make()
        self._check_accuracy(result, context)
        unused = (*left_out, *_unused(sensitivity, self.techniques))
        expected = dict(zip(_units(limits), found.costs, strict=True))
        return result.evolve(
            skipped=(*result.skipped, *unused),
            allocation=table(found, allocator),
            measured={
                "expected_divergence": found.divergence,
                **{f"expected_{k}": v for k, v in expected.items()},
                **({} if share is None else {"share_of_budget_time": share}),
            },
        )

    def _milliseconds(self, context: Context) -> float | None:
        if self.latency is None:
            return self.latency_ms
        original = Candidate(context.reference)
        try:
            _, whole = context.remember(
                "original", [context.board], lambda: list(measure_files(original, context, latency=True))
            )
        except CompressError as error:
            raise CompressError(
                "budget.latency",
                expected="a board that times the original's file, of which it is a share",
                received=error.received,
                fix="Choose another board, or give budget.latency_ms or budget.bytes instead.",
            ) from error
        return self.latency * float(whole)

    def _measured(self, candidate: Candidate, context: Context, limits: Limits) -> tuple[float, float | None]:
        """Return bytes and milliseconds of a file; its share of the original's time is measured in turns."""
        if self.latency is None:
            return measure_files(candidate, context, latency=limits.milliseconds is not None)
        assert limits.milliseconds is not None
        size, _ = measure_files(candidate, context, latency=False)
        share = _times_longer(Candidate(context.reference), candidate, context)
        return size, share * limits.milliseconds / self.latency

    def _within(
        self, candidate: Candidate, allocators: Sequence[Allocator], limits: Limits, given: Limits, context: Context
    ) -> _Built:
        """Return the best allocation whose file, as built without training, keeps to the limits.

        ``given``: the limits without room for the training, for what takes least.

        Raises:
            CompressError: if there is none, saying what the least is.
        """
        corrections = {allocator.way.name: [1.0] * len(limits.given) for allocator in allocators}
        best: _Built | None = None
        closest: _Built | None = None
        tried: list[Allocation] = []
        for _ in range(_ROUNDS):
            choices = [(a.best(_scaled(limits, corrections[a.way.name])), a) for a in allocators]
            possible = [(found, allocator) for found, allocator in choices if found is not None]
            if not possible:
                break
            found, allocator = min(possible, key=lambda item: item[0].divergence)
            if any(found.way is other.way and found.chosen == other.chosen for other in tried):
                break
            tried.append(found)
            built = self._built(candidate, found, allocator, limits, context)
            if built.share <= 1 and (best is None or found.divergence < best.allocation.divergence):
                best = built
            near = built.share <= _OVER and max(_shares(built.costs, given)) <= 1
            if near and (closest is None or built.share < closest.share):
                closest = built
            if _NEAR <= built.share <= 1 or (built.share <= 1 and not found.divergence):
                break
            again = [value / cost for value, cost in zip(built.costs, found.costs, strict=True)]
            corrections[allocator.way.name] = [
                value if cost <= limit else value * _STEP
                for value, cost, limit in zip(again, built.costs, limits.given, strict=True)
            ]
        best = best or closest
        if best is None:
            # Expectations may be too dark: what takes least is built before it is refused.
            least = [(a.cheapest(limits), a) for a in allocators]
            found, allocator = min(least, key=lambda item: max(_shares(item[0].costs, limits)))
            best = replace(self._built(candidate, found, allocator, limits, context), least=True)
            if max(_shares(best.costs, given)) > 1:
                raise self._out_of_reach(best, given)
        return best

    def _built(
        self, candidate: Candidate, found: Allocation, allocator: Allocator, limits: Limits, context: Context
    ) -> _Built:
        """Build an allocation without training, and measure its file; what was measured of it before is remembered.

        So a search that was stopped corrects its expectations by the same numbers, and comes to the same choice.
        """
        make = functools.cache(lambda: realise(candidate, found, self.techniques, context, trains=False))
        board = None if limits.milliseconds is None else context.board
        levels = {(t.name, value): t.config(value) for t in self.techniques for value in t.levels}
        chosen = {
            layer: [levels[probe.technique, probe.value] for probe in combination]
            for layer, combination in found.chosen.items()
        }
        in_turns = self.latency is not None
        size, time = context.remember(
            "built", [board, chosen, in_turns, context.sparse], lambda: list(self._measured(make(), context, limits))
        )
        costs = tuple(v for v, limit in ((size, limits.bytes), (time, limits.milliseconds)) if limit and v is not None)
        _LOG.info("%s: %s", context.stage, _said(limits, costs, found))
        return _Built(found, allocator, make, costs, max(_shares(costs, limits)))

    def _out_of_reach(self, least: _Built, limits: Limits) -> CompressError:
        fields = [field for field in ("bytes", "latency_ms", "latency") if getattr(self, field) is not None]
        budgets = [getattr(self, field) for field in fields]
        shares = _shares(least.costs, limits)
        reached = [f"{f}={_number(b * share, f)}" for f, b, share in zip(fields, budgets, shares, strict=True)]
        given = [f"{field}={_number(budget, field)}" for field, budget in zip(fields, budgets, strict=True)]
        return CompressError(
            "budget",
            expected=f"at least {', '.join(reached)}, the file with every layer at its cheapest level, as measured",
            received=", ".join(given),
            fix=f"Allow more, or add levels or techniques, e.g. techniques.lowrank.ranks=[0.5,0.25,0.125] "
            f"(now: {', '.join(technique.name for technique in self.techniques)}).",
        )

    def _check_costs(self, built: _Built, result: Candidate, limits: Limits, context: Context) -> float | None:
        """Refuse a file that is too large or slow after the training; return which share of the time it takes.

        As times are noisy, two percent more are let pass. Its time is that of the file before, as it was measured,
        times how much longer it takes with both in turns.
        """
        longer = None
        if limits.milliseconds is not None:
            time = built.costs[-1] * _times_longer(built.make(), result, context)
            longer = time / limits.milliseconds
            if longer > _NOISE:
                other = any(technique.trained for technique in self.techniques)
                field, given = ("latency_ms", self.latency_ms) if self.latency is None else ("latency", self.latency)
                assert given is not None
                raise CompressError(
                    f"budget.{field}",
                    expected=f"at most {given:.4g} after the training, too",
                    received=f"{given * longer:.4g}" + (", as `trained` makes the levels" if other else ""),
                    fix=f"Aim lower, budget.{field}={given / longer:.4g}"
                    + (", or leave `trained` out." if other else ", or measure on an idle board."),
                )
        if self.bytes is not None:
            size, _ = measure_files(result, context, latency=False)
            if size > self.bytes:
                raise CompressError(
                    "budget.bytes",
                    expected=f"at most {self.bytes:,} bytes after the training, too",
                    received=f"{size:,}: its weights cannot be coded as well as those before it",
                    fix=f"Allow {size:,}: this was the smallest file before the training."
                    if built.least
                    else f"Aim lower, budget.bytes={int(self.bytes * self.bytes / size * 0.99)}, and the file will be "
                    f"near {self.bytes:,}.",
                )
        return longer

    def _check_accuracy(self, result: Candidate, context: Context) -> None:
        """Refuse a file that has lost too much."""
        if self.accuracy_drop is None:
            return
        with tempfile.TemporaryDirectory(prefix=".measured-") as folder:
            data = context.data
            original = context.export(Candidate(context.reference), Path(folder, "a.tflite"))
            before = file_accuracy(original.path, data.evaluated)
            after = file_accuracy(context.export(result, Path(folder, "b.tflite")).path, data.evaluated)
        if before - after > self.accuracy_drop:
            raise CompressError(
                "budget.accuracy_drop",
                expected=f"at most {self.accuracy_drop:g} points below the {before:.2f} % of the baseline's file",
                received=f"{after:.2f} %, {before - after:.2f} points below",
                fix="Allow more bytes or milliseconds, or more epochs (strategy.auto.recovery.epochs), or write "
                "budget.accuracy_drop=null to have the file as it is.",
            )


@plain_dataclass(frozen=True)
class _Built:
    """An allocation, what builds it without training, what that costs, and the largest share of a limit that this is.

    ``least``: nothing takes less.
    """

    allocation: Allocation
    allocator: Allocator
    make: Callable[[], Candidate]
    costs: tuple[float, ...]
    share: float
    least: bool = False


def _times_longer(first: Candidate, second: Candidate, context: Context) -> float:
    """Return how much longer the second one's file takes than the first one's on the board, both in turns."""
    with tempfile.TemporaryDirectory(prefix=".measured-") as folder:
        names = ("first.tflite", "second.tflite")
        files = [context.export(c, Path(folder, n)) for c, n in zip((first, second), names, strict=True)]
        before, after = context.median_latencies(files, "bytes")
    return after / before


def _unused(sensitivity: Sensitivity, techniques: Sequence[Technique]) -> list[Skipped]:
    """Return the techniques that no layer takes at any level, and why."""
    found = []
    for technique in techniques:
        probes = [probe for probe in sensitivity.probes if probe.technique == technique.name]
        reasons = dict.fromkeys(probe.refused for probe in probes if probe.refused is not None)
        if all(probe.refused is not None for probe in probes):
            found.append(Skipped(f"techniques.{technique.name}", f"no layer takes it: {next(iter(reasons), 'none')}"))
    return found


def _shares(costs: Sequence[float], limits: Limits) -> list[float]:
    return [cost / limit for cost, limit in zip(costs, limits.given, strict=True)]


def _units(limits: Limits) -> list[str]:
    pairs = (("bytes", limits.bytes), ("latency_ms", limits.milliseconds))
    return [name for name, limit in pairs if limit is not None]


def _scaled(limits: Limits, corrections: Sequence[float]) -> Limits:
    factors = dict(zip(_units(limits), corrections, strict=True))
    return Limits(
        None if limits.bytes is None else limits.bytes / factors["bytes"],
        None if limits.milliseconds is None else limits.milliseconds / factors["latency_ms"],
    )


def _said(limits: Limits, real: Sequence[float], found: Allocation) -> str:
    parts = [
        f"{unit} {_number(value, unit)} of {_number(limit, unit)}"
        for unit, value, limit in zip(_units(limits), real, limits.given, strict=True)
    ]
    return f"{', '.join(parts)}; written as {found.way.name}, divergence {found.divergence:.2e}"


def _number(value: float, unit: str) -> str:
    return f"{value:.0f}" if unit == "bytes" else f"{value:.4g}"
