"""What the whole model costs as floats, and under each technique that decides how weights are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from compress.candidate import Candidate, Storage
from compress.errors import CompressError
from compress.metrics.counts import count_macs
from compress.search.allocation import Limits, Way
from compress.search.sensitivity import Sensitivity, costs_of, inner_context
from compress.search.stored import measure_files
from compress.search.technique import Kind, Technique, Value, stage
from compress.strategies.strategy import Context

_MOST_SAVING = 1.5
"""A board may save more time than multiply-adds say; more than this is noise."""


def measure_ways(
    candidate: Candidate,
    sensitivity: Sensitivity,
    techniques: Sequence[Technique],
    context: Context,
    limits: Limits,
) -> list[Way]:
    """Return the ways to write the model's file: floats, and each technique of storage on all layers that it takes.

    With a limit in milliseconds the board measures each of these files, and again after each structural technique at
    its middle level on all layers that it takes: multiply-adds say little about what a chain of small layers saves.

    Raises:
        CompressError: if the board gives no latency.
    """
    stores = [technique for technique in techniques if technique.strategy.stores is not None]
    latency = limits.milliseconds is not None
    narrower = _at_middle_level(candidate, sensitivity, techniques, context) if latency else {}
    found = []
    for technique in (None, *stores):
        made = candidate
        if technique is not None:
            applied = _applied(candidate, sensitivity, technique, next(iter(technique.levels)), context)
            if applied is None:
                continue
            made = applied
        size, milliseconds = measure_files(made, context, latency=latency)
        kernels = sum(cost.bytes for cost in costs_of(made, list(sensitivity.layers)).values())
        saving = {}
        for name, other in narrower.items():
            storage = replace(made.storage, float_layers=(), ranges={}) if technique is not None else Storage()
            _, time = measure_files(other.evolve(storage=storage), context, latency=True)
            expected = 1 - count_macs(other.model) / count_macs(candidate.model)
            if milliseconds and time and expected > 0:
                saving[name] = min(max((1 - time / milliseconds) / expected, 0.0), _MOST_SAVING)
        found.append(Way(technique, size - kernels, milliseconds, saving))
    return found


def _at_middle_level(
    candidate: Candidate, sensitivity: Sensitivity, techniques: Sequence[Technique], context: Context
) -> dict[str, Candidate]:
    found = {}
    for technique in techniques:
        if technique.kind is Kind.STRUCTURE:
            values = list(technique.levels)
            made = _applied(candidate, sensitivity, technique, values[len(values) // 2], context)
            if made is not None:
                found[technique.name] = made
    return found


def _applied(
    candidate: Candidate, sensitivity: Sensitivity, technique: Technique, value: Value, context: Context
) -> Candidate | None:
    """Return the candidate after a level on all layers that take it; None if none does, or not together."""
    layers = [
        probe.layer
        for probe in sensitivity.probes
        if (probe.technique, probe.value) == (technique.name, value) and probe.refused is None
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
