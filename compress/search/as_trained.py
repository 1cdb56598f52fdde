"""What levels lose as they are made where training follows: by the strategies under ``trained``, which may repair."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

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
    bench = functools.cache(lambda: Bench(candidate, context, list(sensitivity.layers), images))
    wanted = [(technique, value, layers) for technique in repairing for value in technique.levels for layers in groups]
    known = {(probe.technique, probe.value, probe.layer): probe.divergence for probe in sensitivity.probes}

    def measured(technique: Technique, value: Value, layers: list[str]) -> _Measured:
        settings = [*technique.config(value), technique.trained_config(value), layers, images]
        make = functools.partial(_measure, bench, technique, value, layers)
        loss, changed = context.remember("level as trained", settings, make)
        return _Measured(loss, {layer: known[technique.name, value, layer] for layer in changed})

    ratios: dict[tuple[str, Value, str], float] = {}
    interactions: list[Interaction] = []
    with progress("levels as trained") as shown:
        for number, (technique, value, layers) in enumerate(wanted, start=1):
            takers = sensitivity.takers(technique, value, layers)
            together = measured(technique, value, takers[:: 1 if len(takers) <= _FEW else 2])
            ratio, count = together.ratio, len(together.probed)
            if ratio > 1 and count > 1:
                # Neither the one that loses least, which may be noise, nor one that would not be chosen.
                middle = sorted(together.probed, key=lambda layer: together.probed[layer])[(count - 1) // 2]
                ratio = min(measured(technique, value, [middle]).ratio, ratio)
                more = (together.ratio - ratio) * sum(together.probed.values()) / (count * (count - 1) / 2)
                interactions.append(Interaction(technique.name, value, frozenset(takers), more))
            ratios |= {(technique.name, value, layer): ratio for layer in takers}
            shown.advance(number, len(wanted), technique.label(value))
    probes = (
        replace(probe, divergence=probe.divergence * ratios.get((probe.technique, probe.value, probe.layer), 1.0))
        for probe in sensitivity.probes
    )
    return replace(sensitivity, probes=tuple(probes), interactions=tuple(interactions))


@dataclass(frozen=True)
class _Measured:
    """What layers at a level lose together as it is trained, and the divergences of their probes."""

    loss: float
    probed: Mapping[str, float]

    @property
    def ratio(self) -> float:
        """For each unit that the probes sum up to; 1 where they, or what is lost, are not known."""
        expected = sum(self.probed.values())
        return min(self.loss / expected, _MOST) if expected > 0 else 1.0


def _measure(
    make_bench: Callable[[], Bench], technique: Technique, value: Value, layers: list[str]
) -> tuple[float, list[str]]:
    """Return what layers at a level lose together as it is trained, and those of them that it changes, or none."""
    if not layers:
        return 0.0, []
    bench = make_bench()
    try:
        made = stage(technique.name, technique.trained[value], layers).apply(
            bench.candidate, inner_context(bench.context, technique.name)
        )
    except CompressError:
        # Layers that can be changed one by one may not go together.
        return 0.0, []
    loss, _ = bench.loss(with_stored_values(made, layers, list(bench.costs)))
    skipped = {item.layer for item in made.skipped}
    return loss, [layer for layer in layers if layer not in skipped]
