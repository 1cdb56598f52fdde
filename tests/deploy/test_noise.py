"""The debugger: ratios by their definition, and a layer that is made worse shows."""

from __future__ import annotations

import numpy as np
import pytest
import tf_keras

from compress.candidate import Calibration, Candidate, Storage
from compress.data.source import Split, make_data
from compress.deploy.conversion import calibration_samples
from compress.deploy.integer import Calibrated
from compress.deploy.noise import measure_noise

layers = tf_keras.layers
KERNELS = ("first", "second")


@pytest.fixture(scope="module")
def calibrated():
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, activation="relu", name="first")(image)
    x = layers.Conv2D(8, 3, activation="relu", name="second")(x)
    model = tf_keras.Model(image, layers.Dense(5, name="dense")(layers.Flatten()(x)))
    part = Split(np.random.default_rng(0).normal(size=(64, 8, 8, 3)).astype(np.float32), np.arange(64) % 5)
    data = make_data("random", part, part)
    candidate = Candidate(model, storage=Storage("int8", Calibration(images=32)))
    samples = [sample for (sample,) in calibration_samples(candidate, data, 16)]
    return Calibrated.of(candidate, data), model, samples


def by_layer(noise) -> dict[str, float]:
    return {row.layer: row.signal_to_noise_db for row in noise if row.layer in KERNELS}


def test_a_file_equals_itself(calibrated):
    source, model, samples = calibrated
    assert {row.signal_to_noise_db for row in measure_noise(source.floats, source.floats, samples, model)} == {120.0}


def test_eight_bits_are_tens_of_decibels_and_fewer_in_deeper_layers(calibrated):
    source, model, samples = calibrated
    found = by_layer(measure_noise(source.floats, source.quantized(), samples, model))
    assert set(found) == {"first", "second"}
    assert all(25 < ratio < 60 for ratio in found.values())
    assert found["second"] < found["first"] + 1


def test_a_layer_that_stays_float_is_nearer(calibrated):
    source, model, samples = calibrated
    plain = by_layer(measure_noise(source.floats, source.quantized(), samples, model))
    spared = by_layer(measure_noise(source.floats, source.quantized(("first",)), samples, model))
    assert spared["first"] > plain["first"]
