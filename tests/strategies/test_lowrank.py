"""Low-rank factorization: exact where the rank is, optimal where it is not, within its budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import tf_keras

from compress.candidate import Artifact, Candidate, Latency, Measurement
from compress.data.source import Split, make_data
from compress.deploy.tflite import export
from compress.errors import CompressError
from compress.graph.selection import Rule, Selection
from compress.metrics.counts import count_macs, count_params
from compress.metrics.tflite_file import TFLiteFile
from compress.strategies.lowrank.factorize import LowRank
from compress.strategies.lowrank.rank import Rank, first_factor
from compress.strategies.quantization.post_training import Quantize
from compress.strategies.strategy import Context
from compress.training import Recovery

layers = tf_keras.layers


def chain(shape: Sequence[int], *parts: tf_keras.layers.Layer, seed: int = 0) -> tf_keras.Model:
    tf_keras.utils.set_random_seed(seed)
    image = tf_keras.Input(tuple(shape), name="image")
    x = image
    for part in parts:
        x = part(x)
    model = tf_keras.Model(image, x)
    rng = np.random.default_rng(seed)
    model.set_weights([rng.normal(size=w.shape).astype(np.float32) for w in model.get_weights()])
    return model


def lowered(model: tf_keras.Model, stage: str = "lowrank", before: Candidate | None = None, **fields) -> Candidate:
    x = np.random.default_rng(3).normal(size=(8, *model.input_shape[1:])).astype(np.float32)
    part = Split(x, np.arange(8) % 2)
    context = Context(stage, make_data("random", part, part), model, Recovery(method="none"), 0)
    return LowRank(**fields).apply(before or Candidate(model), context)


def as_matrix(kernel: np.ndarray, form: str) -> np.ndarray:
    """The matrix whose rank each form limits (Denton et al.; Tai et al., equation 4)."""
    if form == "dense":
        return kernel
    height, width, channels, filters = kernel.shape
    if form == "channel":
        return kernel.reshape(height * width * channels, filters)
    return np.stack([[kernel[y, :, c, :].ravel() for c in range(channels)] for y in range(height)]).reshape(
        height * channels, width * filters
    )


def product(model: tf_keras.Model, name: str, form: str) -> np.ndarray:
    """The matrix that the two factors of layer ``name`` multiply to."""
    first, last = np.asarray(model.get_layer(first_factor(name)).kernel), np.asarray(model.get_layer(name).kernel)
    if form == "dense":
        return first @ last
    if form == "channel":
        return first.reshape(-1, first.shape[-1]) @ last[0, 0]
    columns = first[:, 0].reshape(-1, first.shape[-1])
    return columns @ last[0].transpose(1, 0, 2).reshape(first.shape[-1], -1)


def of_rank(kernel: np.ndarray, rank: int, form: str) -> np.ndarray:
    """A kernel whose matrix has exactly this rank."""
    left, values, right = np.linalg.svd(as_matrix(kernel, form).astype(np.float64), full_matrices=False)
    matrix = (left[:, :rank] * values[:rank]) @ right[:rank]
    if form != "spatial":
        return matrix.reshape(kernel.shape).astype(np.float32)
    height, width, channels, filters = kernel.shape
    return matrix.reshape(height, channels, width, filters).transpose(0, 2, 1, 3).astype(np.float32)


def outputs(model: tf_keras.Model) -> np.ndarray:
    x = np.random.default_rng(7).normal(size=(3, *model.input_shape[1:])).astype(np.float32)
    return np.asarray(model(x, training=False))


CONVOLUTIONS = [
    {"padding": padding, **how}
    for padding in ("same", "valid")
    for how in (
        {},
        {"strides": 2},
        {"strides": (2, 1)},
        {"strides": (1, 3)},
        {"dilation_rate": 2},
        {"dilation_rate": (1, 2)},
    )
]


@pytest.mark.parametrize("how", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("form", ["channel", "spatial"])
def test_a_convolution_of_the_given_rank_is_reproduced(form, how):
    layer = layers.Conv2D(12, (3, 4), activation="relu", name="conv", **how)
    model = chain((11, 10, 5), layer, layers.GlobalMaxPooling2D())
    layer.kernel.assign(of_rank(np.asarray(layer.kernel), 3, form))
    result = lowered(model, rank=3, form=form)
    assert result.model.get_layer("conv_reduce").output_shape[-1] == 3
    expected = outputs(model)
    np.testing.assert_allclose(outputs(result.model), expected, atol=1e-4 * np.abs(expected).max())
    assert result.guarantees[0].check(result.model) == []


@pytest.mark.parametrize("shape", [(20,), (4, 20)])
def test_a_dense_layer_of_the_given_rank_is_reproduced(shape):
    layer = layers.Dense(16, activation="tanh", name="dense")
    model = chain(shape, layer)
    layer.kernel.assign(of_rank(np.asarray(layer.kernel), 4, "dense") / 20)
    result = lowered(model, rank=4)
    np.testing.assert_allclose(outputs(result.model), outputs(model), atol=1e-5)
    assert count_params(result.model) == 20 * 4 + 4 * 16 + 16


LAYERS = {
    "dense": lambda: chain((30,), layers.Dense(24, name="layer")),
    "channel": lambda: chain((6, 6, 8), layers.Conv2D(24, 3, name="layer")),
    "spatial": lambda: chain((6, 6, 8), layers.Conv2D(10, 3, name="layer")),
}


@pytest.mark.parametrize("rank", [1, 4, 7])
@pytest.mark.parametrize("form", LAYERS)
def test_what_a_truncation_loses_is_the_energy_of_the_tail(form, rank):
    model = LAYERS[form]()
    matrix = as_matrix(np.asarray(model.get_layer("layer").kernel), form)
    result = lowered(model, rank=rank, **({} if form == "dense" else {"form": form}))
    lost = np.linalg.norm(matrix - product(result.model, "layer", form)) ** 2
    tail = (np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[rank:] ** 2).sum()
    assert lost == pytest.approx(tail, rel=1e-4)


def test_the_better_form_is_taken_for_each_layer():
    model = chain((8, 8, 6), layers.Conv2D(16, 3, name="one"), layers.Conv2D(16, 3, name="two"))
    for name, form in (("one", "spatial"), ("two", "channel")):
        kernel = model.get_layer(name).kernel
        kernel.assign(of_rank(np.asarray(kernel), 2, form))
    result = lowered(model, rank=2)
    assert result.model.get_layer("one_reduce").kernel_size == (3, 1)
    assert result.model.get_layer("two_reduce").kernel_size == (3, 3)
    expected = outputs(model)
    np.testing.assert_allclose(outputs(result.model), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.85])
def test_the_least_rank_that_keeps_the_energy_is_taken(energy):
    model = LAYERS["dense"]()
    kernel = model.get_layer("layer").kernel
    rng = np.random.default_rng(0)
    kernel.assign(
        (np.asarray(kernel) * np.geomspace(1, 0.02, 30)[:, None] * rng.uniform(0.5, 1, 24)).astype(np.float32)
    )
    values = np.linalg.svd(np.asarray(kernel).astype(np.float64), compute_uv=False) ** 2
    kept = np.cumsum(values) / values.sum()
    result = lowered(model, energy=energy)
    rank = result.model.get_layer("layer_reduce").units
    assert kept[rank - 1] >= energy
    assert rank == 1 or kept[rank - 2] < energy


@pytest.mark.parametrize("form", LAYERS)
def test_factorizing_a_pair_again_truncates_their_product_best(form):
    model = LAYERS[form]()
    fields = {} if form == "dense" else {"form": form}
    first = lowered(model, rank=7, **fields)
    # Recovery would have moved the factors: they are no singular vectors any more.
    rng = np.random.default_rng(5)
    first.model.set_weights([w + rng.normal(0, 0.3, w.shape).astype(np.float32) for w in first.model.get_weights()])
    whole = product(first.model, "layer", form).astype(np.float64)
    second = lowered(model, "lowrank2", first, rank=3, **fields)
    left, values, right = np.linalg.svd(whole, full_matrices=False)
    best = (left[:, :3] * values[:3]) @ right[:3]
    np.testing.assert_allclose(product(second.model, "layer", form), best, atol=1e-4 * values[0])
    assert [layer.name for layer in second.model.layers] == [layer.name for layer in first.model.layers]
    assert [g.ranks for g in second.guarantees] == [{"layer": 7}, {"layer": 3}]
    assert all(g.check(second.model) == [] for g in second.guarantees)
    np.testing.assert_array_equal(second.model.get_layer("layer").bias, first.model.get_layer("layer").bias)


def network(name: str) -> tf_keras.Model:
    shape = (11, 9, 6) if name == "odd" else (10, 10, 6)
    parts = {
        "same": ({"padding": "same"}, {"padding": "same"}),
        "strided": ({"padding": "same", "strides": 2}, {"padding": "same"}),
        "valid": ({"kernel_size": 5}, {"kernel_size": 5}),
        "odd": ({"strides": 2}, {"kernel_size": 2}),
    }[name]
    one, two = (
        layers.Conv2D(**{"filters": filters, "kernel_size": 3, "name": label, **part})
        for part, filters, label in zip(parts, (16, 24), ("one", "two"), strict=True)
    )
    tail = [layers.GlobalAveragePooling2D(), layers.Dense(32, name="fc1"), layers.Dense(5, name="fc2")]
    return chain(shape, one, two, *tail)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("same", "auto"),
        ("same", "spatial"),
        ("strided", "channel"),
        ("strided", "spatial"),
        ("valid", "channel"),
        ("valid", "auto"),
        ("valid", "spatial"),
    ],
)
def test_a_budget_of_multiply_adds_is_met_and_used(name, form):
    model = network(name)
    for keep in (0.4, 0.7, 0.9):
        share = count_macs(lowered(model, macs=keep, form=form).model) / count_macs(model)
        assert share <= keep + 1e-9
        assert share >= keep - 0.05


@pytest.mark.parametrize(
    ("name", "form"), [("same", "auto"), ("valid", "auto"), ("odd", "channel"), ("wide", "spatial")]
)
def test_a_budget_of_parameters_is_met_and_used(name, form):
    if name == "wide":
        model = chain((9, 9, 24), layers.Conv2D(24, 3, strides=2, padding="same"), layers.Conv2D(24, 3, strides=2))
    else:
        model = network(name)
    for keep in (0.4, 0.7, 0.9):
        share = count_params(lowered(model, params=keep, form=form).model) / count_params(model)
        assert share <= keep + 1e-9
        assert share >= keep - 0.05


def with_recurrence() -> tf_keras.Model:
    """Half of its multiply-adds lie in a layer that has no kernel of its own."""
    parts = (
        layers.Conv2D(24, 3, padding="same", activation="relu", name="one"),
        layers.Conv2D(24, 3, padding="same", activation="relu", name="two"),
        layers.Reshape((8, 8 * 24)),
        layers.LSTM(64, name="lstm"),
        layers.Dense(4, name="head"),
    )
    return chain((8, 8, 12), *parts)


def test_a_budget_is_a_share_of_the_whole_model_also_of_what_no_stage_touches():
    model = with_recurrence()
    assert count_macs(lowered(model, macs=0.6).model) / count_macs(model) <= 0.6
    with pytest.raises(CompressError, match="lstm: weights of LSTM layers are not factorized") as caught:
        lowered(model, macs=0.1)
    least = float(caught.value.expected.split(",")[0].removeprefix("at least "))
    assert count_macs(lowered(model, macs=least + 0.001).model) / count_macs(model) <= least + 0.001


def test_a_budget_below_rank_one_everywhere_is_refused_with_the_limit():
    model = network("same")
    with pytest.raises(CompressError) as caught:
        lowered(model, macs=0.001)
    assert caught.value.where == "strategy.lowrank.macs"
    least = count_macs(lowered(model, rank=1, form="tucker").model) / count_macs(model)
    assert f"{least:.3f}" in caught.value.expected


def test_what_cannot_be_factorized_is_named_with_the_reason():
    image = tf_keras.Input((8, 8, 8), name="image")
    twice = layers.Conv2D(8, 3, padding="same", name="twice")
    x = twice(twice(image))
    x = layers.Conv2D(8, 3, groups=2, name="grouped")(x)
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = layers.Flatten()(x)
    model = tf_keras.Model(image, layers.Dense(1, name="column")(layers.Dense(16, name="dense")(x)))
    result = lowered(model, rank=2)
    reasons = {item.layer: item.reason for item in result.skipped}
    assert set(reasons) == {"twice", "grouped", "depthwise", "column"}
    assert "more than once" in reasons["twice"]
    assert "grouped" in reasons["grouped"]
    assert "DepthwiseConv2D" in reasons["depthwise"]
    assert "rank 1" in reasons["column"]
    assert result.guarantees[0].ranks == {"dense": 2}


def test_nothing_that_saves_is_an_error():
    with pytest.raises(CompressError, match="stage lowrank"):
        lowered(LAYERS["dense"](), rank=24)


def test_a_layer_that_the_file_computes_with_floats_is_factorized_into_such(tmp_path):
    image = tf_keras.Input((8, 8, 3))
    x = tf_keras.layers.Conv2D(16, 3, name="first", activation="relu")(image)
    x = tf_keras.layers.Conv2D(16, 3, name="second", activation="relu")(x)
    model = tf_keras.Model(image, tf_keras.layers.Dense(4, name="head")(tf_keras.layers.Flatten()(x)))
    rng = np.random.default_rng(0)
    part = Split(rng.normal(size=(32, 8, 8, 3)).astype(np.float32), np.arange(32) % 4)
    data = make_data("random", part, part)
    second = Selection(skip=(Rule(name="second"),))
    context = Context("quantize", data, model, Recovery(method="none"), 0, selection=second)
    quantized = Quantize(calibration_images=8).apply(Candidate(model), context)
    only = context.for_stage("lowrank", selection=Selection(only=(Rule(name="second"),)))
    candidate = LowRank(rank=4).apply(quantized, only)
    file = TFLiteFile.read(export(candidate, data, tmp_path / "model.tflite").path)
    stored = {tensor.name: tensor.dtype for _, tensor in file.weighted}
    wanted = ("second_reduce", "second", "first")
    kinds = {name: next(dtype for tensor, dtype in stored.items() if f"{name}/" in tensor) for name in wanted}
    assert kinds == {"second_reduce": np.float32, "second": np.float32, "first": np.int8}
    assert [v for guarantee in candidate.guarantees for v in guarantee.check_file(file)] == []


def measuring(milliseconds) -> Context:
    """A context whose board takes so long as ``milliseconds`` says of a file."""
    x = np.random.default_rng(3).normal(size=(8, 10, 10, 6)).astype(np.float32)
    part = Split(x, np.arange(8) % 2)

    def measure(artifacts: Sequence[Artifact]) -> list[Measurement]:
        times = [milliseconds(TFLiteFile.read(artifact.path)) for artifact in artifacts]
        return [Measurement("imagined", Latency(time, time, time, time, 1, 1)) for time in times]

    model = network("same")
    return Context("lowrank", make_data("random", part, part), model, Recovery(method="none"), 0, measure=measure)


def test_a_budget_of_latency_is_met_where_multiply_adds_take_time():
    context = measuring(lambda file: 1e-6 * file.macs() + 1e-4)
    result = LowRank(latency=0.6).apply(Candidate(context.reference), context)
    assert 0.55 <= result.measured["latency_kept"] <= 0.6
    assert count_macs(result.model) / count_macs(context.reference) == pytest.approx(0.6, abs=0.06)


def test_layers_that_a_chain_makes_no_faster_on_the_board_are_left_alone():
    def milliseconds(file: TFLiteFile) -> float:
        """Every layer costs something of its own: two thin ones take longer than the small convolution."""
        return 1e-6 * file.macs() + 0.08 * len(file.weighted)

    context = measuring(milliseconds)
    result = LowRank(latency=0.7).apply(Candidate(context.reference), context)
    assert result.measured["latency_kept"] <= 0.7
    assert set(result.guarantees[0].ranks) == {"two"}
    with pytest.raises(CompressError, match=r"strategy\.lowrank\.latency"):
        LowRank(latency=0.05).apply(Candidate(context.reference), context)


@pytest.mark.parametrize("form", ["tucker", "cp", "tensor_train"])
def test_a_chain_of_three_and_more_is_exported_guaranteed_and_factorized_again(form, tmp_path):
    model = chain((9, 9, 16), layers.Conv2D(16, 3, name="layer"), layers.GlobalAveragePooling2D())
    first = lowered(model, rank=8, form=form)
    part = Split(np.zeros((8, 9, 9, 16), np.float32), np.arange(8) % 2)
    second = lowered(model, "lowrank2", first, rank=3, form=form)
    for candidate in (first, second):
        file = TFLiteFile.read(export(candidate, make_data("none", part, part), tmp_path / "model.tflite").path)
        assert [v for g in candidate.guarantees for v in (*g.check(candidate.model), *g.check_file(file))] == []
    assert first.guarantees[0].forms == {"layer": form}
    assert first.model.get_layer("layer_reduce").output_shape[-1] == 8
    assert second.model.get_layer("layer_reduce").output_shape[-1] == 3
    broken = Rank("stage", {"layer": 2}, {"layer": form}, dict.fromkeys(second.guarantees[1].inner, 2))
    assert {violation.layer for violation in broken.check(second.model)} == {
        "layer_reduce",
        *(name for name in broken.inner if second.model.get_layer(name).output_shape[-1] > 2),
    }


def trained_like(seed: int = 0) -> tf_keras.Model:
    """A network whose layers read correlated values, with batch norms and a sum."""
    tf_keras.utils.set_random_seed(seed)
    image = tf_keras.Input((10, 10, 6))
    x = layers.Conv2D(16, 3, padding="same", name="one")(image)
    x = kept = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.ReLU()(layers.Conv2D(16, 3, padding="same", name="two")(x))
    x = layers.Add()([kept, layers.Conv2D(16, 3, padding="same", name="three")(x)])
    x = layers.ReLU()(x)
    model = tf_keras.Model(image, layers.Dense(5, name="head")(layers.GlobalAveragePooling2D()(x)))
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(16, 16)) * np.geomspace(1, 0.05, 16)
    kernel = model.get_layer("one").kernel
    kernel.assign(np.asarray(kernel) @ mix)
    return model


@pytest.mark.parametrize("form", ["auto", "spatial", "tucker"])
def test_fitting_to_outputs_keeps_the_logits_better_than_fitting_to_weights(form):
    model = trained_like()
    rng = np.random.default_rng(1)
    images = rng.normal(size=(192, 10, 10, 6)).astype(np.float32)
    images = np.cumsum(images, axis=1) / 3
    train, held_out = (Split(part, np.arange(len(part)) % 5) for part in (images[:128], images[128:]))
    context = Context("lowrank", make_data("random", train, held_out), model, Recovery(method="none"), 0)
    wanted = np.asarray(model(held_out.x))
    errors = {}
    for fit in ("weights", "outputs"):
        more = {"images": 128} if fit == "outputs" else {}
        result = LowRank(macs=0.45, form=form, fit=fit, **more).apply(Candidate(model), context)
        assert 0.38 <= count_macs(result.model) / count_macs(model) <= 0.45
        assert result.measured["macs_kept"] == count_macs(result.model) / count_macs(model)
        assert result.guarantees[0].check(result.model) == []
        errors[fit] = float(np.mean((np.asarray(result.model(held_out.x)) - wanted) ** 2))
    assert errors["outputs"] < 0.5 * errors["weights"]


def test_batch_norms_between_the_factors_change_nothing_and_are_merged_into_the_file(tmp_path):
    model = trained_like()
    plain = lowered(model, rank=4)
    normed = lowered(model, rank=4, batch_norm=True)
    names = {layer.name for layer in normed.model.layers} - {layer.name for layer in plain.model.layers}
    assert names == {f"{layer}_reduce_norm" for layer in plain.guarantees[0].ranks}
    np.testing.assert_allclose(outputs(normed.model), outputs(plain.model), atol=1e-4)
    part = Split(np.zeros((8, 10, 10, 6), np.float32), np.arange(8) % 2)
    file = TFLiteFile.read(export(normed, make_data("none", part, part), tmp_path / "model.tflite").path)
    assert normed.guarantees[0].check_file(file) == []
    assert file.macs() == count_macs(plain.model)


def test_a_share_of_the_rank_is_a_share_of_each_layers_own():
    model = chain((40,), layers.Dense(30, name="one"), layers.Dense(20, name="two"), layers.Dense(60, name="three"))
    result = lowered(model, ranks=0.2)
    assert result.guarantees[0].ranks == {"one": 6, "two": 4, "three": 4}


def test_variational_bayes_takes_the_planted_rank():
    model = chain((60,), layers.Dense(50, name="dense"))
    rng = np.random.default_rng(0)
    planted = rng.normal(size=(60, 4)) @ rng.normal(size=(4, 50))
    model.get_layer("dense").kernel.assign((planted + 0.3 * rng.normal(size=(60, 50))).astype(np.float32))
    assert lowered(model, rank="vbmf").guarantees[0].ranks == {"dense": 4}
    with pytest.raises(ValueError, match="spatial"):
        LowRank(rank="vbmf", form="cp")


def test_a_layer_of_which_nothing_stands_out_from_noise_is_left_alone():
    model = chain((60,), layers.Dense(50, name="planted"), layers.Dense(50, name="noise"))
    rng = np.random.default_rng(0)
    planted = rng.normal(size=(60, 4)) @ rng.normal(size=(4, 50)) + 0.3 * rng.normal(size=(60, 50))
    model.get_layer("planted").kernel.assign(planted.astype(np.float32))
    result = lowered(model, rank="vbmf")
    assert result.guarantees[0].ranks == {"planted": 4}
    assert [item.layer for item in result.skipped] == ["noise"]


def dead_inputs(kernel: np.ndarray) -> np.ndarray:
    return np.where(np.arange(kernel.shape[2])[:, None] < 2, kernel, 0)


def dead_filters(kernel: np.ndarray) -> np.ndarray:
    return np.where(np.arange(kernel.shape[3]) < 2, kernel, 0)


@pytest.mark.parametrize("spoilt", [dead_inputs, dead_filters, np.ones_like, np.zeros_like], ids=lambda f: f.__name__)
@pytest.mark.parametrize("rank", [3, 8])
def test_kernels_of_fewer_directions_than_the_rank_are_factorized_by_cp(spoilt, rank):
    model = chain((6, 6, 24), layers.Conv2D(24, 3, name="layer"))
    kernel = model.get_layer("layer").kernel
    kernel.assign(spoilt(np.asarray(kernel)).astype(np.float32))
    result = lowered(model, rank=rank, form="cp")
    if spoilt in (np.ones_like, np.zeros_like):
        np.testing.assert_allclose(outputs(result.model), outputs(model), atol=1e-3)
    assert np.isfinite(outputs(result.model)).all()


def test_a_file_that_does_not_run_the_factors_is_noticed(tmp_path):
    model = chain((9, 9, 8), layers.Conv2D(16, 3, name="layer"), layers.GlobalAveragePooling2D())
    part = Split(np.zeros((8, 9, 9, 8), np.float32), np.arange(8) % 2)
    data = make_data("none", part, part)
    whole = TFLiteFile.read(export(Candidate(model), data, tmp_path / "whole.tflite").path)
    result = lowered(model, rank=5, form="channel")
    file = TFLiteFile.read(export(result, data, tmp_path / "model.tflite").path)
    guarantee = result.guarantees[0]
    assert guarantee.check_file(file) == []
    assert [violation.layer for violation in guarantee.check_file(whole)] == ["layer_reduce"]
    (violation,) = Rank("stage", {"layer": 4}).check_file(file)
    assert violation.found == "rank 5 in the file, at most 4"


def test_a_rank_above_every_full_rank_is_refused_with_the_highest():
    with pytest.raises(CompressError, match="at most 24") as caught:
        lowered(LAYERS["dense"](), rank=25)
    assert caught.value.where == "strategy.lowrank.rank"


def test_images_that_nothing_looks_at_are_refused():
    with pytest.raises(ValueError, match="fit=outputs"):
        LowRank(images=100)


def test_where_nothing_says_how_far_the_layers_that_it_may_touch_keep_their_share():
    """Without a goal, convolutions with a small part in the parameters are not asked for a fifth of all of them."""
    layers = tf_keras.layers
    model = chain((12, 12, 8), layers.Conv2D(32, 3, name="conv"), layers.Flatten(), layers.Dense(64, name="dense"))
    part = Split(np.zeros((2, *model.input_shape[1:]), np.float32), np.zeros(2, int))
    selection = Selection(only=(Rule(name="conv"),))
    data = make_data("random", part, part)
    context = Context("lowrank", data, model, Recovery(method="none"), 0, selection=selection)
    lowered_model = LowRank().apply(Candidate(model), context).model
    assert lowered_model.get_layer("dense").count_params() == model.get_layer("dense").count_params()
    before = count_params(model) - model.get_layer("dense").count_params()
    after = count_params(lowered_model) - model.get_layer("dense").count_params()
    assert 0.7 * before < after <= 0.81 * before
