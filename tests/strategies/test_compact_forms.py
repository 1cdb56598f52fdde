"""Compact forms: what is built computes what the form's formula says, and the start is the nearest there is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.candidate import Candidate
from compress.data.source import Split, make_data
from compress.deploy.tflite import export
from compress.errors import CompressError
from compress.graph.channels.groups import Channels
from compress.graph.channels.order import Order, exchangeable
from compress.graph.selection import Rule, Selection
from compress.metrics.accuracy import file_outputs
from compress.metrics.counts import count_macs
from compress.metrics.tflite_file import TFLiteFile
from compress.strategies.compact.forms.crelu import CRelu, opposites
from compress.strategies.compact.forms.fire import Fire
from compress.strategies.compact.forms.grouped import Grouped
from compress.strategies.compact.forms.octave import halved
from compress.strategies.compact.forms.separable import Separable
from compress.strategies.compact.replace import Compact
from compress.strategies.goal import Goal
from compress.strategies.pruning.zeros import Zeros
from compress.strategies.strategy import Context
from compress.training import Recovery

layers = tf_keras.layers
FORMS = ("separable", "grouped", "fire", "octave", "crelu")


def correlated(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Smooth maps whose channels are mixtures of a few: as those of trained networks are."""
    rng = np.random.default_rng(seed)
    count, height, width, channels = shape
    few = rng.normal(size=(count, height + 2, width + 2, max(2, channels // 3)))
    few = (few[:, :-2] + few[:, 1:-1] + few[:, 2:])[:, :, :-2] + few[:, 1:-1, 2:]
    mixed = few @ np.random.default_rng(0).normal(size=(few.shape[-1], channels)) + 0.1 * rng.normal(size=shape)
    return mixed.astype(np.float32)


def context_of(model: tf_keras.Model, x: np.ndarray) -> Context:
    part = Split(x, np.arange(len(x)) % 2)
    return Context("compact", make_data("images", part, part), model, Recovery(method="none"), 0)


def compacted(model: tf_keras.Model, x: np.ndarray | None = None, **fields) -> Candidate:
    x = correlated(9, (32, *model.input_shape[1:])) if x is None else x
    return Compact(**fields).apply(Candidate(model), context_of(model, x))


def randomised(model: tf_keras.Model, seed: int = 0) -> tf_keras.Model:
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            size = layer.gamma.shape[0]
            layer.set_weights([rng.uniform(0.5, 2, size), *rng.normal(size=(2, size)), rng.uniform(0.5, 2, size)])
        else:
            layer.set_weights(
                [rng.normal(size=w.shape) / np.sqrt(max(w.size // w.shape[-1], 1)) for w in layer.get_weights()]
            )
    return model


def network(size: int = 8, channels: int = 8) -> tf_keras.Model:
    """Two residual blocks with batch norms, and plain layers around them."""
    image = tf_keras.Input((size, size, 4), name="image")
    x = layers.Conv2D(channels, 3, padding="same", activation="relu", name="stem")(image)
    for block in ("one", "two"):
        y = layers.Conv2D(channels, 3, padding="same", use_bias=False, name=f"{block}_a")(x)
        y = layers.ReLU()(layers.BatchNormalization(name=f"{block}_norm")(y))
        y = layers.Conv2D(channels, 3, padding="same", name=f"{block}_b")(y)
        x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return randomised(tf_keras.Model(image, layers.Dense(3, name="dense")(x)))


def single(shape=(8, 8, 6), filters: int = 8, size: int = 3, **how) -> tf_keras.Model:
    image = tf_keras.Input(shape, name="image")
    value = layers.Conv2D(filters, size, padding="same", name="conv", **how)(image)
    return randomised(tf_keras.Model(image, value))


def convolved(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """An ordinary convolution that keeps the size, by its definition."""
    height, width = kernel.shape[:2]
    rows, columns = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (height // 2, height // 2), (width // 2, width // 2), (0, 0)))
    return sum(
        padded[:, i : i + rows, j : j + columns] @ kernel[i, j].astype(np.float64)
        for i in range(height)
        for j in range(width)
    )


def weights(model: tf_keras.Model, name: str) -> np.ndarray:
    return model.get_layer(name).get_weights()[0].astype(np.float64)


def expected(model: tf_keras.Model, form: str, x: np.ndarray) -> np.ndarray:
    """What the paper's formula makes of ``x`` with the weights that the model of one layer has, bias included."""
    bias = np.zeros(8)
    if form == "grouped":
        groups = [x[..., group::2] for group in (0, 1)]  # the shuffle: neighbours go to different groups
        kernels = np.split(weights(model, "conv"), 2, -1)
        value = np.concatenate([convolved(part, kernel) for part, kernel in zip(groups, kernels, strict=True)], -1)
        bias = model.get_layer("conv").get_weights()[1]
    elif form == "fire":
        squeezed = convolved(x, weights(model, "conv_squeeze"))
        value = np.concatenate([convolved(squeezed, weights(model, name)) for name in ("conv_point", "conv")], -1)
        bias = np.concatenate([model.get_layer(name).get_weights()[1] for name in ("conv_point", "conv")])
    elif form == "octave":
        n, height, width, channels = x.shape
        pooled = x.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))
        rising = convolved(pooled[..., 3:], weights(model, "conv_rising"))
        low = convolved(pooled, weights(model, "conv_low"))
        rising, low = (part.repeat(2, 1).repeat(2, 2) for part in (rising, low))
        value = np.concatenate([convolved(x[..., :3], weights(model, "conv")) + rising, low], -1)
        bias = np.concatenate([model.get_layer(name).get_weights()[1] for name in ("conv", "conv_low")])
    elif form == "crelu":
        half = convolved(x, weights(model, "conv_half"))
        scales = weights(model, "conv")[0, 0]
        value = np.stack([half * scales[:, 0], half * scales[:, 1]], -1).reshape(*half.shape[:3], -1)
        bias = model.get_layer("conv").get_weights()[1]
    else:
        depthwise = weights(model, "conv_depthwise")
        parts = [convolved(x[..., [c]], depthwise[:, :, [c]]) for c in range(x.shape[-1])]
        value = np.concatenate(parts, -1) @ weights(model, "conv")[0, 0]
        bias = model.get_layer("conv").get_weights()[1]
    return value + bias


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory) -> tuple[tf_keras.Model, TFLiteFile]:
    """A model with one convolution that any form can have, and its file."""
    image = tf_keras.Input((8, 8, 6), name="image")
    value = layers.ReLU()(layers.Conv2D(8, 3, padding="same", name="conv")(image))
    model = randomised(tf_keras.Model(image, layers.Dense(3, name="last")(layers.Flatten()(value))))
    data = context_of(model, correlated(1, (4, 8, 8, 6))).data
    artifact = export(Candidate(model), data, tmp_path_factory.mktemp("exported") / "model.tflite")
    return model, TFLiteFile.read(artifact.path)


@pytest.mark.parametrize(("form", "fit"), [("separable", "weights"), *((form, "outputs") for form in FORMS)])
def test_the_layers_compute_what_the_formula_says_also_in_the_file(form, fit, one_layer, tmp_path):
    model, file_before = one_layer
    x = correlated(1, (24, 8, 8, 6))
    result = compacted(model, x, form=form, fit=fit)
    assert count_macs(result.model) < count_macs(model)
    wanted = np.maximum(expected(result.model, form, x), 0).reshape(len(x), -1) @ weights(result.model, "last")
    wanted = wanted + result.model.get_layer("last").get_weights()[1]
    np.testing.assert_allclose(np.asarray(result.model(x)), wanted, atol=1e-4 * np.abs(wanted).max())
    (guarantee,) = result.guarantees
    assert guarantee.check(result.model) == []
    assert len(guarantee.check(model)) == 1
    artifact = export(result, context_of(model, x).data, tmp_path / "model.tflite")
    assert guarantee.check_file(TFLiteFile.read(artifact.path)) == []
    np.testing.assert_allclose(file_outputs(artifact.path, x), wanted, atol=1e-3 * np.abs(wanted).max())
    assert len(guarantee.check_file(file_before)) == 1


@pytest.mark.parametrize("form", FORMS)
def test_fitted_to_outputs_it_is_nearer_to_them(form):
    model, x = network(), correlated(2, (64, 8, 8, 4))
    unseen = correlated(3, (64, 8, 8, 4))
    wanted = np.asarray(model(unseen))

    def error(**fields) -> float:
        found = np.asarray(compacted(model, x, form=form, **fields).model(unseen))
        return float(np.mean((found - wanted) ** 2) / np.var(wanted))

    weights, outputs = error(fit="weights"), error(fit="outputs", images=64)
    assert outputs < 0.5 * weights, (weights, outputs)


@pytest.mark.parametrize("form", ["fire", "octave"])
def test_a_budget_is_met_and_takes_what_harms_least(form):
    model, x = network(), correlated(2, (32, 8, 8, 4))
    result = compacted(model, x, form=form, fit="outputs", images=32, macs=0.85)
    assert count_macs(result.model) <= 0.85 * count_macs(model)
    names = result.guarantees[0].layers & {layer.name for layer in model.layers}
    others = {item.layer for item in result.skipped if item.reason == "not needed for the budget"}
    assert others
    assert names.isdisjoint(others)


def test_an_allocation_spares_the_layer_that_matters():
    model, x = network(), correlated(2, (32, 8, 8, 4))
    # What the second block adds is next to nothing, so that its layers are harmless to replace.
    model.get_layer("two_b").kernel.assign(model.get_layer("two_b").kernel * 1e-3)
    result = compacted(model, x, form="grouped", fit="outputs", images=32, macs=0.8)
    assert result.guarantees[0].layers == {"two_a", "two_b"}


MOMENTS = st.builds(
    lambda seed, size: (lambda a: a @ a.T)(np.random.default_rng(seed).normal(size=(size, size + 3))),
    st.integers(0, 100),
    st.just(9 * 4),
)


@given(inputs=MOMENTS, seed=st.integers(0, 100))
@settings(deadline=None, max_examples=20)
def test_a_kernel_that_has_the_form_is_found(inputs, seed):
    rng = np.random.default_rng(seed)
    shape = (3, 3, 4, 6)
    mask = np.ones(shape)
    mask[:, :, 0::2, 3:], mask[:, :, 1::2, :3] = 0, 0
    of_form = {
        Grouped(2): rng.normal(size=shape) * mask,
        Separable(1): np.einsum("yxc,cf->yxcf", rng.normal(size=(3, 3, 4)), rng.normal(size=(4, 6))),
        CRelu(): np.repeat(rng.normal(size=(3, 3, 4, 3)), 2, -1) * np.array([1.0, -0.5, 1, -1, 1, -2]),
    }
    for form, kernel in of_form.items():
        goal = Goal(kernel, inputs)
        assert goal.error(form.kernel(form.nearest(goal))) < 1e-4 * goal.energy, form.name


@given(inputs=MOMENTS, seed=st.integers(0, 100))
@settings(deadline=None, max_examples=20)
def test_no_kernel_nearby_of_the_form_is_better(inputs, seed):
    rng = np.random.default_rng(seed)
    goal = Goal(rng.normal(size=(3, 3, 4, 6)), inputs)
    for form in (Grouped(2), CRelu()):
        parts = form.nearest(goal)
        best = goal.error(form.kernel(parts))
        for _ in range(3):
            other = tuple(part + 0.01 * rng.normal(size=part.shape) for part in parts)
            assert goal.error(form.kernel(other)) >= best - 1e-9


def test_solving_in_turn_lowers_the_error():
    rng = np.random.default_rng(0)
    half = rng.normal(size=(36, 40))
    goal = Goal(rng.normal(size=(3, 3, 4, 6)), half @ half.T)
    for form in (Separable(1), Fire(0.5)):
        alone = form.kernel(form.nearest(Goal(goal.kernel)))
        parts = form.nearest(goal)
        error = goal.error(form.kernel(parts))
        assert error < goal.error(alone)
        assert goal.error(form.kernel(form.nearest(goal, parts))) <= error * (1 + 1e-9)


@given(seed=st.integers(0, 50), size=st.sampled_from([1, 3, 5]))
@settings(deadline=None, max_examples=10)
def test_the_kernel_of_half_the_resolution_is_the_least_squares_of_white_inputs(seed, size):
    kernel = np.random.default_rng(seed).normal(size=(size, size, 1, 1))
    # Each pixel as a sum over pooled pixels: four cases of where it lies in its pair, by the normal equations.
    middle, found = size // 2, np.zeros((size, size))
    for case in np.ndindex(2, 2):
        for place in np.ndindex(size, size):
            pair = tuple((case[a] + place[a] - middle) // 2 + middle for a in (0, 1))
            found[pair] += kernel[place][0, 0] / 4  # covariance 1/4, variance 1/4, four cases
    np.testing.assert_allclose(halved(kernel)[..., 0, 0], found, atol=1e-12)


def test_opposite_filters_lie_side_by_side():
    rng = np.random.default_rng(0)
    half = rng.normal(size=(20, 4))
    matrix = np.concatenate([half, -2 * half], 1)[:, [0, 5, 2, 7, 4, 1, 6, 3]]
    order = opposites(matrix)
    assert sorted(order) == list(range(8))
    unit = matrix[:, order] / np.linalg.norm(matrix[:, order], axis=0)
    np.testing.assert_allclose(unit[:, ::2], -unit[:, 1::2], atol=1e-12)


def test_opposite_filters_are_halved_exactly():
    model, x = network(), correlated(2, (8, 8, 8, 4))
    rng = np.random.default_rng(1)
    for name in ("stem", "one_a", "two_a"):
        layer = model.get_layer(name)
        kernel = rng.normal(size=layer.kernel.shape).astype(np.float32) / 5
        kernel[..., 4:] = -kernel[..., [2, 0, 3, 1]]
        layer.kernel.assign(kernel)
    result = compacted(model, form="crelu")
    assert {item.layer for item in result.skipped} == {"one_b", "two_b"}
    wanted = np.asarray(model(x))
    np.testing.assert_allclose(np.asarray(result.model(x)), wanted, atol=1e-4 * np.abs(wanted).max())


def test_blocks_that_a_shuffled_order_hides_are_found():
    model, x = network(), correlated(2, (8, 8, 8, 4))
    rng = np.random.default_rng(0)
    inner = rng.permutation(8)
    for number, name in enumerate(("one_a", "one_b")):
        layer = model.get_layer(name)
        kernel = np.asarray(layer.kernel)
        reading, writing = np.arange(8) % 2, inner % 2
        if number:
            reading, writing = inner // 4, np.arange(8) // 4
        layer.kernel.assign(kernel * (reading[:, None] == writing))
    result = compacted(model, form="grouped", macs=0.82)
    assert result.guarantees[0].layers == {"one_a", "one_b"}
    wanted = np.asarray(model(x))
    np.testing.assert_allclose(np.asarray(result.model(x)), wanted, atol=1e-4 * np.abs(wanted).max())


def padded() -> tf_keras.Model:
    """A shortcut that adds channels of zeros, as CIFAR ResNets have: some channels may change places, and some not."""
    import tensorflow as tf

    image = tf_keras.Input((8, 8, 4), name="image")
    x = layers.Conv2D(8, 3, padding="same", name="stem")(image)
    y = layers.BatchNormalization(name="norm")(layers.Conv2D(12, 3, padding="same", name="wide")(x))
    x = layers.Add()([y, tf.pad(x, [[0, 0], [0, 0], [0, 0], [2, 2]])])
    x = layers.Flatten()(layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(x))
    return randomised(tf_keras.Model(image, layers.Dense(3, name="dense")(x)))


@pytest.mark.parametrize("make", [network, padded])
def test_any_order_computes_the_same(make):
    model, x = make(), correlated(2, (4, 8, 8, 4))
    channels = Channels(model)
    rng = np.random.default_rng(0)
    source = np.arange(channels.count)
    sets = exchangeable(channels)
    assert sum(map(len, sets)) >= 12
    for units in sets:
        source[units] = rng.permutation(units)
    other = Order(channels, source).model()
    assert any((a != b).any() for a, b in zip(model.get_weights(), other.get_weights(), strict=True))
    wanted = np.asarray(model(x))
    np.testing.assert_allclose(np.asarray(other(x)), wanted, atol=1e-5 * np.abs(wanted).max())


def test_bound_weights_stay_where_they_are():
    model = network()
    masks = {
        f"{name}/kernel": np.random.default_rng(0).random(model.get_layer(name).kernel.shape) < 0.5
        for name in ("one_b", "dense")
    }
    for name, mask in masks.items():
        kernel = model.get_layer(name.partition("/")[0]).kernel
        kernel.assign(kernel * mask)
    zeros = Zeros("prune", masks)
    selection = Selection(only=(Rule(name="one_a|two_a"),))
    before = Candidate(model, (zeros,))
    context = dataclasses.replace(context_of(model, correlated(2, (8, 8, 8, 4))), selection=selection)
    free = Compact(form="grouped").apply(before, context)
    assert zeros.check(free.model) == []
    alone = dataclasses.replace(context, selection=Selection(only=(Rule(name="one_a"),)))
    with pytest.raises(CompressError, match="one_a: its filters cannot be put in another order"):
        Compact(form="crelu").apply(before, alone)


@pytest.mark.parametrize(
    ("form", "model", "reason"),
    [
        ({"form": "grouped", "groups": 4}, lambda: single(), "4 groups do not divide its 6 input channels"),
        ({"form": "grouped", "groups": 3}, lambda: single(), "3 groups do not divide its 8 filters"),
        ({"form": "grouped"}, lambda: single((None, None, 6)), "known size"),
        ({"form": "fire"}, lambda: single(size=1), "one pixel"),
        ({"form": "fire"}, lambda: single(strides=2), "strided"),
        ({"form": "fire"}, lambda: single(size=2), "no middle"),
        ({"form": "fire"}, lambda: single(activation="softmax"), "weighs"),
        ({"form": "octave"}, lambda: single((9, 8, 6)), "9 x 8; halving them needs even sizes"),
        ({"form": "octave"}, lambda: single((None, 8, 6)), "even sizes"),
        ({"form": "octave", "alpha": 0.01}, lambda: single(), "leaves none"),
        ({"form": "octave"}, lambda: single(dilation_rate=2), "dilated"),
        ({"form": "crelu"}, lambda: single(), "no ReLU alone reads it"),
        ({"form": "crelu"}, lambda: single(filters=7), "7 filters are not pairs"),
    ],
    ids=lambda value: "model" if callable(value) else str(value),
)
def test_what_cannot_have_the_form_is_refused_with_the_reason(form, model, reason):
    with pytest.raises(CompressError, match=reason):
        compacted(model(), x=np.zeros((16, 8, 8, 6), np.float32), **form)


def test_a_layer_whose_filters_cannot_change_places_is_left():
    image = tf_keras.Input((8, 8, 6), name="image")
    rectified = layers.ReLU()(layers.Conv2D(8, 3, name="conv")(image))
    model = randomised(tf_keras.Model(image, rectified))
    with pytest.raises(CompressError, match="another order"):
        compacted(model, form="crelu")


def test_what_is_damaged_least_for_the_saving_goes_first():
    """The small layer is damaged less, and saves a sixteenth: the large one alone is enough."""
    image = tf_keras.Input((8, 8, 8), name="image")
    x = layers.Conv2D(8, 3, padding="same", name="large")(image)
    x = layers.Conv2D(8, 3, padding="same", name="small")(layers.AveragePooling2D(4)(x))
    model = randomised(tf_keras.Model(image, layers.Flatten()(x)))
    kernel = model.get_layer("small").kernel
    rng = np.random.default_rng(0)
    separable = rng.normal(size=(3, 3, 8, 1)) * rng.normal(size=(8, 8))
    kernel.assign((separable + 0.5 * rng.normal(size=kernel.shape)).astype(np.float32) / 8)
    result = compacted(model, macs=0.5)
    assert {"large", "small"} & result.guarantees[0].layers == {"large"}


def test_a_budget_is_a_share_of_the_whole_model_also_of_what_no_stage_touches():
    image = tf_keras.Input((8, 8, 12), name="image")
    x = layers.Conv2D(24, 3, padding="same", name="one")(image)
    x = layers.Conv2D(24, 3, padding="same", name="two")(x)
    x = layers.LSTM(64, name="lstm")(layers.Reshape((8, 8 * 24))(x))
    model = tf_keras.Model(image, layers.Dense(3, name="dense")(x))
    assert count_macs(compacted(model, macs=0.7).model) / count_macs(model) <= 0.7


@pytest.mark.parametrize("form", FORMS)
def test_a_budget_out_of_reach_is_refused_with_the_limit(form):
    model = network()
    reachable = count_macs(compacted(model, form=form).model) / count_macs(model)
    with pytest.raises(CompressError) as caught:
        compacted(model, form=form, macs=0.05)
    assert caught.value.where == "strategy.compact.macs"
    assert f"{reachable:.3f}" in caught.value.expected


@pytest.mark.parametrize(
    "fields",
    [
        {"form": "grouped", "depth_multiplier": 2},
        {"groups": 4},
        {"form": "fire", "shuffle": False},
        {"form": "grouped", "squeeze": 0.25},
        {"form": "fire", "alpha": 0.25},
        {"form": "grouped", "images": 100},
    ],
    ids=str,
)
def test_a_field_without_effect_is_refused(fields):
    with pytest.raises(ValueError, match="only beside"):
        Compact(**fields)
