"""Channel pruning: budgets, criteria against NumPy, rounding, steps, what an earlier stage established."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tf_keras

from compress.candidate import Candidate
from compress.data.digits import Digits
from compress.errors import CompressError
from compress.graph.channels.groups import Channels
from compress.graph.kernels import kernels
from compress.graph.rewrite import rewrite
from compress.graph.selection import Rule, Selection
from compress.metrics.counts import count_params
from compress.strategies.pruning.channels import PruneChannels
from compress.strategies.pruning.magnitude import Prune
from compress.strategies.pruning.saliency import Evidence, criteria
from compress.strategies.pruning.zeros import Zeros
from compress.strategies.strategy import Context
from compress.training import Recovery

layers = tf_keras.layers


@pytest.fixture(scope="module")
def data():
    return Digits(train_limit=256, test_limit=64).load()


@pytest.fixture(scope="module")
def model() -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((8, 8, 1))
    x = layers.Conv2D(16, 3, padding="same", name="stem")(layers.Rescaling(1 / 16)(image))
    y = layers.ReLU()(layers.BatchNormalization(name="norm")(layers.Conv2D(24, 3, padding="same", name="inner")(x)))
    x = layers.ReLU()(layers.Add()([x, layers.Conv2D(16, 3, padding="same", name="outer")(y)]))
    built = tf_keras.Model(image, layers.Dense(10, name="logits")(layers.GlobalAveragePooling2D()(x)))
    rng = np.random.default_rng(0)
    built.get_layer("norm").set_weights([rng.uniform(0.5, 2, 24), rng.normal(size=24) / 9, np.zeros(24), np.ones(24)])
    return rewrite(built)


@pytest.fixture
def context(data, model) -> Context:
    return Context("prune_channels", data, model, Recovery(method="none"), 0)


def macs(model: tf_keras.Model) -> int:
    return sum(k.macs for k in kernels(model))


@pytest.mark.parametrize("ranking", ["global", "layer"])
@pytest.mark.parametrize(("unit", "keep"), [("macs", 0.5), ("macs", 0.25), ("params", 0.5), ("channels", 0.5)])
def test_a_budget_is_met_and_not_by_far(ranking, unit, keep, model, context):
    result = PruneChannels(**{unit: keep}, ranking=ranking).apply(Candidate(model), context)
    if unit == "channels":
        left = sum(result.model.get_layer(name).output_shape[-1] for name in ("stem", "inner")) / 40
    else:
        count = {"macs": macs, "params": count_params}[unit]
        left = count(result.model) / count(model)
    assert keep - 0.07 <= left <= keep + 1e-9
    assert result.measured["oracle_difference"] < 1e-5
    assert result.model.get_layer("stem").output_shape == result.model.get_layer("outer").output_shape


def test_a_channel_that_does_nothing_goes_first(model, context):
    dead = rewrite(model)
    kernel, bias = dead.get_layer("inner").get_weights()
    kernel[..., 5], bias[5] = 0, 0
    dead.get_layer("inner").set_weights([kernel, bias])
    outer, outer_bias = dead.get_layer("outer").get_weights()
    outer[:, :, 5] = 0
    dead.get_layer("outer").set_weights([outer, outer_bias])
    for name in ("l1", "l2"):
        score = criteria()[name].score(group(dead, "inner"), Evidence(Channels(dead), context.data, 0))
        assert score.argmin() == 5


def group(model: tf_keras.Model, writer: str):
    return next(g for g in Channels(model).groups if writer in g.writers)


def test_norms_by_numpy(model, context):
    evidence = Evidence(Channels(model), context.data, 0)
    inner = model.get_layer("inner").kernel.numpy()
    outer = model.get_layer("outer").kernel.numpy()
    inner_group = group(model, "inner")
    np.testing.assert_allclose(
        criteria()["l1"].score(inner_group, evidence),
        np.abs(inner).sum((0, 1, 2)) + np.abs(outer).sum((0, 1, 3)),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        criteria()["l1_filter"].score(inner_group, evidence), np.abs(inner).sum((0, 1, 2)), rtol=1e-5
    )
    gamma = np.abs(model.get_layer("norm").gamma.numpy())
    np.testing.assert_allclose(criteria()["gamma"].score(inner_group, evidence), gamma, rtol=1e-6)
    flat = inner.reshape(-1, 24).T
    apart = np.linalg.norm(flat[:, None] - flat, axis=-1).sum(1)
    np.testing.assert_allclose(criteria()["geometric_median"].score(inner_group, evidence), apart, rtol=1e-3)


def test_activations_by_a_model_of_their_own(model, context):
    evidence = Evidence(Channels(model), context.data, 3, images=200)
    look = tf_keras.Model(model.inputs, model.get_layer("outer").input)
    chosen = np.random.default_rng(3).permutation(len(context.data.train))[:200]
    values = look.predict(context.data.train.x[chosen].astype(np.float32), verbose=0)
    mean, zeros = evidence.activations(group(model, "inner"))
    np.testing.assert_allclose(mean, np.abs(values).mean((0, 1, 2)), rtol=1e-3)
    np.testing.assert_allclose(zeros, (values == 0).mean((0, 1, 2)), atol=1e-3)


@pytest.mark.parametrize("name", criteria())
def test_every_criterion_scores_every_unit_and_is_a_function_of_its_seed(name, model, context):
    scores = [
        criteria()[name].score(group(model, "inner"), Evidence(Channels(model), context.data, 0, images=64))
        for _ in range(2)
    ]
    assert scores[0].shape == (24,)
    assert np.isfinite(scores[0]).all()
    assert len(np.unique(scores[0])) > 12
    np.testing.assert_array_equal(*scores)
    result = PruneChannels(criterion=name).apply(Candidate(model), context)
    assert macs(result.model) <= 0.5 * macs(model)


def test_round_to_leaves_multiples(model, context):
    result = PruneChannels(macs=0.4, round_to=8).apply(Candidate(model), context)
    assert [result.model.get_layer(name).output_shape[-1] % 8 for name in ("stem", "inner", "outer")] == [0, 0, 0]


def test_only_cuts_what_is_selected(model, context):
    selection = Selection(only=(Rule(name="inner"),))
    chosen = dataclasses.replace(context, selection=selection)
    result = PruneChannels(channels=0.5).apply(Candidate(model), chosen)
    assert result.model.get_layer("inner").output_shape[-1] == 12
    assert result.model.get_layer("stem").output_shape[-1] == 16
    # A group goes only if all that write it are selected.
    with pytest.raises(CompressError, match="may go"):
        PruneChannels().apply(
            Candidate(model), dataclasses.replace(context, selection=Selection(only=(Rule(name="stem"),)))
        )


def test_a_budget_out_of_reach_names_the_groups_and_what_was_reached(model, context):
    with pytest.raises(CompressError) as caught:
        PruneChannels(macs=0.01, most=0.5).apply(Candidate(model), context)
    assert "inner" in caught.value.received
    assert "0.01" in caught.value.received
    assert "allow_partial" in caught.value.fix
    result = PruneChannels(macs=0.01, most=0.5, allow_partial=True).apply(Candidate(model), context)
    assert result.model.get_layer("inner").output_shape[-1] == 12


def test_several_steps_reach_the_same_budget(model, context):
    training = dataclasses.replace(context, recovery=Recovery(epochs=1, batch_size=32, learning_rate=1e-3))
    result = PruneChannels(macs=0.5, steps=3).apply(Candidate(model), training)
    assert 0.43 <= macs(result.model) / macs(model) <= 0.5


def test_zeros_of_an_earlier_stage_are_cut_with_their_channels(model, context):
    pruned = Prune(sparsity=0.5).apply(Candidate(model), context)
    training = dataclasses.replace(context, recovery=Recovery(epochs=1, batch_size=32))
    result = PruneChannels(macs=0.5).apply(pruned, training)
    (zeros,) = [g for g in result.guarantees if isinstance(g, Zeros)]
    for name, mask in zeros.masks.items():
        assert mask.shape == result.model.get_layer(name.split("/")[0]).kernel.shape
    assert zeros.check(result.model) == []
    assert sum((~mask).sum() for mask in zeros.masks.values()) > 0


def test_a_model_without_anything_to_cut(context):
    image = tf_keras.Input((8, 8, 1))
    model = tf_keras.Model(image, layers.Dense(10, name="logits")(layers.Flatten()(image)))
    with pytest.raises(CompressError, match="may go"):
        PruneChannels().apply(Candidate(model), context)


def test_an_unknown_criterion_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="geometric_median"):
        PruneChannels(criterion="geometric_medium")
