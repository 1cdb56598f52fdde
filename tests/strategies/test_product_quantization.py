"""Product quantization: the nearest vectors and the best codewords by their definitions; what is left of a model."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.candidate import Candidate
from compress.data.source import Data, Split, make_data
from compress.deploy.packing import packed_bytes, packed_model_bytes, write_cmp
from compress.deploy.tflite import export
from compress.errors import CompressError
from compress.graph.kernels import get_weight, kernels
from compress.graph.selection import Rule, Selection
from compress.metrics.accuracy import file_outputs
from compress.metrics.tflite_file import TFLiteFile
from compress.strategies.least_squares import Moments
from compress.strategies.pruning.prune import Prune
from compress.strategies.sharing import vectors
from compress.strategies.sharing.kmeans import Share
from compress.strategies.sharing.product_quantization import ProductQuantization, quantize_matrix, rounded
from compress.strategies.sharing.vector_codebook import VectorCodebook
from compress.strategies.strategy import Context
from compress.training import Recovery

layers = tf_keras.layers
SIZES = {"groups": st.integers(1, 6), "length": st.integers(1, 4), "outputs": st.integers(1, 7)}


def metrics_of(rng: np.random.Generator, groups: int, length: int) -> np.ndarray:
    roots = rng.normal(size=(groups, length, length))
    return roots @ roots.transpose(0, 2, 1) + 0.1 * np.eye(length)


def problem(inputs: int, outputs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs' second moments, and a matrix."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(300, inputs)) @ rng.normal(size=(inputs, inputs))
    return mixed.T @ mixed / 300, rng.normal(size=(inputs, outputs))


@given(**SIZES, codewords=st.integers(1, 5), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_each_vector_gets_the_nearest_codeword(
    groups: int, length: int, outputs: int, codewords: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    cut, book = rng.normal(size=(groups, length, outputs)), rng.normal(size=(codewords, length))
    metrics = metrics_of(rng, groups, length)
    labels, distances = vectors.assign(cut, metrics, book)
    away = book[:, None, :, None] - cut
    squares = np.einsum("kglo,glm,kgmo->kgo", away, metrics, away)
    np.testing.assert_allclose(distances, squares.min(0), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(np.take_along_axis(squares, labels[None], 0)[0], squares.min(0), rtol=1e-3, atol=1e-3)


def test_a_layer_is_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    cut, book, metrics = rng.normal(size=(5, 3, 11)), rng.normal(size=(4, 3)), metrics_of(rng, 5, 3)
    whole = vectors.assign(cut, metrics, book)
    for part in (8, 50, 100):
        monkeypatch.setattr(vectors, "_PART", part)
        for one, other in zip(vectors.assign(cut, metrics, book), whole, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@given(**SIZES, seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_cutting_and_putting_together(groups: int, length: int, outputs: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).normal(size=(groups * length, outputs))
    cut = vectors.cut(matrix, length)
    for group in range(groups):
        np.testing.assert_array_equal(cut[group], matrix[group * length : (group + 1) * length])
    book = cut.transpose(0, 2, 1).reshape(-1, length)
    labels = np.arange(groups * outputs).reshape(groups, outputs)
    np.testing.assert_array_equal(vectors.together(book, labels), matrix)


def test_well_separated_vectors_are_found() -> None:
    rng = np.random.default_rng(0)
    centres = 10 * rng.normal(size=(12, 4))
    chosen = rng.integers(0, 12, (20, 15))
    cut = vectors.cut(vectors.together(centres, chosen) + 0.01 * rng.normal(size=(80, 15)), 4)
    book = vectors.cluster(cut, metrics_of(rng, 20, 4), 12, np.random.default_rng(1))
    distance = np.abs(book[:, None] - centres).max(-1)
    assert distance.min(0).max() < 0.02


def test_weighed_means_of_one_codeword_are_least_squares() -> None:
    rng = np.random.default_rng(0)
    cut, metrics = rng.normal(size=(6, 3, 5)), metrics_of(rng, 6, 3)
    book = vectors.cluster(cut, metrics, 1, rng)
    roots = np.linalg.cholesky(metrics).transpose(0, 2, 1)
    rows = np.concatenate([roots[g] for g in range(6) for _ in range(5)])
    wanted = np.concatenate([roots[g] @ cut[g, :, o] for g in range(6) for o in range(5)])
    np.testing.assert_allclose(book[0], np.linalg.lstsq(rows, wanted, rcond=None)[0], atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_new_labels_and_new_codewords_never_cost_error(seed: int) -> None:
    gram, matrix = problem(24, 10, seed)
    rng = np.random.default_rng(seed)
    cut, metrics = vectors.cut(matrix, 4), vectors.blocks_of(gram, 4)
    np.testing.assert_array_equal(metrics[2], gram[8:12, 8:12])
    book = vectors.cluster(cut, metrics, 8, rng)
    labels, _ = vectors.assign(cut, metrics, book)
    errors = [vectors.error_of(gram, matrix - vectors.together(book, labels))]
    for _ in range(3):
        labels = vectors.descend(gram, matrix, book, labels)
        errors.append(vectors.error_of(gram, matrix - vectors.together(book, labels)))
        book = vectors.refit(gram, matrix, book, labels)
        errors.append(vectors.error_of(gram, matrix - vectors.together(book, labels)))
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(errors))
    assert errors[-1] < 0.8 * errors[0]


def test_the_codewords_are_those_of_least_squares() -> None:
    gram, matrix = problem(12, 9)
    rng = np.random.default_rng(0)
    labels, book = rng.integers(0, 5, (4, 9)).astype(np.int32), rng.normal(size=(6, 3))
    found = vectors.refit(gram, matrix, book, labels)
    root = np.linalg.cholesky(gram).T
    effects = [np.ravel(root @ vectors.together(unit.reshape(6, 3), labels)) for unit in np.eye(18)]
    best = np.linalg.lstsq(np.array(effects).T, np.ravel(root @ matrix), rcond=None)[0].reshape(6, 3)
    np.testing.assert_allclose(found[:5], best[:5], atol=1e-3)
    np.testing.assert_array_equal(found[5], book[5], "one that no vector has stays")


def test_what_the_layer_reads_counts_and_the_bias_takes_over_the_mean() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(1.0, 1.0, (400, 24)) @ rng.normal(size=(24, 24))
    ones = np.hstack([rows, np.ones((400, 1))])
    matrix = rng.normal(size=(25, 16))
    gram = ones.T @ ones / 400
    found, labels = quantize_matrix(Moments(gram, gram @ matrix), matrix, 4, 12, rng)
    assert len(np.unique(vectors.cut(found[:-1], 4).transpose(0, 2, 1).reshape(-1, 4), axis=0)) <= 12
    assert labels.shape == (6, 16)
    change = ones @ (found - matrix)
    np.testing.assert_allclose(change.mean(0), 0, atol=1e-8)
    cut = vectors.cut(matrix[:-1], 4)
    plain = np.broadcast_to(np.eye(4), (6, 4, 4))
    book = vectors.cluster(cut, plain, 12, rng)
    nearest = vectors.together(book, vectors.assign(cut, plain, book)[0])
    blind = rows @ (nearest - matrix[:-1])
    assert (change**2).sum() < 0.7 * ((blind - blind.mean(0)) ** 2).sum()


@given(seed=st.integers(0, 99), shape=st.sampled_from([(12, 5), (3, 2, 4, 3)]), length=st.sampled_from([2, 3, 4, 6]))
@settings(deadline=None, max_examples=30)
def test_the_projection_gives_each_vector_its_codewords_mean(seed: int, shape: tuple[int, ...], length: int) -> None:
    rng = np.random.default_rng(seed)
    value = rng.normal(size=shape).astype(np.float32)
    inputs, outputs = int(np.prod(shape[:-1])), shape[-1]
    labels = rng.integers(0, 4, (inputs // length, outputs))
    guarantee = VectorCodebook("stage", 4, {"a/kernel": labels}, {"a/kernel": list(shape)})
    once = np.asarray(guarantee.project("a/kernel", tf.constant(value)))
    cut, flat = vectors.cut(value.reshape(inputs, outputs), length).transpose(0, 2, 1), np.zeros((4, length))
    for label in np.unique(labels):
        flat[label] = cut[labels == label].mean(0)
    np.testing.assert_allclose(once, vectors.together(flat, labels).reshape(shape), atol=1e-6)
    model = SimpleNamespace(get_layer=lambda name: SimpleNamespace(kernel=once))
    assert guarantee.check(model) == []
    assert guarantee.check_file(SimpleNamespace(kernel_of=lambda name, shape: once)) == []
    assert len(guarantee.check_file(SimpleNamespace(kernel_of=lambda name, shape: value))) == (labels.size > 4)
    assert guarantee.check_file(SimpleNamespace(kernel_of=lambda name, shape: None))


@given(bits=st.integers(4, 8), seed=st.integers(0, 99), scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e20]))
@settings(deadline=None, max_examples=30)
def test_rounding_is_to_exact_multiples_of_a_step(bits: int, seed: int, scale: float) -> None:
    kernel = (scale * np.random.default_rng(seed).normal(size=(5, 7))).astype(np.float32)
    found = rounded(kernel, bits)
    step = float(np.abs(kernel).max()) / (2 ** (bits - 1) - 1)
    assert np.abs(found - kernel).max() <= 0.5001 * step
    assert len(np.unique(found)) <= 2**bits - 1
    np.testing.assert_array_equal(rounded(np.zeros((2, 2), np.float32), bits), np.zeros((2, 2)))


@pytest.fixture(scope="module")
def data() -> Data:
    x = np.random.default_rng(0).normal(size=(96, 6, 6, 4)).astype(np.float32)
    part = Split(x, np.arange(96) % 3)
    return make_data("random", part, part)


@pytest.fixture(scope="module")
def model() -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((6, 6, 4), name="image")
    x = layers.Conv2D(24, 3, use_bias=False, name="conv")(image)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.DepthwiseConv2D(2, name="depthwise")(x)
    x = layers.Flatten()(layers.Conv2D(32, 1, activation="relu", name="mix")(x))
    x = layers.Dense(7, name="middle")(x)
    x = layers.Dense(3, name="prime")(x)
    x = layers.Dense(1, name="single")(layers.Dense(1, name="tiny")(x))
    built = tf_keras.Model(image, layers.Dense(3, name="head")(x))
    rng = np.random.default_rng(0)
    built.get_layer("norm").set_weights([rng.uniform(0.5, 1.5, 24).astype(np.float32) for _ in range(4)])
    return built


TRAINING = Recovery(epochs=2, batch_size=16, learning_rate=0.02)


def context(model: tf_keras.Model, data: Data, recovery: Recovery) -> Context:
    return Context(stage="vectors", data=data, reference=model, recovery=recovery, seed=1)


def distinct(kernel: np.ndarray, length: int) -> int:
    cut = vectors.cut(kernel.reshape(-1, kernel.shape[-1]), length)
    return len(np.unique(cut.transpose(0, 2, 1).reshape(-1, length), axis=0))


@pytest.mark.parametrize("recovery", [Recovery(method="none"), TRAINING], ids=["none", "training"])
def test_a_model_of_few_vectors(recovery: Recovery, model: tf_keras.Model, data: Data, tmp_path: Path) -> None:
    strategy = ProductQuantization(codewords=32, length=4, images=64)
    result = strategy.apply(Candidate(model), context(model, data, recovery))
    assert {item.layer: item.by_choice for item in result.skipped} == {
        "depthwise": False,
        "prime": True,
        "tiny": True,
        "single": True,
        "head": True,
    }
    reasons = {item.layer: item.reason for item in result.skipped}
    assert reasons["prime"] == "no vector of at most 4 weights divides its 7 inputs"
    assert reasons["tiny"] == "1 vector of 3 weights: too few to share"
    assert reasons["single"] == "no vector of at most 4 weights divides its 1 inputs"
    (guarantee,) = result.guarantees
    assert guarantee.layers == {"conv", "mix", "middle"}
    assert guarantee.check(result.model) == []
    limits = {"conv": 32, "mix": 32, "middle": 32}
    for name, most in limits.items():
        kernel = get_weight(result.model, f"{name}/kernel")
        assert most / 2 < distinct(kernel, 4) <= most
        # Whole steps of one grid for the codewords, and as many bits for each vector as their number needs.
        bound = 4 * most + kernel.size / 4 * np.log2(most) / 8 + 60
        assert packed_bytes(kernel, "ans") <= bound < kernel.nbytes / 6
    artifact = export(result, data, tmp_path / "model.tflite")
    assert guarantee.check_file(TFLiteFile.read(artifact.path)) == []
    np.testing.assert_allclose(
        file_outputs(artifact.path, data.test.x), np.asarray(result.model(data.test.x)), atol=1e-3
    )
    result.model.save(tmp_path / "model.keras")
    write_cmp(tmp_path / "model.cmp", tmp_path / "model.keras")
    assert (tmp_path / "model.cmp").stat().st_size < packed_model_bytes(model, "ans") / 3


def test_later_layers_make_up_for_earlier_ones(model: tf_keras.Model, data: Data) -> None:
    """Against the nearest vectors of each layer by itself."""
    only = Selection(only=(Rule(name="conv|mix|middle"),))
    own = context(model, data, Recovery(method="none")).for_stage("vectors", selection=only)
    result = ProductQuantization(codewords=16, images=96).apply(Candidate(model), own)
    assert result.skipped == ()
    assert result.measured["change_of_logits"] > 0
    from compress.graph.fold import fold_batch_norm

    blind = fold_batch_norm(model)
    for kernel in kernels(blind):
        if kernel.layer.name not in ("conv", "mix", "middle"):
            continue
        cut = vectors.cut(kernel.value.reshape(-1, kernel.value.shape[-1]), 4)
        plain = np.broadcast_to(np.eye(4), (len(cut), 4, 4))
        book = vectors.cluster(cut, plain, 16, np.random.default_rng(0))
        kernel.layer.kernel.assign(
            vectors.together(book, vectors.assign(cut, plain, book)[0]).reshape(kernel.value.shape)
        )
    wanted, ours, theirs = (np.asarray(m(data.test.x)) for m in (model, result.model, blind))
    assert ((ours - wanted) ** 2).mean() < 0.5 * ((theirs - wanted) ** 2).mean()


def test_a_layer_too_large_to_be_solved_for_is_weighed_by_its_inputs(
    model: tf_keras.Model, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.strategies.least_squares.MOST_ROWS", 8)
    result = ProductQuantization(codewords=16, images=64, bits=None).apply(
        Candidate(model), context(model, data, Recovery(method="none"))
    )
    for name in ("conv", "mix", "middle"):
        assert distinct(get_weight(result.model, f"{name}/kernel"), 4) <= 16
    np.testing.assert_array_equal(result.model.get_layer("mix").bias, model.get_layer("mix").bias)


def test_nothing_to_cut_is_an_error_with_the_reasons(model: tf_keras.Model, data: Data) -> None:
    only = Selection(only=(Rule(name="prime|single|depthwise"),))
    own = context(model, data, Recovery(method="none")).for_stage("vectors", selection=only)
    with pytest.raises(CompressError, match="depthwise: it is no Dense or ordinary Conv2D") as caught:
        ProductQuantization(images=8).apply(Candidate(model), own)
    assert "prime: no vector of at most 4 weights divides its 7 inputs" in str(caught.value)


def test_what_it_breaks_and_what_breaks_it_is_refused() -> None:
    ours = ProductQuantization()
    for other in (Prune(), Share()):
        assert ours.clashes_with(other) is not None
        assert other.clashes_with(ours) is not None
