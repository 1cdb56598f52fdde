"""Bits under a budget: the integer program against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.candidate import Candidate, Latency, Measurement
from compress.data.digits import Digits
from compress.deploy.tflite import export
from compress.errors import CompressError
from compress.graph.selection import Rule, Selection
from compress.metrics.tflite_file import TFLiteFile
from compress.models.small import DigitsCnn
from compress.models.source import Schedule
from compress.reference import make_reference
from compress.strategies.quantization import mixed_precision
from compress.strategies.quantization.float_by_latency import worth_most
from compress.strategies.quantization.mixed_precision import MixedPrecision, choose_bits
from compress.strategies.strategy import Context
from compress.training import Recovery


@given(seed=st.integers(0, 1000), layers=st.integers(1, 6), share=st.floats(0, 1))
@settings(deadline=None, max_examples=30)
def test_the_choice_is_the_best_one_that_fits(seed, layers, share):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 1000, layers)
    errors = {f"layer{i}": {2: e * 50, 4: e * 5, 8: e} for i, e in enumerate(rng.exponential(1e-3, layers))}
    costs = {f"layer{i}": {bits: size * bits / 8 for bits in (2, 4, 8)} for i, size in enumerate(sizes)}
    least, whole = sizes.sum() / 4, sizes.sum()
    most = least + share * (whole - least)
    found = choose_bits(errors, costs, most)
    assert found is not None
    assert sum(costs[layer][bits] for layer, bits in found.items()) <= most * (1 + 1e-6)
    combinations = (dict(zip(errors, bits, strict=True)) for bits in itertools.product((2, 4, 8), repeat=layers))
    allowed = [c for c in combinations if sum(costs[layer][bits] for layer, bits in c.items()) <= most * (1 + 1e-9)]
    best = min(sum(errors[layer][bits] for layer, bits in c.items()) for c in allowed)
    assert sum(errors[layer][bits] for layer, bits in found.items()) == pytest.approx(best, rel=1e-3)


def test_a_budget_below_the_cheapest_choice_has_no_answer():
    assert choose_bits({"a": {4: 1.0, 8: 0.0}}, {"a": {4: 50.0, 8: 100.0}}, 49.0) is None


@given(seed=st.integers(0, 1000), layers=st.integers(1, 7), most=st.floats(0, 3))
@settings(deadline=None, max_examples=30)
def test_floats_are_those_that_are_worth_most(seed, layers, most):
    rng = np.random.default_rng(seed)
    gains = {f"layer{i}": max(value, 0.0) for i, value in enumerate(rng.normal(0.5, 0.5, layers))}
    costs = {f"layer{i}": value for i, value in enumerate(rng.exponential(1.0, layers))}
    found = worth_most(gains, costs, most)
    assert sum(costs[name] for name in found) <= most * (1 + 1e-6)
    subsets = (s for n in range(layers + 1) for s in itertools.combinations(gains, n))
    best = max(sum(gains[n] for n in s) for s in subsets if sum(costs[n] for n in s) <= most * (1 - 1e-9))
    assert sum(gains[name] for name in found) >= best * (1 - 1e-6)


def weighted_board(artifacts) -> list[Measurement]:
    """A board that takes one millisecond for each kernel, and a tenth for an integer one."""
    kinds = [[tensor.dtype for _, tensor in TFLiteFile.read(artifact.path).weighted] for artifact in artifacts]
    times = [sum(1.0 if kind == np.float32 else 0.1 for kind in own) for own in kinds]
    return [Measurement("weighted", Latency(time, time, time, time, 100, 1)) for time in times]


@pytest.fixture(scope="module")
def context() -> Context:
    data = Digits(train_limit=512, test_limit=128).load()
    model = make_reference(DigitsCnn(train=Schedule(epochs=3)), data, 0)
    return Context("mixed", data, model, Recovery(method="none"), seed=0, measure=weighted_board)


def test_the_latency_says_how_many_layers_stay_floats(context):
    # Five kernels: 5 ms as floats, 0.5 ms as integers, 0.9 ms more for each that stays a float.
    candidate = MixedPrecision(latency=0.5, calibration_images=64).apply(Candidate(context.reference), context)
    assert len(candidate.storage.float_layers) == 2
    assert {item.layer for item in candidate.skipped} == set(candidate.storage.float_layers)


def test_what_the_user_left_out_is_no_merit_of_the_latency(context):
    own = context.for_stage("mixed", selection=Selection(skip=(Rule(name="fc1"),)))
    candidate = MixedPrecision(latency=0.5, calibration_images=64).apply(Candidate(context.reference), own)
    assert len(candidate.storage.float_layers) == 2
    assert [item.layer for item in candidate.skipped] == [n for n in candidate.storage.float_layers if n != "fc1"]


@pytest.mark.parametrize("share", [0.2, 0.27])
def test_the_file_has_no_more_bytes_than_the_budget(share, context, tmp_path):
    whole = export(Candidate(context.reference), context.data, tmp_path / "float.tflite").path.stat().st_size
    strategy = MixedPrecision(bytes=share, choices=(2, 4, 8), calibration_images=16, images=32)
    candidate = strategy.apply(Candidate(context.reference), context)
    size = export(candidate, context.data, tmp_path / "mixed.tflite").path.stat().st_size
    assert 0.8 * share * whole < size <= share * whole


def test_a_latency_below_that_of_the_integer_file_is_refused(context):
    with pytest.raises(CompressError) as caught:
        MixedPrecision(latency=0.05, calibration_images=64).apply(Candidate(context.reference), context)
    assert "at least 0.1" in caught.value.expected


def test_a_latency_without_a_board_is_refused(context):
    with pytest.raises(CompressError, match="no board"):
        MixedPrecision(latency=0.5).apply(Candidate(context.reference), context.for_stage("mixed", measure=None))


def test_too_few_bytes_are_refused_before_anything_is_measured(context, monkeypatch):
    def measured(*args):
        raise AssertionError("sensitivities were measured")

    monkeypatch.setattr(mixed_precision, "measure_sensitivity", measured)
    with pytest.raises(CompressError, match="what all layers take at 4 bits") as caught:
        MixedPrecision(bytes=0.01, calibration_images=64, images=64).apply(Candidate(context.reference), context)
    assert caught.value.where == "strategy.mixed.bytes"


def test_two_budgets_are_one_too_many():
    with pytest.raises(ValueError, match="one of bytes, latency"):
        MixedPrecision(bytes=0.2, latency=0.5)


def test_another_budget_takes_the_sensitivities_that_were_measured(pipeline, tmp_path, monkeypatch):
    measured = []

    def spied(*arguments):
        measured.append(arguments)
        return inner(*arguments)

    inner = mixed_precision.measure_sensitivity
    monkeypatch.setattr(mixed_precision, "measure_sensitivity", spied)
    bits = []
    for number, keep in enumerate((0.25, 0.4, 0.25)):
        (tmp_path / str(number)).mkdir()
        built = pipeline("strategy=mixed_precision", f"strategy.mixed_precision.bytes={keep}", "seed=3")
        result = built.run(tmp_path / str(number))
        bits.append(result.stages[0].measured["mean_bits"])
    assert len(measured) == 1
    assert bits[0] == bits[2] < bits[1]
