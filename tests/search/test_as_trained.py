"""What `trained` repairs costs less, and the choice knows."""

from __future__ import annotations

import pytest
import tf_keras

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


def test_of_many_layers_of_a_resolution_every_other_one_speaks_for_all(data):
    tf_keras.utils.set_random_seed(0)
    image = x = tf_keras.Input(data.train.x.shape[1:])
    names = [f"conv{number}" for number in range(5)]
    for name in names:
        x = tf_keras.layers.Conv2D(6, 3, padding="same", activation="relu", name=name)(x)
    x = tf_keras.layers.GlobalAveragePooling2D()(x)
    deep = tf_keras.Model(image, tf_keras.layers.Dense(10, name="logits")(x))
    chosen = techniques(prune_channels={**REPAIRED, "channels": [0.5]})
    context = context_of(deep, data)
    before = measure_sensitivity(Candidate(deep), chosen, context, IMAGES)
    old = divergences(before)
    new = divergences(as_trained(Candidate(deep), before, chosen, context, IMAGES))
    every_other = names[::2]
    made = stage("auto", chosen[0].trained[0.5], every_other).apply(Candidate(deep), context)
    bench = Bench(Candidate(deep), context, list(before.layers), IMAGES)
    together, _ = bench.loss(with_stored_values(made, every_other, list(bench.costs)))
    ratio = together / sum(old[name, 0.5] for name in every_other)
    assert list(new) == [(name, 0.5) for name in names]
    assert [new[key] / old[key] for key in new] == pytest.approx([ratio] * 5, rel=1e-3)


def test_what_blocks_lose_together_beyond_what_one_loses_is_that_of_their_pairs(data):
    tf_keras.utils.set_random_seed(0)
    layers = tf_keras.layers
    image = tf_keras.Input(data.train.x.shape[1:])
    x = layers.Conv2D(8, 3, padding="same", name="stem")(layers.Rescaling(1 / 16)(image))
    for number in range(5):
        y = layers.Conv2D(8, 3, padding="same", activation="relu", name=f"inner{number}")(x)
        x = layers.Add(name=f"sum{number}")([x, layers.Conv2D(8, 3, padding="same", name=f"outer{number}")(y)])
    deep = tf_keras.Model(image, layers.Dense(10, name="logits")(layers.GlobalAveragePooling2D()(x)))
    # All blocks add about the same: without three of them the outputs are thrice as far, and errors grow like squares.
    for number in range(1, 5):
        for name in ("inner", "outer"):
            deep.get_layer(f"{name}{number}").set_weights(deep.get_layer(f"{name}0").get_weights())
    # Nothing is repaired here, so that each block alone loses what its probe did.
    fields = {"channels": [0], "ranking": "layer", "trained": {"ranking": "layer"}}
    chosen, context = techniques(prune_channels=fields), context_of(deep, data)
    before = measure_sensitivity(Candidate(deep), chosen, context, IMAGES)
    found = as_trained(Candidate(deep), before, chosen, context, IMAGES)
    assert divergences(found) == pytest.approx(divergences(before), rel=1e-3)
    (item,) = found.interactions
    assert (item.technique, item.value, item.layers) == ("prune_channels", 0, {f"inner{n}" for n in range(5)})
    every_other = ["inner0", "inner2", "inner4"]
    made = stage("auto", chosen[0].trained[0], every_other).apply(Candidate(deep), context)
    bench = Bench(Candidate(deep), context, list(before.layers), IMAGES)
    together, _ = bench.loss(with_stored_values(made, every_other, list(bench.costs)))
    alone = sum(divergences(before)[name, 0] for name in every_other)
    assert together > alone
    assert alone + 3 * item.per_pair == pytest.approx(together, rel=1e-3)


@pytest.mark.parametrize("trained", [{}, {"trained": "qat"}])
def test_what_does_not_repair_is_left_as_it_is(trained, model, data):
    context, chosen = context_of(model, data), techniques(quantize={"bits": [4], **trained})
    before = measure_sensitivity(Candidate(model), chosen, context, IMAGES)
    assert as_trained(Candidate(model), before, chosen, context, IMAGES) is before
