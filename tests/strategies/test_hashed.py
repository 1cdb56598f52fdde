"""Hashed sharing: projection and least squares against NumPy, and the packed file that holds the buckets alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compress.candidate import Candidate, Hash, Storage
from compress.data.source import Data, Split, make_data
from compress.deploy.coding.hashing import buckets_and_signs, find_hash
from compress.deploy.packed import read_packed
from compress.deploy.packing import write_cmp
from compress.deploy.tflite import export
from compress.errors import CompressError
from compress.graph.kernels import kernels
from compress.metrics.tflite_file import TFLiteFile
from compress.strategies.least_squares import Moments
from compress.strategies.pruning.prune import Prune
from compress.strategies.sharing.buckets import Buckets
from compress.strategies.sharing.hashed import Hashed, SummedSteps, ties_of
from compress.strategies.sharing.ties import tied_least_squares
from compress.strategies.strategy import Context
from compress.training import Recovery

layers = tf_keras.layers
NONE = Recovery(method="none")
TRAINING = Recovery(epochs=2, batch_size=16, learning_rate=0.01)


def design(hashing: Hash, count: int) -> np.ndarray:
    """The matrix [count, buckets] that makes weights of the numbers: one plus or minus one in each row."""
    buckets, signs = buckets_and_signs(hashing, count)
    matrix = np.zeros((count, hashing.buckets))
    matrix[np.arange(count), buckets] = np.where(signs, -1, 1)
    return matrix


def guarantee(key: int, buckets: int, shape: tuple[int, ...]) -> Buckets:
    return Buckets("hashed", {"dense/kernel": key}, {"dense/kernel": buckets}, {"dense/kernel": list(shape)})


@given(key=st.integers(0, 255), buckets=st.integers(2, 9), data=st.data())
@settings(deadline=None, max_examples=40)
def test_projection_is_the_least_squares_solution(key: int, buckets: int, data: st.DataObject) -> None:
    shape = (5, 4)
    eighths = st.integers(-20, 20).map(lambda n: n / 8)
    value = data.draw(hnp.arrays(np.float32, shape, elements=eighths))
    alive = value.ravel() != 0
    matrix = design(Hash(key, buckets), value.size) * alive[:, None]
    numbers = np.linalg.lstsq(matrix, value.ravel().astype(np.float64), rcond=None)[0]
    projected = np.asarray(guarantee(key, buckets, shape).project("dense/kernel", tf.constant(value)))
    np.testing.assert_allclose(projected.ravel(), matrix @ numbers, atol=1e-6)


def test_places_are_spread_over_buckets_and_signs() -> None:
    buckets, signs = buckets_and_signs(Hash(5, 50), 100_000)
    # A uniform hash: 2000 in each bucket, give or take 45.
    assert np.abs(np.bincount(buckets, minlength=50) - 2000).max() < 250
    assert abs(signs.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(signs, buckets % 2)[0, 1]) < 0.02
    other, _ = buckets_and_signs(Hash(6, 50), 100_000)
    assert abs(np.mean(buckets == other) - 0.02) < 0.005


@pytest.mark.parametrize("outputs", [1, 6])
def test_a_kernel_whose_last_axis_comes_first_has_the_same_places(outputs: int) -> None:
    as_in_keras, _ = buckets_and_signs(Hash(1, 7), 60)
    moved, _ = buckets_and_signs(Hash(1, 7), 60, outputs)
    np.testing.assert_array_equal(moved, as_in_keras.reshape(-1, outputs).T.ravel())


@pytest.mark.parametrize(
    ("count", "buckets", "zeros"), [(235_200, 29_400, 0), (235_200, 29_400, 0.9), (300, 40, 0), (3000, 3, 0.5)]
)
def test_the_hash_is_found_in_the_weights(count: int, buckets: int, zeros: float) -> None:
    rng = np.random.default_rng(count)
    weights = design_values(rng, Hash(200, buckets), count)
    weights[rng.random(count) < zeros] = 0
    assert find_hash(weights.view(np.uint32)) == Hash(200, buckets)
    rng.shuffle(weights)
    assert find_hash(weights.view(np.uint32)) != Hash(200, buckets)


def design_values(rng: np.random.Generator, hashing: Hash, count: int) -> np.ndarray:
    buckets, signs = buckets_and_signs(hashing, count)
    numbers = rng.normal(size=hashing.buckets).astype(np.float32)
    return np.where(signs, -numbers[buckets], numbers[buckets])


def test_least_squares_on_activations_equals_the_normal_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.strategies.sharing.ties._ITERATIONS", 300)
    monkeypatch.setattr("compress.strategies.sharing.ties._PRECISION", 1e-24)
    rng = np.random.default_rng(0)
    inputs, outputs, hashing, ridge = 8, 5, Hash(3, 11), 1e-2
    rows = np.hstack([rng.normal(size=(60, inputs)) @ rng.normal(size=(inputs, inputs)), np.ones((60, 1))])
    before = rng.normal(size=(inputs + 1, outputs))
    before[:-1][rng.random((inputs, outputs)) < 0.3] = 0
    targets = rows @ before
    known = Moments(rows.T @ rows / 60, rows.T @ targets / 60)
    found = tied_least_squares(known, before, ties_of(hashing, inputs * outputs), ridge)
    # All outputs in one vector: unknown are the numbers and the biases.
    alive = before[:-1].ravel() != 0
    whole = np.zeros(((inputs + 1) * outputs, hashing.buckets + outputs))
    whole[: inputs * outputs, : hashing.buckets] = design(hashing, inputs * outputs) * alive[:, None]
    whole[inputs * outputs :, hashing.buckets :] = np.eye(outputs)
    strength = ridge * np.diag(known.inputs)[:-1].mean()
    gram = known.inputs + np.diag([*[strength] * inputs, strength * 1e-3])
    weighed = np.kron(gram, np.eye(outputs))
    wanted = np.linalg.lstsq(whole.T @ weighed @ whole, whole.T @ weighed @ before.ravel(), rcond=None)[0]
    np.testing.assert_allclose(found.ravel(), whole @ wanted, atol=1e-6)
    assert not found[:-1].ravel()[~alive].any()


def test_a_bucket_moves_by_the_sum_of_its_weights_moves() -> None:
    bound = guarantee(9, 3, (4, 3))
    start = bound.project("dense/kernel", tf.constant(np.random.default_rng(0).normal(size=(4, 3)), tf.float32))
    weights = tf.Variable(start)
    steps = SummedSteps(weights, "dense/kernel", bound)
    change = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    weights.assign_add(change)
    steps(tf.constant(0.5))
    matrix = design(Hash(9, 3), 12)
    expected = np.asarray(start).ravel() + matrix @ (matrix.T @ change.ravel())
    np.testing.assert_allclose(np.asarray(weights).ravel(), expected, atol=1e-5)


@pytest.fixture(scope="module")
def data() -> Data:
    x = np.random.default_rng(0).normal(size=(96, 6, 6, 2)).astype(np.float32)
    part = Split(x, np.arange(96) % 3)
    return make_data("random", part, part)


@pytest.fixture
def model() -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((6, 6, 2), name="image")
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="conv")(image)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = layers.Dense(40, activation="relu", name="wide")(layers.Flatten()(x))
    x = layers.Dense(1, name="narrow")(x)
    return tf_keras.Model(image, layers.Dense(3, name="last")(x))


def context(model: tf_keras.Model, data: Data, recovery: Recovery) -> Context:
    return Context(stage="hashed", data=data, reference=model, recovery=recovery, seed=1)


@pytest.mark.parametrize(
    ("fields", "recovery"),
    [({}, NONE), ({}, TRAINING), ({"gradient": "sum", "images": 0}, TRAINING)],
    ids=["none", "mean", "sum"],
)
def test_every_kernel_is_made_of_few_numbers(
    fields: dict[str, object], recovery: Recovery, model: tf_keras.Model, data: Data
) -> None:
    result = Hashed(weights=0.125, **fields).apply(Candidate(model), context(model, data, recovery))
    assert [item.layer for item in result.skipped] == ["last"]
    (bound,) = result.guarantees
    assert bound.layers == {"conv", "depthwise", "wide", "narrow"}
    assert bound.check(result.model) == []
    for kernel in kernels(result.model):
        if kernel.layer.name != "last":
            numbers = len(np.unique(np.abs(kernel.value)))
            assert kernel.size / 12 < numbers <= round(kernel.size / 8)
    wide = result.model.get_layer("wide").kernel
    wide.assign(tf.reverse(wide, [0]))
    (violation,) = bound.check(result.model)
    assert violation.layer == "wide/kernel"


def test_solving_on_images_keeps_the_outputs_nearer_than_means_do(model: tf_keras.Model, data: Data) -> None:
    wanted = model.predict(data.train.x, verbose=0)
    errors = {}
    for images in (0, 96):
        found = Hashed(weights=0.5, images=images).apply(Candidate(model), context(model, data, NONE)).model
        errors[images] = float(np.mean((found.predict(data.train.x, verbose=0) - wanted) ** 2))
    assert errors[96] < errors[0] / 2


def packed_size(folder: Path, source: Callable[[Path], object], name: str, **settings: object) -> tuple[int, bytes]:
    source(folder / name)
    target = folder / "model.cmp"
    write_cmp(target, folder / name, **settings)
    return target.stat().st_size, target.read_bytes()


@pytest.mark.parametrize("pruned", [False, True])
def test_the_packed_file_holds_the_buckets_alone(pruned: bool, model: tf_keras.Model, data: Data, tmp_path) -> None:
    candidate = Candidate(model)
    if pruned:
        candidate = Prune(sparsity=0.7).apply(candidate, context(model, data, NONE))
    plain, _ = packed_size(tmp_path, candidate.model.save, "plain.keras")
    result = Hashed(weights=0.1).apply(candidate, context(model, data, NONE))
    size, content = packed_size(tmp_path, result.model.save, "hashed.keras")
    assert [v for bound in result.guarantees for v in bound.check(result.model)] == []
    numbers = sum(k.size for k in kernels(result.model))
    saved = numbers * 4 * ((0.3 if pruned else 1) - 0.1)
    assert plain - size > 0.6 * saved
    unpacked = read_packed(content, "hashed.cmp").arrays
    kernel = result.model.get_layer("wide").kernel.numpy()
    assert any(a.shape == kernel.shape and a.tobytes() == kernel.tobytes() for a in unpacked.values())


@pytest.mark.parametrize("scheme", ["int8", "float16"])
def test_integers_and_half_floats_are_packed_by_the_hash_too(scheme, model, data, tmp_path) -> None:
    result = Hashed(weights=0.1).apply(Candidate(model), context(model, data, NONE))
    artifact = export(result.evolve(storage=Storage(scheme)), data, tmp_path / "model.tflite")
    (bound,) = result.guarantees
    assert bound.check_file(TFLiteFile.read(artifact.path)) == []
    sizes = []
    for hashes in ((), bound.hashes().values()):
        write_cmp(tmp_path / "model.cmp", artifact.path, hashes=hashes)
        packed = read_packed((tmp_path / "model.cmp").read_bytes(), "model.cmp")
        sizes.append(sum(array.nbytes for array in packed.arrays.values()))
        sizes.append((tmp_path / "model.cmp").stat().st_size)
    assert sizes[0] == sizes[2]
    weights = sum(k.size for k in kernels(result.model))
    assert sizes[1] - sizes[3] > 0.5 * weights


def test_bad_sizes_are_refused_or_listed(model: tf_keras.Model, data: Data) -> None:
    with pytest.raises(ValueError, match="less than 1"):
        Hashed(weights=1.0)
    # One bucket, or none, for every kernel.
    with pytest.raises(CompressError, match="at least two buckets") as caught:
        Hashed(weights=1e-6).apply(Candidate(model), context(model, data, NONE))
    assert "would have 0 buckets" in caught.value.received


def test_a_model_that_cannot_be_walked_needs_no_images(data: Data) -> None:
    words = tf_keras.Input((6,), name="words")
    x = layers.Embedding(9, 4, mask_zero=True, name="embedding")(words)
    model = tf_keras.Model(words, layers.Dense(3, name="dense")(layers.GlobalAveragePooling1D()(x)))
    with pytest.raises(CompressError, match=r"strategy\.hashed\.images=0"):
        Hashed(weights=0.5).apply(Candidate(model), context(model, data, NONE))
    result = Hashed(weights=0.5, images=0).apply(Candidate(model), context(model, data, NONE))
    assert [(item.layer, item.by_choice) for item in result.skipped] == [("embedding", False)]
