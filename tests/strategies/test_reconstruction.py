"""Reconstruction: the walk in step, the repair, the allocation."""

from __future__ import annotations

import numpy as np
import pytest
import tf_keras

from compress.candidate import Candidate
from compress.data.digits import Digits
from compress.graph.channels.groups import Channels
from compress.graph.channels.surgery import masked_model, oracle_difference, remove_channels
from compress.graph.rewrite import consumers, copy_model
from compress.graph.walk import Walk
from compress.metrics.accuracy import keras_accuracy
from compress.metrics.counts import count_macs
from compress.models.small import DigitsCnn
from compress.models.source import Schedule
from compress.reference import make_reference
from compress.strategies.least_squares import assign_matrix, matrix_of
from compress.strategies.pruning.channels import PruneChannels
from compress.strategies.pruning.prune import Prune
from compress.strategies.pruning.reconstruction import Curve, Reconstruction, allocate
from compress.strategies.repair import Repair
from compress.strategies.strategy import Context
from compress.training import Recovery

layers = tf_keras.layers


@pytest.fixture(scope="module")
def data():
    return Digits().load()


@pytest.fixture(scope="module")
def model(data) -> tf_keras.Model:
    return make_reference(DigitsCnn(train=Schedule(epochs=8)), data, 0)


@pytest.fixture
def context(data, model) -> Context:
    return Context("prune_channels", data, model, Recovery(method="none"), 0)


@pytest.fixture(scope="module")
def residual() -> tf_keras.Model:
    tf_keras.utils.set_random_seed(1)
    image = tf_keras.Input((8, 8, 1))
    x = layers.ReLU()(layers.Conv2D(12, 3, padding="same", name="stem")(layers.Rescaling(1 / 16)(image)))
    for number in range(2):
        y = layers.Conv2D(16, 3, padding="same", use_bias=False, name=f"inner{number}")(x)
        y = layers.ReLU()(layers.BatchNormalization(name=f"norm{number}")(y))
        y = layers.Conv2D(12, 3, padding="same", name=f"outer{number}")(y)
        x = layers.ReLU()(layers.Add()([y, x]))
    return copy_model(tf_keras.Model(image, layers.Dense(10, name="logits")(layers.GlobalAveragePooling2D()(x))))


def test_the_walk_computes_what_the_model_computes(residual, data):
    x = data.train.x[:70].astype(np.float32)
    changed = copy_model(residual)
    for step in (walk := Walk(residual, changed, x, batch=32)):
        assert len(step.inputs[0]) == 70
        if step.layer.name == "inner1":
            assert step.untouched
            kernel = np.asarray(step.layer.kernel)
            step.layer.kernel.assign(kernel * 0.5)
        if step.layer.name == "logits":
            assert not step.untouched
    for values, which in ((walk.values, residual), (walk.changed_values, changed)):
        (output,) = [values[id(tensor)] for tensor in residual.outputs]
        np.testing.assert_allclose(output, which.predict(x, verbose=0), atol=1e-4)
    assert len(walk.values) == 1, "only the output is still held"


def test_nothing_cut_is_nothing_changed(residual, data):
    repair = Repair(residual, data.train.x[:100].astype(np.float32), 0)
    work = Reconstruction(repair, frozenset(layer.name for layer in residual.layers))
    assert [item.group.name for item in work.cuttable] == ["inner0", "inner1"]
    repaired, stay = work.run([16, 16])
    assert stay.all()
    x = data.test.x[:50].astype(np.float32)
    # The norms' statistics are new, what they give is not.
    np.testing.assert_allclose(repaired(x), residual(x), atol=1e-3)


@pytest.mark.parametrize("scale", [True, False])
def test_kernels_come_back_in_the_size_that_training_steps_are_made_for(scale, data):
    tf_keras.utils.set_random_seed(2)
    image = tf_keras.Input((8, 8, 1))
    x = layers.Conv2D(6, 3, use_bias=False, name="conv")(layers.Rescaling(1 / 16)(image))
    x = layers.ReLU()(layers.BatchNormalization(scale=scale, name="norm")(x))
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(x)
    x = layers.BatchNormalization(scale=scale, name="norm2")(x)
    model = copy_model(tf_keras.Model(image, layers.Dense(10)(layers.GlobalAveragePooling2D()(x))))
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if "norm" in weight.name:
            weight.assign(rng.uniform(0.02, 3.0, weight.shape))
    if scale:
        gamma = model.get_layer("norm").gamma.numpy()
        gamma[:2] = [1e-6, -0.7]
        model.get_layer("norm").gamma.assign(gamma)
    samples = data.train.x[:100].astype(np.float32)
    repair = Repair(model, samples, 0)
    back = repair.with_norms(repair.folded)
    np.testing.assert_allclose(back(samples), model(samples), atol=1e-3)
    # A channel that its norm switches off is not blown up to make up for it.
    kept = slice(1 if scale else 0, None)
    before, after = (np.asarray(m.get_layer("conv").kernel) for m in (model, back))
    np.testing.assert_allclose(after[..., kept], before[..., kept], rtol=1e-4)
    assert np.abs(after).max() <= np.abs(before).max() * 1.001
    before, after = (np.asarray(m.get_layer("depthwise").depthwise_kernel) for m in (model, back))
    np.testing.assert_allclose(after, before, rtol=1e-4)


@pytest.mark.parametrize("norm", [{"scale": False}, {"center": False}, {"scale": False, "center": False}, {}])
@pytest.mark.parametrize("use_bias", [False, True])
def test_norms_of_every_kind_come_back(norm, use_bias, data):
    tf_keras.utils.set_random_seed(2)
    image = tf_keras.Input((8, 8, 1))
    x = layers.Conv2D(6, 3, use_bias=use_bias, name="first")(layers.Rescaling(1 / 16)(image))
    x = layers.ReLU()(layers.BatchNormalization(**norm)(x))
    x = layers.Conv2D(6, 3, use_bias=False, name="second")(x)
    model = copy_model(tf_keras.Model(image, layers.Dense(10)(layers.GlobalAveragePooling2D()(x))))
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if "kernel" not in weight.name:
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    x = data.train.x[:200].astype(np.float32)
    work = Reconstruction(Repair(model, x, 0), frozenset(layer.name for layer in model.layers))
    repaired, _ = work.run([len(item.group) for item in work.cuttable])
    np.testing.assert_allclose(repaired(x[:50]), model(x[:50]), atol=2e-3)


def test_channels_that_others_can_stand_in_for_cost_nothing(residual, data):
    """Half of the inner channels are copies of the other half: least squares finds the sum."""
    model = copy_model(residual)
    for name in ("inner0", "inner1"):
        layer, norm = model.get_layer(name), model.get_layer(name.replace("inner", "norm"))
        for variable in (layer.kernel, norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance):
            values = np.asarray(variable)
            half = values[..., :8]
            variable.assign(np.concatenate([half, half], -1))
    x = data.train.x[:300].astype(np.float32)
    work = Reconstruction(Repair(model, x, 0), frozenset(layer.name for layer in model.layers))
    work.prepare()
    curves = work.curves()
    # Index 7 is eight units kept.
    assert all(curve.errors[7] < 1e-4 * curve.errors[0] for curve in curves)
    repaired, stay = work.run([8, 8])
    channels = Channels(repaired)
    cut = remove_channels(channels, stay)
    assert oracle_difference(masked_model(channels, stay), cut, [x[:20]]) < 1e-5
    assert cut.get_layer("inner0").output_shape[-1] == 8
    np.testing.assert_allclose(cut(x[:50]), model(x[:50]), atol=0.01 * float(np.abs(model(x[:50])).max()))


def test_it_keeps_the_accuracy_that_norms_alone_lose(model, data, context):
    """A third of the multiply-adds, no gradient step, no labels."""
    before = keras_accuracy(model, data.test)
    reached = {}
    for criterion in ("l2", "reconstruction"):
        result = PruneChannels(macs=0.35, criterion=criterion).apply(Candidate(model), context)
        assert 0.32 <= count_macs(result.model) / count_macs(model) <= 0.35
        reached[criterion] = keras_accuracy(result.model, data.test)
    assert reached["reconstruction"] > before - 2
    assert reached["reconstruction"] > reached["l2"] + 5


def test_by_layer_every_group_keeps_the_same_share(model, context):
    result = PruneChannels(channels=0.5, criterion="reconstruction", ranking="layer", images=64).apply(
        Candidate(model), context
    )
    (guarantee,) = result.guarantees
    assert len(guarantee.channels) > 1
    for name in guarantee.channels:
        assert 2 * result.model.get_layer(name).output_shape[-1] == model.get_layer(name).output_shape[-1]


def test_by_layer_a_budget_in_multiply_adds_is_met(model, context):
    pruner = PruneChannels(macs=0.6, criterion="reconstruction", ranking="layer", images=64)
    result = pruner.apply(Candidate(model), context)
    assert 0.5 <= count_macs(result.model) / count_macs(model) <= 0.6


def test_zeros_of_an_earlier_stage_stay(model, context):
    pruned = Prune(sparsity=0.5).apply(Candidate(model), context)
    result = PruneChannels(macs=0.6, criterion="reconstruction").apply(pruned, context)
    for guarantee in result.guarantees:
        assert guarantee.check(result.model) == []


def test_the_same_seed_gives_the_same_model(model, context):
    first, second = (
        PruneChannels(macs=0.5, criterion="reconstruction", images=200).apply(Candidate(model), context).model
        for _ in range(2)
    )
    for one, other in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_allocation_takes_from_the_group_that_minds_least():
    steep = Curve(np.array([8.0, 4.0, 2.0, 0.0]))
    flat = Curve(np.array([0.3, 0.2, 0.1, 0.0]))
    cost = lambda keep: sum(keep) / 8  # noqa: E731
    assert allocate([steep, flat], [4, 4], cost, 0.625, [1, 1]) == [4, 1]
    assert allocate([steep, flat], [4, 4], cost, 1.0, [1, 1]) == [4, 4]
    # Twice as dear, the steep one still minds more for each cost saved.
    dear = lambda keep: (2 * keep[0] + keep[1]) / 12  # noqa: E731
    assert allocate([steep, flat], [4, 4], dear, 0.75, [1, 1])[0] == 4


@pytest.mark.parametrize("name", ["inner1", "outer0"])
def test_where_a_relu_follows_the_error_behind_it_is_what_counts(name, residual, data):
    """``inner1`` is rectified by itself, ``outer0`` after the sum; half of the inputs are gone."""
    x = data.train.x[:100].astype(np.float32)
    repair = Repair(residual, x, 0)
    errors = {}
    for rectified in (False, True):
        changed = copy_model(repair.folded)
        for step in (walk := Walk(repair.folded, changed, x)):
            if step.layer.name != name:
                continue
            before, known = matrix_of(step.layer), repair.moments(step, repair.target(walk, step))
            left = np.arange(len(before) - 1) % 2 == 0
            if rectified:
                repair.put(walk, step, known, before, 1e-4, left)
            else:
                assign_matrix(step.layer, repair.solved(name, known, before, 1e-4, left))
        relu = next(layer for layer in behind(repair.folded, name) if isinstance(layer, layers.ReLU))
        one, other = (tf_keras.Model(m.inputs, m.get_layer(relu.name).output)(x) for m in (repair.folded, changed))
        errors[rectified] = float(np.mean((one - other) ** 2))
    assert 0 < errors[True] < 0.98 * errors[False]


def behind(model: tf_keras.Model, name: str) -> list[tf_keras.layers.Layer]:
    following, found = consumers(model), [model.get_layer(name)]
    while not isinstance(found[-1], layers.ReLU):
        found.append(following[found[-1].name][0])
    return found


@pytest.mark.parametrize("outputs", ["vector", "map"])
def test_importance_is_what_a_small_error_does_to_the_outputs(outputs):
    """The mean squared change of an output for errors in a layer's outputs, measured by adding some."""
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((4, 4, 2))
    conv = layers.Conv2D(3, 1, name="conv")
    x = layers.Conv2D(5, 3, padding="same", name="read")(conv(image))
    model = tf_keras.Model(image, x if outputs == "map" else layers.GlobalAveragePooling2D()(x))
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(2000, 4, 4, 2)).astype(np.float32)
    repair = Repair(model, samples, 0)
    repair.measure_importance({"conv"})
    shift = rng.normal(size=(2000, 4, 4, 3)).astype(np.float32)
    after = tf_keras.Model(conv.output, model.output)
    inner = conv(samples)
    changed = np.asarray(after(inner + shift) - after(inner))
    # Only differences between the outputs count, as of logits.
    squares = np.sum((changed - changed.mean(-1, keepdims=True)) ** 2) / changed.shape[-1] / len(samples) / 3
    assert repair.importance["conv"].scale == pytest.approx(squares, rel=0.1)
