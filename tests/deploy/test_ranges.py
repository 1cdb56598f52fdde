"""Ranges of activations: each choice against its definition, computed the slow way."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.candidate import Calibration
from compress.deploy.ranges import Histogram, choose, collect

layers = tf_keras.layers


def histogram(values: np.ndarray, bins: int = 2048) -> Histogram:
    low, high = float(values.min()), float(values.max())
    counts = np.histogram(values, bins, (low, high))[0]
    sums = np.histogram(values, bins, (low, high), weights=values)[0]
    return Histogram(low, high, counts, sums / np.maximum(counts, 1))


def error(values: np.ndarray, low: float, high: float) -> float:
    """The mean squared error of rounding to 256 levels between the limits, one of which stands for zero."""
    step = (high - low) / 255
    zero = np.rint(-low / step)
    levels = np.clip(np.rint(values / step) + zero, 0, 255)
    return float(np.mean(((levels - zero) * step - values) ** 2))


values = st.tuples(
    st.integers(0, 10_000), st.sampled_from(["normal", "relu", "heavy", "below zero"]), st.floats(0.01, 100.0)
)


def draw(seed: int, kind: str, scale: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_t(3, 20_000) if kind == "heavy" else rng.normal(0.3, 1, 20_000)
    return scale * {"relu": np.maximum(x, 0), "below zero": np.minimum(x, -0.1)}.get(kind, x)


@given(drawn=values)
@settings(deadline=None, max_examples=20)
def test_every_range_contains_zero_and_lies_in_that_of_the_values(drawn):
    x = draw(*drawn)
    for ranges in ("minmax", "percentile", "mse", "entropy"):
        low, high = choose(histogram(x), Calibration(ranges=ranges))
        assert min(x.min(), 0) - 1e-6 <= low <= 0 <= high <= max(x.max(), 0) + 1e-6
        assert high > low


@given(drawn=values, percentile=st.floats(90, 99.99))
@settings(deadline=None, max_examples=20)
def test_a_percentile_leaves_out_so_many_values_at_each_end(drawn, percentile):
    x = draw(*drawn)
    low, high = choose(histogram(x), Calibration(ranges="percentile", percentile=percentile))
    rest, bin_width = 1 - percentile / 100, (x.max() - x.min()) / 2048
    if low < 0:
        assert np.mean(x < low) <= rest + 1e-9
        assert np.mean(x < low + bin_width) >= rest - 1e-9
    else:
        assert np.mean(x < 0) <= rest + 1e-9
    if high > 0:
        assert np.mean(x > high) <= rest + 1e-9
        assert np.mean(x > high - bin_width) >= rest - 1e-9
    else:
        assert np.mean(x > 0) <= rest + 1e-9


@given(drawn=values)
@settings(deadline=None, max_examples=20)
def test_the_range_of_least_squared_error_beats_the_others(drawn):
    x = draw(*drawn)
    found = {r: error(x, *choose(histogram(x), Calibration(ranges=r))) for r in ("minmax", "mse", "entropy")}
    assert found["mse"] <= 1.03 * min(found.values())


def test_a_few_far_values_are_cut_off_by_all_but_minmax():
    x = np.append(np.random.default_rng(0).normal(size=100_000), [300.0])
    assert choose(histogram(x), Calibration())[1] == pytest.approx(300)
    for ranges, most in (("percentile", 10), ("entropy", 200), ("mse", 299)):
        assert choose(histogram(x), Calibration(ranges=ranges))[1] < most


def test_many_zeros_behind_a_relu_do_not_decide():
    x = np.random.default_rng(0).normal(size=100_000)
    some = choose(histogram(np.maximum(x, 0)), Calibration(ranges="entropy"))
    many = choose(histogram(np.maximum(np.append(x, np.zeros(10**6)), 0)), Calibration(ranges="entropy"))
    assert some == pytest.approx(many)


def test_collected_are_the_values_that_the_file_computes():
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((6, 6, 2))
    x = layers.Conv2D(3, 3, activation="relu", name="conv")(image)
    model = tf_keras.Model(image, layers.Dense(4, name="dense")(layers.Flatten()(x)))
    call = tf.function(lambda x: model(x))
    signature = call.get_concrete_function(tf.TensorSpec((1, 6, 6, 2), tf.float32))
    content = tf.lite.TFLiteConverter.from_concrete_functions([signature], model).convert()
    samples = np.random.default_rng(0).normal(size=(7, 6, 6, 2)).astype(np.float32)
    found = collect(content, [sample[None] for sample in samples])
    inner = tf_keras.Model(image, [model.get_layer("conv").output, model.outputs[0]])
    conv, logits = (np.asarray(t) for t in inner(samples))
    for wanted, part in ((conv, "conv"), (logits, "Partitioned"), (samples, "serving")):
        (name,) = [n for n in found if part in n and found[n].counts.sum() == wanted.size][:1]
        assert found[name].low == pytest.approx(wanted.min(), abs=1e-5)
        assert found[name].high == pytest.approx(wanted.max(), abs=1e-5)
        counts = np.histogram(wanted, 2048, (found[name].low, found[name].high))[0]
        assert np.abs(np.cumsum(counts - found[name].counts)).max() <= 2
