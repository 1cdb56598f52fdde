"""What the whole model costs as floats, and under each technique that decides how weights are written."""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.candidate import Candidate, Skipped, Storage
from compress.errors import CompressError
from compress.metrics.counts import count_macs
from compress.progress import progress
from compress.search.allocation import Limits, Saving, Way
from compress.search.sensitivity import Sensitivity, costs_of, inner_context
from compress.search.stored import measure_files
from compress.search.technique import Kind, Technique, Value, kernels_by_origin, layers_by_resolution, stage
from compress.strategies.strategy import Context

_LOG = logging.getLogger("compress")
_MOST_SAVING = 3.0
"""A board may save more time than multiply-adds say, or lose some; more than this is noise."""
_LEAST_SAVED = 0.02
"""Share of the model's multiply-adds: what fewer of them save in time is noise."""
_AT_ONCE = 5
"""Narrower files that take turns with the whole one."""


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
) -> tuple[list[Technique | None], tuple[Skipped, ...]]:
    """Return who decides how weights are written, nobody (floats) or a technique, and those that are left out.

    With a limit in milliseconds those are left out whose files the board does not time; this is asked before anything
    takes long.

    Raises:
        CompressError: if the board times none of them.
    """
    every = [None, *(technique for technique in techniques if technique.strategy.stores is not None)]
    if limits.milliseconds is None:
        return every, ()
    found: list[Technique | None] = []
    reasons: dict[str, str] = {}
    for technique in every:
        storage = Storage() if technique is None else Storage(technique.strategy.stores or "float32")
        try:
            measure_files(candidate.evolve(storage=storage), context, latency=True)
            found.append(technique)
        except CompressError as error:
            reasons["floats" if technique is None else f"techniques.{technique.name}"] = error.received
    if not found:
        raise _no_time("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    for name, reason in reasons.items():
        _LOG.warning("%s: the board does not time such files: %s", name, reason)
    left_out = ((name, reason) for name, reason in reasons.items() if name != "floats")
    return found, tuple(Skipped(name, f"the board does not time its files: {reason}") for name, reason in left_out)


def _no_time(received: str) -> CompressError:
    return CompressError(
        "budget.latency_ms",
        expected="a board that gives the latency of the model's file",
        received=received,
        fix="Choose another board, or give budget.bytes instead.",
    )


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
        changed = [
            [probe.technique, probe.value, probe.layer]
            for probe in sensitivity.probes
            if probe.refused is None and probe.technique in {t.name for t in (*structural, technique) if t is not None}
        ]
        make = functools.partial(_measured, made, narrower, list(sensitivity.layers), context)
        known = context.remember("latency of levels", [context.board, own, levels, changed], make)
        found.append(_way(technique, rest, sensitivity, known))
    if not found:
        raise _no_time("one that times no file in which a layer is changed")
    return found


def _way(technique: Technique | None, rest_bytes: float, sensitivity: Sensitivity, known: Mapping[str, Any]) -> Way:
    whole, layers = known["milliseconds"], sensitivity.layers
    rates: dict[Saving, float] = {}
    for row in known["narrower"]:
        if row["macs_saved"] >= _LEAST_SAVED:
            rate = min(max((1 - row["kept"]) / row["macs_saved"], -_MOST_SAVING), _MOST_SAVING)
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
    # Where nothing saves any time in its own layers, it does not in those that read them either.
    saving = {key: rate / (largest[key[2]] or 1.0) for key, rate in rates.items()}
    return Way(technique, rest_bytes, times, whole - sum(times.values()), saving)


def _measured(
    made: Candidate, narrower: Callable[[], Sequence[_Narrower]], originals: Sequence[str], context: Context
) -> dict[str, Any]:
    """Return the time of a file, and which part of it the narrower ones take, as plain values.

    A few files at a time take turns with the whole one: each is a process of its own on some boards. One that the board
    does not time says nothing of its level.
    """
    others, macs = narrower(), count_macs(made.model)
    wholes: list[float] = []
    rows = []
    with tempfile.TemporaryDirectory(prefix=".measured-") as folder, progress("latency of levels") as shown:
        first = context.export(made, Path(folder, "whole.tflite"))
        for start in range(0, max(len(others), 1), _AT_ONCE):
            some = others[start : start + _AT_ONCE]
            files = [
                context.export(_stored_like(made, other.candidate, originals), Path(folder, f"{number}.tflite"))
                for number, other in enumerate(some)
            ]
            whole, *times = (measurement.cost_ms for measurement in context.measurements([first, *files]))
            if not whole:
                raise _no_time("one that has stopped giving it")
            wholes.append(whole)
            rows += [
                {
                    "technique": other.technique.name,
                    "value": other.value,
                    "layers": other.layers,
                    "macs_saved": 1 - count_macs(other.candidate.model) / macs,
                    "kept": time / whole,
                }
                for other, time in zip(some, times, strict=True)
                if time is not None
            ]
            shown.advance(min(start + _AT_ONCE, len(others)), len(others), "files")
    return {"milliseconds": float(np.median(wholes)), "narrower": rows}


def _stored_like(made: Candidate, other: Candidate, originals: Sequence[str]) -> Candidate:
    """Return the other candidate, its file written like the one that is made: the same layers as floats."""
    floats = set(made.storage.float_layers)
    places = kernels_by_origin(other.model, originals).items()
    names = [kernel.layer.name for layer, found in places if layer in floats for kernel in found]
    there = [layer.name for layer in other.model.layers if layer.name in floats]
    return other.evolve(storage=replace(made.storage, float_layers=tuple(dict.fromkeys((*there, *names))), ranges={}))


def _narrower(
    candidate: Candidate, sensitivity: Sensitivity, techniques: Sequence[Technique], context: Context
) -> list[_Narrower]:
    found = []
    groups = layers_by_resolution(candidate.model)
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
    layers = sensitivity.takers(technique, value, among)
    if not layers:
        return None
    try:
        return stage(technique.name, technique.levels[value], layers).apply(
            candidate, inner_context(context, technique.name)
        )
    except CompressError:
        # Layers that can be changed one by one may not go together.
        return None
