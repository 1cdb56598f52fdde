"""Rate and distortion: the budget is met by the packed file itself; levels pay for their bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tf_keras
from hypothesis import example, given
from hypothesis import strategies as st

from compress.candidate import Candidate
from compress.data.digits import Digits
from compress.deploy.packing import read_model, write_cmp
from compress.deploy.tflite import export
from compress.errors import CompressError
from compress.graph.kernels import kernels
from compress.graph.selection import Rule, Selection
from compress.metrics.accuracy import keras_accuracy
from compress.metrics.counts import count_params
from compress.metrics.tflite_file import TFLiteFile
from compress.models.small import DigitsCnn
from compress.models.source import Schedule
from compress.reference import make_reference
from compress.strategies.least_squares import Moments
from compress.strategies.pruning.prune import Prune
from compress.strategies.sharing.rate_distortion import RateDistortion, dearer, quantize_matrix
from compress.strategies.strategy import Context
from compress.training import Recovery

LAYERS = tf_keras.layers


def problem(seed: int = 0) -> tuple[Moments, np.ndarray]:
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(400, 20)) @ rng.normal(size=(20, 20))
    rows = np.hstack([inputs, np.ones((400, 1))])
    matrix = rng.normal(size=(21, 6))
    gram = rows.T @ rows / len(rows)
    return Moments(gram, gram @ matrix), matrix


def entropy(levels: np.ndarray) -> float:
    """Bits of all levels together under an ideal code."""
    counts = np.unique(levels, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


@pytest.mark.parametrize("seed", [0, 1])
def test_dearer_bits_are_fewer_and_cost_error(seed: int) -> None:
    known, matrix = problem(seed)
    bits, errors = [], []
    for price in (1e-3, 1e-2, 1e-1, 1.0):
        found, levels = quantize_matrix(known, matrix, price)
        step = np.abs(found[:-1][levels != 0] / levels[levels != 0])
        np.testing.assert_allclose(step, step.flat[0], rtol=1e-9)
        change = found - matrix
        errors.append(float(np.einsum("io,io->", change, known.inputs @ change)))
        bits.append(entropy(levels))
    assert bits == sorted(bits, reverse=True)
    assert errors == sorted(errors)
    assert bits[-1] < bits[0] / 2


@example(excess=1.0006)
@given(excess=st.floats(1e-3, 1e3))
def test_a_file_just_above_the_budget_makes_bits_dearer_by_a_real_step(excess: float) -> None:
    """Or the next file would be the same one; one below the budget makes them cheaper."""
    assert (dearer(excess) >= 1.2) if excess > 1 else (dearer(excess) <= 0.84)


def test_error_and_bits_together_are_less_than_those_of_the_nearest_levels() -> None:
    known, matrix = problem()
    price = 0.05
    found, levels = quantize_matrix(known, matrix, price)
    step = float(np.abs(found[:-1]).max() / np.abs(levels).max())

    def cost(weights: np.ndarray, chosen: np.ndarray) -> float:
        change = weights - matrix
        return float(np.einsum("io,io->", change, known.inputs @ change)) + price * entropy(chosen)

    nearest = np.rint(matrix[:-1] / step)
    assert cost(found, levels) < 0.95 * cost(np.vstack([nearest * step, matrix[-1:]]), nearest)


def test_zeros_stay_zero() -> None:
    known, matrix = problem()
    alive = np.random.default_rng(1).random((20, 6)) < 0.5
    found, levels = quantize_matrix(known, np.vstack([matrix[:-1] * alive, matrix[-1:]]), 1e-3, alive)
    assert not found[:-1][~alive].any()
    assert (levels[alive] != 0).mean() > 0.5


@pytest.fixture(scope="module")
def context() -> Context:
    data = Digits(train_limit=512, test_limit=256).load()
    model = make_reference(DigitsCnn(train=Schedule(epochs=4)), data, 0)
    return Context("rate_distortion", data, model, Recovery(method="none"), seed=0)


@pytest.mark.parametrize(
    "recovery", [Recovery(method="none"), Recovery(epochs=1, batch_size=64)], ids=["none", "train"]
)
def test_the_packed_file_has_the_size_that_is_asked_for(recovery: Recovery, context: Context, tmp_path: Path) -> None:
    strategy = RateDistortion(bytes=0.06, images=64)
    candidate = strategy.apply(Candidate(context.reference), context.for_stage("rate_distortion", recovery=recovery))
    assert [v for guarantee in candidate.guarantees for v in guarantee.check(candidate.model)] == []
    candidate.model.save(tmp_path / "model.keras")
    write_cmp(tmp_path / "model.cmp", tmp_path / "model.keras")
    share = (tmp_path / "model.cmp").stat().st_size / (4 * count_params(context.reference))
    assert 0.05 <= share <= 0.0605
    before = keras_accuracy(context.reference, context.data.test)
    assert keras_accuracy(candidate.model, context.data.test) > before - 3
    assert read_model(tmp_path / "model.keras").kind == "keras"


def test_zeros_of_an_earlier_stage_and_layers_left_out_stay_as_they_are(context: Context) -> None:
    pruned = Prune(sparsity=0.5).apply(Candidate(context.reference), context.for_stage("prune"))
    own = context.for_stage("rate_distortion", selection=Selection(skip=(Rule(name="conv1"),)))
    result = RateDistortion(bytes=0.08, images=64).apply(pruned, own)
    for before, after in zip(kernels(pruned.model), kernels(result.model), strict=True):
        assert not after.value[before.value == 0].any()
        assert (len(np.unique(after.value)) <= 63) == (after.layer.name != "conv1")


def test_a_size_that_cannot_be_reached_is_an_error(context: Context) -> None:
    with pytest.raises(CompressError, match="a size that the packed file can have") as caught:
        RateDistortion(bytes=0.002, images=16).apply(Candidate(context.reference), context)
    assert caught.value.where == "strategy.rate_distortion.bytes"


def test_a_layer_that_is_called_twice_is_left_alone_and_listed(context: Context) -> None:
    """It used to be left alone without a word, and a model with no other layer ended in a traceback."""
    shared = LAYERS.Dense(64, activation="relu", name="shared")
    inputs = tf_keras.Input((8, 8, 1))
    outputs = LAYERS.Dense(10, name="head")(shared(shared(LAYERS.Flatten()(inputs))))
    candidate = Candidate(tf_keras.Model(inputs, outputs))
    own = context.for_stage("rate_distortion", reference=candidate.model)
    result = RateDistortion(bytes=0.95, images=16).apply(candidate, own)
    assert [(skipped.layer, skipped.reason) for skipped in result.skipped] == [
        ("shared", "it is called more than once")
    ]
    assert result.model.get_layer("shared").kernel.numpy().tolist() == shared.kernel.numpy().tolist()
    only = own.for_stage("rate_distortion", selection=Selection(only=(Rule(name="shared"),)))
    with pytest.raises(CompressError, match="shared: it is called more than once"):
        RateDistortion(bytes=0.95, images=16).apply(candidate, only)


def test_a_layer_into_which_the_export_merges_a_norm_is_left_alone_and_listed(context: Context, tmp_path: Path) -> None:
    inputs = tf_keras.Input((8, 8, 1))
    normed = LAYERS.BatchNormalization(name="norm")(LAYERS.Flatten()(inputs))
    hidden = LAYERS.Dense(64, activation="relu", name="merged")(normed)
    candidate = Candidate(tf_keras.Model(inputs, LAYERS.Dense(10, name="head")(hidden)))
    candidate.model.get_layer("norm").gamma.assign(np.linspace(0.5, 2, 64))
    own = context.for_stage("rate_distortion", reference=candidate.model)
    result = RateDistortion(bytes=0.95, images=16).apply(candidate, own)
    assert [skipped.layer for skipped in result.skipped] == ["merged"]
    file = TFLiteFile.read(export(result, context.data, tmp_path / "model.tflite").path)
    assert [v for guarantee in result.guarantees for v in guarantee.check_file(file)] == []
