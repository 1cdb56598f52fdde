"""What levels lose as they are made where training follows: by the strategies under ``trained``, which may repair."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

from compress.candidate import Candidate
from compress.errors import CompressError
from compress.progress import progress
from compress.search.sensitivity import Bench, Sensitivity, inner_context, with_stored_values
from compress.search.technique import Kind, Technique, Value, layers_by_resolution, stage
from compress.strategies.strategy import Context, Strategy

_LAYERS = 3
"""So many layers of a resolution, spread over its depth, stand for all: of many, both would lose everything."""


def as_trained(
    candidate: Candidate, sensitivity: Sensitivity, techniques: Sequence[Technique], context: Context, images: int
) -> Sensitivity:
    """Return the sensitivities of the levels as the strategies under ``trained`` make them.

    To measure these layer by layer would take long: some re-solve all layers that follow. So a level is applied to a
    few layers of each resolution together, by the strategy that the probes were made with and by the one under
    ``trained``; the divergences of the level's probes there are multiplied by the ratio of what the two lose. Values
    are left as they are: what binds them where there is training does nothing else without.

    Args:
        candidate: the model.
        sensitivity: of its layers, by the strategies that are not for training.
        techniques: with what is under ``trained``.
        context: of the stage; it remembers each ratio.
        images: of the validation part.
    """
    repairing = [technique for technique in techniques if technique.kind is not Kind.VALUES and technique.trained]
    if not repairing:
        return sensitivity
    groups = layers_by_resolution(candidate.model)
    ratios: dict[tuple[str, Value, str], float] = {}
    bench = functools.cache(lambda: Bench(candidate, context, list(sensitivity.layers), images))
    wanted = [(technique, value, layers) for technique in repairing for value in technique.levels for layers in groups]
    with progress("levels as trained") as shown:
        for number, (technique, value, layers) in enumerate(wanted, start=1):
            takers = sensitivity.takers(technique, value, layers)
            some = takers[:: max(-(-len(takers) // _LAYERS), 1)]
            if some:
                make = functools.partial(_ratio, bench, technique, value, some)
                settings = [*technique.config(value), technique.trained_config(value), some, images]
                ratio = context.remember("level as trained", settings, make)
                ratios |= {(technique.name, value, layer): ratio for layer in takers}
            shown.advance(number, len(wanted), technique.label(value))
    probes = (
        replace(probe, divergence=probe.divergence * ratios.get((probe.technique, probe.value, probe.layer), 1.0))
        for probe in sensitivity.probes
    )
    return replace(sensitivity, probes=tuple(probes))


def _ratio(bench: Callable[[], Bench], technique: Technique, value: Value, layers: list[str]) -> float:
    """Return what a level loses as it is trained, for each unit that it loses as it was probed; at most 1."""
    probed = _loss(bench(), technique.name, technique.levels[value], layers)
    trained = _loss(bench(), technique.name, technique.trained[value], layers)
    if probed is None or trained is None or probed <= 0:
        return 1.0
    return min(trained / probed, 1.0)


def _loss(bench: Bench, name: str, strategy: Strategy, layers: Sequence[str]) -> float | None:
    try:
        made = stage(name, strategy, layers).apply(bench.candidate, inner_context(bench.context, name))
    except CompressError:
        # Layers that can be changed one by one may not go together.
        return None
    return bench.loss(with_stored_values(made, layers, list(bench.costs)))[0]
