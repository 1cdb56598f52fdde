"""An allocation made real: its stages one after the other, each checked like a pipeline's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from compress.candidate import Allocated, Candidate, Effect, Skipped
from compress.graph.rewrite import copy_model
from compress.pipeline.stage import Stage, require_kept
from compress.search.allocation import Allocation, Allocator
from compress.search.sensitivity import inner_context
from compress.search.technique import Kind, Technique, Value, kernels_by_origin
from compress.strategies.strategy import Context

_FLOAT_SHARE = 0.8
"""Of the epochs, before values are bound, where something is trained after that, too: that loses less than cuts do."""
_LATE_RATE = 0.25
"""Of the learning rate, in the training after that."""


def realise(
    candidate: Candidate, allocation: Allocation, techniques: Sequence[Technique], context: Context, *, trains: bool
) -> Candidate:
    """Return the candidate after the stages of the allocation: structure, zeros, values, how the file is written.

    With ``trains`` the recovery's epochs are divided: most of them once structure and zeros are there, the others, at a
    lower rate, among the stages that train values; all in one place where there is only one.

    Raises:
        CompressError: as the stages do.
    """
    result = candidate
    early = [t for t in techniques if t.kind is not Kind.VALUES and _levels(allocation, t)]
    # How the file is written comes last.
    late = sorted(
        (t for t in techniques if t.kind is Kind.VALUES and _levels(allocation, t)),
        key=lambda t: t.strategy.stores is not None,
    )
    skipped: list[Skipped] = []
    for technique in sorted(early, key=lambda t: t.kind):
        for made in _stages(result, allocation, technique, trains=trains):
            result = _applied(made, result, context)
            skipped += result.skipped
    makes = {t.name: _stages(result, allocation, t, trains=trains) for t in late}
    learning = sum(_learns(stage) for stages in makes.values() for stage in stages)
    if trains and (early or not learning):
        first = context.recovery.part(_FLOAT_SHARE if learning else 1.0)
        result = _recovered(result, context.for_stage(context.stage, recovery=first))
    last = context.recovery.part((1 - _FLOAT_SHARE if early else 1.0) / max(learning, 1))
    if early:
        last = replace(last, learning_rate=_LATE_RATE * last.learning_rate)
    for technique in late:
        for made in makes[technique.name]:
            recovery = last if trains and _learns(made) else made.recovery
            result = _applied(replace(made, recovery=recovery), result, context)
            skipped += result.skipped
    return result.evolve(skipped=tuple(dict.fromkeys(skipped)), lineage=candidate.lineage)


def table(allocation: Allocation, allocator: Allocator) -> tuple[Allocated, ...]:
    """Return the allocation layer by layer, for the report."""
    sizes, times = allocator.bytes_of(allocation.chosen), allocator.milliseconds_of(allocation.chosen)
    lost = allocator.divergences(allocation.chosen)
    return tuple(
        Allocated(
            name,
            tuple(f"{probe.technique} {probe.field}={probe.value:g}" for probe in combination),
            lost[name],
            round(sizes[name]),
            times[name] if allocation.way.times else None,
        )
        for name, combination in allocation.chosen.items()
    )


def _learns(stage: Stage) -> bool:
    return Effect.TRAIN in stage.strategy.effects


def _levels(allocation: Allocation, technique: Technique) -> dict[Value, list[str]]:
    found: dict[Value, list[str]] = {}
    for layer, combination in allocation.chosen.items():
        for probe in combination:
            if probe.technique == technique.name:
                found.setdefault(probe.value, []).append(layer)
    return found


def _stages(now: Candidate, allocation: Allocation, technique: Technique, *, trains: bool) -> list[Stage]:
    """Return the technique's stages on what stands in the place of the layers by now."""
    places = _places(now, list(allocation.chosen))
    chosen: Mapping[Value, list[str]] = {
        value: [name for layer in layers for name in places[layer]]
        for value, layers in _levels(allocation, technique).items()
    }
    # A layer may have gone with the block around it.
    return technique.stages({value: names for value, names in chosen.items() if names}, trains=trains)


def _places(candidate: Candidate, layers: Sequence[str]) -> dict[str, list[str]]:
    return {
        layer: list(dict.fromkeys(kernel.layer.name for kernel in found))
        for layer, found in kernels_by_origin(candidate.model, layers).items()
    }


def _applied(stage: Stage, candidate: Candidate, context: Context) -> Candidate:
    # What it establishes is the whole stage's, which later stages may release by its name.
    return replace(stage, name=context.stage).apply(candidate, inner_context(context, context.stage))


def _recovered(candidate: Candidate, context: Context) -> Candidate:
    # It trains in place.
    result = context.recover(candidate.evolve(model=copy_model(candidate.model)))
    for guarantee in result.guarantees:
        require_kept(guarantee, guarantee.check(result.model), context.stage, "the model")
    return result
