"""Structural matrices: the chain multiplies with the nearest matrix of the structure, said in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.candidate import Candidate
from compress.data.source import Data, Split, make_data
from compress.deploy.tflite import export
from compress.errors import CompressError
from compress.graph.rewrite import rewrite
from compress.metrics.accuracy import file_outputs
from compress.metrics.tflite_file import TFLiteFile
from compress.strategies.sharing.block_circulant import BlockCirculant
from compress.strategies.sharing.block_toeplitz import BlockToeplitz
from compress.strategies.sharing.butterfly import Butterfly
from compress.strategies.sharing.displacement import Pairs, nearest_pairs
from compress.strategies.sharing.kronecker import Kronecker
from compress.strategies.sharing.low_displacement import LowDisplacement
from compress.strategies.sharing.structured import Structured, _named
from compress.strategies.strategy import Context
from compress.training import Recovery

layers = tf_keras.layers


def dense_model(inputs: int, outputs: int) -> tf_keras.Model:
    image = tf_keras.Input((inputs,))
    return tf_keras.Model(image, layers.Dense(outputs, activation="relu", name="dense")(image))


def multiplied_with(strategy: Structured, matrix: np.ndarray) -> tuple[np.ndarray, int]:
    """The matrix that the chain multiplies with, read off its answers to unit vectors; its numbers."""
    inputs, outputs = matrix.shape
    image = tf_keras.Input((inputs,))
    plain = tf_keras.Model(image, layers.Dense(outputs, use_bias=False, name="dense")(image))
    found = strategy.project(matrix)
    assert not isinstance(found, str), found
    chain = rewrite(plain, {"dense": _named(found, plain.get_layer("dense"))})
    return np.asarray(chain(np.eye(inputs, dtype=np.float32))), found.size


def random_matrix(inputs: int, outputs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(inputs, outputs)).astype(np.float32)


@given(rows=st.integers(1, 3), columns=st.integers(1, 3), size=st.integers(2, 5))
@settings(deadline=None, max_examples=8)
def test_circulant_blocks(rows: int, columns: int, size: int) -> None:
    matrix = random_matrix(rows * size, columns * size)
    found, count = multiplied_with(BlockCirculant(block=size), matrix)
    assert count == rows * columns * size
    for row in range(rows):
        for column in range(columns):
            block = np.s_[row * size : (row + 1) * size, column * size : (column + 1) * size]
            first = np.array([np.mean([matrix[block][(t + s) % size, t] for t in range(size)]) for s in range(size)])
            np.testing.assert_allclose(found[block], scipy.linalg.circulant(first), atol=1e-5)


@given(rows=st.integers(1, 3), columns=st.integers(1, 3), size=st.integers(3, 5))
@settings(deadline=None, max_examples=8)
def test_toeplitz_blocks(rows: int, columns: int, size: int) -> None:
    matrix = random_matrix(rows * size, columns * size)
    found, count = multiplied_with(BlockToeplitz(block=size), matrix)
    assert count == rows * columns * (2 * size - 1)
    for row in range(rows):
        for column in range(columns):
            block = np.s_[row * size : (row + 1) * size, column * size : (column + 1) * size]
            down, right = ([np.diagonal(matrix[block], sign * k).mean() for k in range(size)] for sign in (-1, 1))
            np.testing.assert_allclose(found[block], scipy.linalg.toeplitz(down, right), atol=1e-5)


@pytest.mark.parametrize(("inputs", "outputs"), [(12, 8), (6, 35), (16, 16)])
def test_a_sum_of_kronecker_products_comes_back(inputs: int, outputs: int) -> None:
    found, count = multiplied_with(Kronecker(rank=1), random_matrix(inputs, outputs))
    assert count < inputs * outputs
    # What is one already stays as it is; more products come nearer, as many as there can be come to the matrix itself.
    again, _ = multiplied_with(Kronecker(rank=1), found)
    np.testing.assert_allclose(again, found, atol=1e-5)
    matrix = random_matrix(inputs, outputs)
    errors = [np.linalg.norm(multiplied_with(Kronecker(rank=rank), matrix)[0] - matrix) for rank in (1, 2, 1000)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4


def test_one_kronecker_product_is_numpys() -> None:
    one, two = random_matrix(3, 4, 1), random_matrix(4, 2, 2)
    product = np.kron(one, two)
    found, _ = multiplied_with(Kronecker(rank=1), product)
    np.testing.assert_allclose(found, product, atol=1e-4)


def test_a_fourier_like_matrix_is_a_butterfly_to_the_last_digit() -> None:
    hadamard = scipy.linalg.hadamard(16).astype(np.float32)
    found, count = multiplied_with(Butterfly(), hadamard)
    np.testing.assert_allclose(found, hadamard, atol=1e-4)
    assert count == 2 * 16 * 4


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (5, 8), (16, 10), (7, 3)])
def test_what_is_a_butterfly_stays_one(inputs: int, outputs: int) -> None:
    matrix = random_matrix(inputs, outputs)
    found, _ = multiplied_with(Butterfly(), matrix)
    assert np.linalg.norm(found - matrix) < np.linalg.norm(matrix)
    again, _ = multiplied_with(Butterfly(), found)
    np.testing.assert_allclose(again, found, atol=1e-4)


def sum_of_pairs(pairs: Pairs) -> np.ndarray:
    """What the definition says, by SciPy: a skew-circulant matrix is Toeplitz."""
    total = np.zeros((len(pairs.circulant),) * 2)
    for g, h in zip(pairs.circulant.T, pairs.skew.T, strict=True):
        skew = scipy.linalg.toeplitz(h, np.concatenate([h[:1], -h[:0:-1]]))
        total += scipy.linalg.circulant(g) @ skew
    return total


@given(size=st.integers(2, 14), rank=st.integers(1, 3), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_a_sum_of_circulant_times_skew_circulant_is_found_again(size: int, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = sum_of_pairs(Pairs(rng.normal(size=(size, rank)), rng.normal(size=(size, rank))))
    found = nearest_pairs(matrix, min(rank, size - 1) if rank < size else size)
    np.testing.assert_allclose(found.matrix(), sum_of_pairs(found), atol=1e-8 * np.abs(matrix).max() + 1e-9)
    np.testing.assert_allclose(sum_of_pairs(found), matrix, atol=1e-4 * np.abs(matrix).max())


def test_more_displacement_rank_comes_nearer_and_better_than_the_singular_vectors_alone() -> None:
    matrix = random_matrix(24, 24).astype(np.float64)
    errors = [np.linalg.norm(nearest_pairs(matrix, rank).matrix() - matrix) for rank in (1, 2, 4, 8, 24)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6
    displacement = np.roll(matrix, 1, axis=0) - np.concatenate([matrix[:, 1:], -matrix[:, :1]], 1)
    vectors, values, others = np.linalg.svd(displacement)
    start = Pairs(vectors[:, :4] * values[:4] / 2, others[:4].T[::-1])
    assert errors[2] < 0.8 * np.linalg.norm(sum_of_pairs(start) - matrix)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize(("inputs", "outputs"), [(12, 12), (24, 8), (21, 8), (8, 24), (8, 21), (9, 2)])
def test_low_displacement_rank_in_square_blocks(inputs: int, outputs: int, rank: int) -> None:
    matrix = random_matrix(inputs, outputs)
    if rank >= min(inputs, outputs):
        assert "no more than rank 2" in str(LowDisplacement(rank=rank).project(matrix))
        return
    found, count = multiplied_with(LowDisplacement(rank=rank), matrix)
    size, length = min(inputs, outputs), max(inputs, outputs)
    blocks = -(-length // size)
    assert count == 2 * size * rank * blocks
    whole = np.zeros((blocks * size, size))
    whole[:length] = matrix if inputs >= outputs else matrix.T
    expected = [
        sum_of_pairs(nearest_pairs(block if inputs >= outputs else block.T, rank))
        for block in whole.reshape(blocks, size, size)
    ]
    joined = np.concatenate(expected, 0 if inputs >= outputs else 1)[:inputs, :outputs]
    np.testing.assert_allclose(found, joined, atol=1e-4)


@pytest.fixture(scope="module")
def data() -> Data:
    rng = np.random.default_rng(0)
    split = Split(rng.normal(size=(64, 32)).astype(np.float32), np.arange(64) % 4)
    return make_data("random", split, split)


def context(model: tf_keras.Model, data: Data, recovery: Recovery) -> Context:
    return Context(stage="stage", data=data, reference=model, recovery=recovery, seed=0)


def two_layers() -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((32,))
    x = layers.Dense(32, activation="relu", name="first", bias_initializer="normal")(image)
    return tf_keras.Model(image, layers.Dense(4, name="last")(x))


ALL = [BlockCirculant(block=8), BlockToeplitz(block=8), Kronecker(rank=2), Butterfly(), LowDisplacement(rank=2)]


@pytest.mark.parametrize("strategy", ALL, ids=lambda s: type(s).__name__)
def test_the_layer_is_replaced_trained_and_exported(strategy: Structured, data: Data, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = two_layers()
    training = Recovery(epochs=1, batch_size=16)
    result = strategy.apply(Candidate(model), context(model, data, training))
    assert result.model.count_params() < model.count_params()
    (guarantee,) = result.guarantees
    assert guarantee.check(result.model) == []
    artifact = export(result, data, tmp_path / "model.tflite")
    assert guarantee.check_file(TFLiteFile.read(artifact.path)) == []
    expected = np.asarray(result.model(data.test.x))
    np.testing.assert_allclose(file_outputs(artifact.path, data.test.x), expected, atol=1e-4)
    assert guarantee.check(model) != []


def test_bias_and_activation_stay(data: Data) -> None:
    model = two_layers()
    strategy = BlockCirculant(block=8)
    result = strategy.apply(Candidate(model), context(model, data, Recovery(method="none")))
    first = model.get_layer("first")
    nearest, _ = multiplied_with(strategy, np.asarray(first.kernel))
    hidden = np.maximum(data.test.x @ nearest + np.asarray(first.bias), 0)
    last = model.get_layer("last")
    expected = hidden @ np.asarray(last.kernel) + np.asarray(last.bias)
    np.testing.assert_allclose(result.model(data.test.x), expected, atol=1e-4)
    assert [(item.layer, item.by_choice) for item in result.skipped] == [("last", False)]


def test_a_block_that_divides_nothing_is_an_error_with_the_sizes(data: Data) -> None:
    model = two_layers()
    with pytest.raises(CompressError, match=r"32 inputs and 32 outputs are not both multiples of block=7"):
        BlockCirculant(block=7).apply(Candidate(model), context(model, data, Recovery(method="none")))


def test_what_would_not_pay_is_left_alone(data: Data) -> None:
    model = two_layers()
    result = Kronecker(rank=6).apply(Candidate(model), context(model, data, Recovery(method="none")))
    assert [(item.layer, item.by_choice) for item in result.skipped] == [("last", True)]
    assert "would not pay" in result.skipped[0].reason
