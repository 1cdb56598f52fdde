"""What levels lose as they are made where training follows: by the strategies under ``trained``, which may repair."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from compress.candidate import Candidate
from compress.errors import CompressError
from compress.progress import progress
from compress.search.sensitivity import Bench, Interaction, Sensitivity, inner_context, with_stored_values
from compress.search.technique import Kind, Technique, Value, layers_by_resolution, stage
from compress.strategies.strategy import Context

_MOST = 10.0
"""A level whose probes found next to nothing costs no more than so many times that."""
_FEW = 3
"""Of more layers of a resolution, every other one is changed: about as many as an allocation brings to one level."""


def as_trained(
    candidate: Candidate, sensitivity: Sensitivity, techniques: Sequence[Technique], context: Context, images: int
) -> Sensitivity:
    """Return the sensitivities of the levels as the strategies under ``trained`` make them.

    To measure these layer by layer would take long: some re-solve all layers that follow. So a level is brought to
    many layers of each resolution together by the strategy under ``trained``; the divergences of the level's probes
    there are multiplied by what that loses, as a share of their sum: of channels whose loss is repaired a tenth of it.
    Where it is more than the sum, as for blocks that go, one layer is brought to the level alone, too: what is lost
    beyond that is what pairs of them lose. Values are left as they are: what binds them where there is training does
    nothing else without.

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
    interactions: list[Interaction] = []
    bench = functools.cache(lambda: Bench(candidate, context, list(sensitivity.layers), images))
    divergences = {(p.technique, p.value, p.layer): p.divergence for p in sensitivity.probes}
    wanted = [(technique, value, layers) for technique in repairing for value in technique.levels for layers in groups]

    def ratio_of(technique: Technique, value: Value, probed: Mapping[str, float]) -> float:
        settings = [*technique.config(value), technique.trained_config(value), list(probed), images]
        make = functools.partial(_ratio, bench, technique, value, probed)
        return float(context.remember("level as trained", settings, make))

    with progress("levels as trained") as shown:
        for number, (technique, value, layers) in enumerate(wanted, start=1):
            takers = sensitivity.takers(technique, value, layers)
            some = takers[:: 1 if len(takers) <= _FEW else 2]
            if some:
                probed = {layer: divergences[technique.name, value, layer] for layer in some}
                ratio, count = ratio_of(technique, value, probed), len(some)
                if ratio > 1 and count > 1:
                    least = min(some, key=lambda layer: probed[layer])
                    together, ratio = ratio, ratio_of(technique, value, {least: probed[least]})
                    more = max(together - ratio, 0.0) * sum(probed.values()) / (count * (count - 1) / 2)
                    interactions.append(Interaction(technique.name, value, tuple(takers), more))
                ratios |= {(technique.name, value, layer): ratio for layer in takers}
            shown.advance(number, len(wanted), technique.label(value))
    probes = (
        replace(probe, divergence=probe.divergence * ratios.get((probe.technique, probe.value, probe.layer), 1.0))
        for probe in sensitivity.probes
    )
    return replace(sensitivity, probes=tuple(probes), interactions=tuple(interactions))


def _ratio(make_bench: Callable[[], Bench], technique: Technique, value: Value, probed: Mapping[str, float]) -> float:
    """Return what layers at a level lose together as it is trained, for each unit that their probes sum up to.

    ``probed``: layer -> divergence of its probe.
    """
    bench, layers = make_bench(), list(probed)
    try:
        made = stage(technique.name, technique.trained[value], layers).apply(
            bench.candidate, inner_context(bench.context, technique.name)
        )
    except CompressError:
        # Layers that can be changed one by one may not go together.
        return 1.0
    trained, _ = bench.loss(with_stored_values(made, layers, list(bench.costs)))
    skipped = {item.layer for item in made.skipped}
    expected = sum(divergence for layer, divergence in probed.items() if layer not in skipped)
    return min(trained / expected, _MOST) if expected > 0 else 1.0
