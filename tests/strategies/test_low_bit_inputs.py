"""Inputs of few levels: NumPy formulas, gradients, and files that open without the project."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from compress.candidate import Candidate
from compress.data.source import Split, make_data
from compress.deploy.tflite import export
from compress.metrics.accuracy import file_outputs
from compress.strategies.quantization.dorefa import DoReFa
from compress.strategies.quantization.low_bit_inputs import (
    once_called,
    sign_inputs,
    uniform_inputs,
    with_rounded_inputs,
)
from compress.strategies.quantization.xnor import XnorNet
from compress.strategies.strategy import Context
from compress.training import Recovery

layers = tf_keras.layers


@pytest.fixture(scope="module")
def samples() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(64, 6, 6, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((6, 6, 2))
    x = layers.Conv2D(4, 3, padding="same", activation="relu", name="first")(image)
    again = layers.Conv2D(4, 3, padding="same", name="twice")
    x = layers.Conv2D(4, 3, padding="same", name="second")(again(again(x)))
    return tf_keras.Model(image, layers.Dense(3, name="dense")(layers.GlobalAveragePooling2D()(x)))


def read_by(model: tf_keras.Model, layer: str, samples: np.ndarray) -> np.ndarray:
    """Return what the layer is given."""
    return np.asarray(tf_keras.Model(model.inputs, model.get_layer(layer).input)(samples))


def test_signs_times_the_mean_size_of_the_normalised_sample(model, samples):
    wanted = read_by(model, "second", samples)
    rounded = with_rounded_inputs(model, sign_inputs(model, ["second"], samples))
    normed = (wanted - wanted.mean((0, 1, 2))) / np.sqrt(wanted.var((0, 1, 2)) + 1e-3)
    size = np.abs(normed).mean((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(read_by(rounded, "second", samples), np.where(normed >= 0, size, -size), rtol=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_levels_are_the_nearest_ones_in_the_range(bits, model, samples):
    wanted = read_by(model, "dense", samples)
    (rounding,) = uniform_inputs(model, ["dense"], samples, bits).values()
    found = read_by(with_rounded_inputs(model, {"dense": rounding}), "dense", samples)
    levels = np.linspace(rounding.low, rounding.high, 2**bits)
    nearest = levels[np.abs(wanted[..., None] - levels).argmin(-1)]
    np.testing.assert_allclose(found, nearest, atol=1e-5)


def test_the_range_is_not_worse_than_that_of_all_values(model, samples):
    wanted = read_by(model, "dense", samples)
    found = read_by(with_rounded_inputs(model, uniform_inputs(model, ["dense"], samples, 2)), "dense", samples)
    levels = np.linspace(min(wanted.min(), 0), max(wanted.max(), 0), 4)
    plain = levels[np.abs(wanted[..., None] - levels).argmin(-1)]
    assert ((found - wanted) ** 2).mean() <= 1.02 * ((plain - wanted) ** 2).mean()


def test_training_goes_on_through_the_rounding(model, samples):
    for roundings in (sign_inputs(model, ["second"], samples), uniform_inputs(model, ["second"], samples, 2)):
        rounded = with_rounded_inputs(model, roundings)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(rounded(samples) ** 2)
        gradients = tape.gradient(loss, rounded.trainable_variables)
        assert all(gradient is not None and float(tf.norm(gradient)) > 0 for gradient in gradients)


def test_shared_layers_keep_their_inputs(model):
    assert once_called(model, {"first", "twice", "dense"}) == ["first", "dense"]


@pytest.mark.parametrize("strategy", [XnorNet(calibration_images=16), DoReFa(input_bits=2), DoReFa()])
def test_shared_layers_are_listed_where_inputs_are_rounded(strategy, model, samples):
    split = Split(samples, np.arange(len(samples)) % 3)
    context = Context("low", make_data("random", split, split), model, Recovery(epochs=0.2, batch_size=16), seed=0)
    listed = [item.layer for item in strategy.apply(Candidate(model), context).skipped]
    assert listed == ([] if strategy == DoReFa() else ["twice"])


def test_images_for_inputs_that_are_not_rounded_are_refused():
    with pytest.raises(ValueError, match="calibration_images=7 only beside input_bits"):
        DoReFa(calibration_images=7)


def test_the_file_computes_the_same(model, samples, tmp_path):
    rounded = with_rounded_inputs(model, sign_inputs(model, ["second"], samples))
    path = tmp_path / "model.tflite"
    part = Split(samples, np.arange(len(samples)) % 3)
    export(Candidate(rounded), make_data("random", part, part), path)
    np.testing.assert_allclose(file_outputs(path, samples), rounded(samples), atol=1e-4)


def test_the_saved_model_opens_without_the_project(model, samples, tmp_path):
    rounded = with_rounded_inputs(model, uniform_inputs(model, ["second", "dense"], samples, 2))
    rounded.save(str(tmp_path / "model.keras"))
    np.savez(tmp_path / "wanted.npz", x=samples, y=np.asarray(rounded(samples)))
    script = (
        "import sys, numpy as np, tf_keras; d = np.load('wanted.npz'); m = tf_keras.models.load_model('model.keras'); "
        "assert 'compress' not in sys.modules; np.testing.assert_allclose(m(d['x']), d['y'], atol=1e-5)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-500:]
