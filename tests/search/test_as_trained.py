"""What `trained` repairs costs less, and the choice knows."""

from __future__ import annotations

import pytest

from compress.candidate import Candidate
from compress.search.as_trained import as_trained
from compress.search.sensitivity import Bench, Sensitivity, measure_sensitivity, with_stored_values
from compress.search.technique import stage
from tests.search.toys import Memory, context_of, techniques

IMAGES = 60
REPAIRED = {"channels": [0.5, 0.75], "criterion": "random", "ranking": "layer"}
REPAIRED |= {"trained": {"criterion": "reconstruction", "ranking": "layer", "images": 128}}


def divergences(found: Sensitivity) -> dict[tuple[str, float], float]:
    return {(p.layer, p.value): p.divergence for p in found.probes if p.refused is None}


def test_divergences_are_those_of_what_repairs(model, data):
    memory = Memory()
    context, chosen = context_of(model, data, memory), techniques(prune_channels=REPAIRED)
    before = measure_sensitivity(Candidate(model), chosen, context, IMAGES)
    found = as_trained(Candidate(model), before, chosen, context, IMAGES)
    old, new = divergences(before), divergences(found)
    bench = Bench(Candidate(model), context, list(before.layers), IMAGES)
    for layer, value in new:
        made = stage("auto", chosen[0].trained[value], [layer]).apply(Candidate(model), context)
        real, _ = bench.loss(with_stored_values(made, [layer], list(bench.costs)))
        assert new[layer, value] < 0.2 * old[layer, value]
        # The two convolutions share a ratio, the other layer has one of its own.
        if layer == "fc1":
            assert new[layer, value] == pytest.approx(real, rel=1e-3)
        assert real / 4 < new[layer, value] < 4 * real
    for value in chosen[0].levels:
        layers = [layer for layer, level in new if level == value and layer != "fc1"]
        made = stage("auto", chosen[0].trained[value], layers).apply(Candidate(model), context)
        together, _ = bench.loss(with_stored_values(made, layers, list(bench.costs)))
        assert sum(new[layer, value] for layer in layers) == pytest.approx(together, rel=1e-3)
    count = memory.made
    assert divergences(as_trained(Candidate(model), before, chosen, context, IMAGES)) == new
    assert memory.made == count, "it is remembered"


@pytest.mark.parametrize("trained", [{}, {"trained": "qat"}])
def test_what_does_not_repair_is_left_as_it_is(trained, model, data):
    context, chosen = context_of(model, data), techniques(quantize={"bits": [4], **trained})
    before = measure_sensitivity(Candidate(model), chosen, context, IMAGES)
    assert as_trained(Candidate(model), before, chosen, context, IMAGES) is before
