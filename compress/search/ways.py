"""What the whole model costs as floats, and under each technique that decides how weights are written."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.candidate import Candidate, Storage
from compress.errors import CompressError
from compress.metrics.counts import count_macs
from compress.progress import progress
from compress.search.allocation import Limits, Saving, Way
from compress.search.sensitivity import Sensitivity, costs_of, inner_context
from compress.search.stored import measure_files, write_files
from compress.search.technique import Kind, Technique, Value, layers_by_resolution, stage
from compress.strategies.strategy import Context

_MOST_SAVING = 3.0
"""A board may save more time than multiply-adds say, or lose some; more than this is noise."""
_LEAST_SHARE = 0.1
"""Of the multiply-adds that layers looked at together make: what fewer of them save is lost in the noise of a board."""


@dataclass(frozen=True)
class _Narrower:
    """The model after a structural technique at one level, on the layers of some resolutions."""

    technique: Technique
    value: Value
    layers: list[str]
    """All of these resolutions; the technique may refuse some."""
    candidate: Candidate


def storages(
    candidate: Candidate, techniques: Sequence[Technique], context: Context, limits: Limits
) -> list[Technique | None]:
    """Return who decides how weights are written: nobody (floats), or a technique.

    With a limit in milliseconds those whose files the board times; this is asked before anything takes long.

    Raises:
        CompressError: if the board times none of them.
    """
    every = [None, *(technique for technique in techniques if technique.strategy.stores is not None)]
    if limits.milliseconds is None:
        return every
    found, reasons = [], []
    for technique in every:
        storage = Storage() if technique is None else Storage(technique.strategy.stores or "float32")
        try:
            measure_files(candidate.evolve(storage=storage), context, latency=True)
            found.append(technique)
        except CompressError as error:
            reasons.append(f"{technique.name if technique is not None else 'floats'}: {error.received}")
    if not found:
        raise CompressError(
            "budget.latency_ms",
            expected="a board that gives the latency of the model's file",
            received="; ".join(reasons),
            fix="Choose another board, or give budget.bytes instead.",
        )
    return found


def measure_ways(
    candidate: Candidate,
    sensitivity: Sensitivity,
    techniques: Sequence[Technique],
    stores: Sequence[Technique | None],
    context: Context,
    limits: Limits,
) -> list[Way]:
    """Return the ways to write the model's file: as each of ``stores`` writes all layers that it takes.

    With a limit in milliseconds the board measures each of these files, and in turns with it what it becomes by each
    level of each structural technique on the layers of a resolution: multiply-adds say little about what is saved by
    fewer channels, by a block less or by a chain of small layers, at many positions or at few.

    Raises:
        CompressError: if the board gives no latency.
    """
    structural = [technique for technique in techniques if technique.kind is Kind.STRUCTURE]
    narrower = functools.cache(lambda: _narrower(candidate, sensitivity, structural, context))
    levels = [technique.config(value) for technique in structural for value in technique.levels]
    found = []
    for technique in stores:
        made: Candidate | None = candidate
        if technique is not None:
            made = _applied(candidate, sensitivity, technique, next(iter(technique.levels)), context)
        if made is None:
            continue
        kernels = sum(cost.bytes for cost in costs_of(made, list(sensitivity.layers)).values())
        rest = measure_files(made, context, latency=False)[0] - kernels
        if limits.milliseconds is None:
            found.append(Way(technique, rest))
            continue
        own = technique.config(next(iter(technique.levels))) if technique is not None else None
        make = functools.partial(_measured, made, narrower, context, stored=technique is not None)
        known = context.remember("latency of levels", [context.board, own, levels, list(sensitivity.layers)], make)
        found.append(_way(technique, rest, sensitivity, known))
    return found


def _way(technique: Technique | None, rest_bytes: float, sensitivity: Sensitivity, known: Mapping[str, Any]) -> Way:
    whole, layers = known["milliseconds"], sensitivity.layers
    rates: dict[Saving, float] = {}
    for row in known["narrower"]:
        rate = (1 - row["milliseconds"] / whole) / row["macs_saved"]
        rate = min(max(rate, -_MOST_SAVING), _MOST_SAVING)
        rates |= {(row["technique"], row["value"], name): rate for name in row["layers"]}
    # What saves most for its multiply-adds saves all that there is: where a block goes, its time does.
    largest = {name: 0.0 for _, _, name in rates}
    for (_, _, name), rate in rates.items():
        largest[name] = max(largest[name], rate)
    total = max(sum(cost.macs for cost in layers.values()), 1)
    times = {name: whole * cost.macs / total * largest.get(name, 1.0) for name, cost in layers.items()}
    # Noise must not make the rest of the file take less than no time.
    most = whole / max(sum(times.values()), whole)
    times = {name: time * most for name, time in times.items()}
    saving = {key: rate / largest[key[2]] for key, rate in rates.items() if largest[key[2]]}
    return Way(technique, rest_bytes, times, whole - sum(times.values()), saving)


def _measured(
    made: Candidate, narrower: Callable[[], Sequence[_Narrower]], context: Context, *, stored: bool
) -> dict[str, Any]:
    """Return what the board says of a file and of the narrower ones, as plain values."""
    storage = replace(made.storage, float_layers=(), ranges={}) if stored else Storage()
    others = narrower()
    whole = count_macs(made.model)
    with tempfile.TemporaryDirectory(prefix=".measured-") as folder, progress("latency of levels") as shown:
        artifacts = []
        for number, one in enumerate((made, *(other.candidate.evolve(storage=storage) for other in others))):
            place = Path(folder, str(number))
            place.mkdir()
            artifacts.append(write_files(one, context, place))
            shown.advance(number + 1, len(others) + 1, "files")
        first, *times = context.median_latencies(artifacts, "bytes")
    rows = [
        {
            "technique": other.technique.name,
            "value": other.value,
            "layers": other.layers,
            "macs_saved": 1 - count_macs(other.candidate.model) / whole,
            "milliseconds": time,
        }
        for other, time in zip(others, times, strict=True)
    ]
    return {"milliseconds": first, "narrower": rows}


def _narrower(
    candidate: Candidate, sensitivity: Sensitivity, techniques: Sequence[Technique], context: Context
) -> list[_Narrower]:
    found = []
    groups = layers_by_resolution(candidate.model, _LEAST_SHARE)
    whole = count_macs(candidate.model)
    for technique in techniques:
        for value in technique.levels:
            for layers in groups:
                made = _applied(candidate, sensitivity, technique, value, context, layers)
                if made is not None and count_macs(made.model) < whole:
                    found.append(_Narrower(technique, value, layers, made))
    return found


def _applied(
    candidate: Candidate,
    sensitivity: Sensitivity,
    technique: Technique,
    value: Value,
    context: Context,
    among: Sequence[str] | None = None,
) -> Candidate | None:
    """Return the candidate after a level on all layers that take it; None if none does, or not together."""
    layers = [
        probe.layer
        for probe in sensitivity.probes
        if (probe.technique, probe.value) == (technique.name, value)
        and probe.refused is None
        and (among is None or probe.layer in among)
    ]
    if not layers:
        return None
    try:
        return stage(technique.name, technique.levels[value], layers).apply(
            candidate, inner_context(context, technique.name)
        )
    except CompressError:
        # Layers that can be changed one by one may not go together.
        return None
