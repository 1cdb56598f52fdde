"""Calibration without data: the inputs give batch norms the statistics that they remember."""

from __future__ import annotations

import numpy as np
import pytest
import tf_keras

from compress.candidate import Candidate
from compress.data.source import Split, make_data
from compress.deploy.conversion import calibration_samples
from compress.deploy.tflite import export
from compress.errors import CompressError
from compress.metrics.accuracy import file_outputs
from compress.strategies.quantization.data_free import synthetic_samples
from compress.strategies.quantization.post_training import Quantize
from compress.strategies.strategy import Context
from compress.training import Recovery

layers = tf_keras.layers


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    # Pixels with channels of their own brightness and contrast.
    noise = np.random.default_rng(0).normal(size=(512, 8, 8, 3))
    return (noise * [20, 40, 60] + [100, 120, 140]).astype(np.float32)


@pytest.fixture(scope="module")
def model(images) -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((8, 8, 3))
    x = layers.Rescaling(1 / 50, offset=-2.5)(image)
    x = layers.ReLU()(layers.BatchNormalization(name="norm1")(layers.Conv2D(8, 3, name="conv1")(x)))
    x = layers.ReLU()(layers.BatchNormalization(name="norm2")(layers.Conv2D(8, 3, name="conv2")(x)))
    built = tf_keras.Model(image, layers.Dense(4, name="dense")(layers.GlobalAveragePooling2D()(x)))
    for name in ("norm1", "norm2"):
        norm = built.get_layer(name)
        values = np.asarray(tf_keras.Model(image, norm.input)(images))
        norm.moving_mean.assign(values.mean((0, 1, 2)))
        norm.moving_variance.assign(values.var((0, 1, 2)))
    return built


def test_batch_norms_see_what_they_remember(model):
    samples = synthetic_samples(model, 100, seed=0, where="test")
    assert samples.shape == (100, 8, 8, 3)
    for name in ("norm1", "norm2"):
        norm = model.get_layer(name)
        values = np.asarray(tf_keras.Model(model.inputs, norm.input)(samples))
        mean, variance = np.asarray(norm.moving_mean), np.asarray(norm.moving_variance)
        assert np.abs(values.mean((0, 1, 2)) - mean).max() < 0.1 * np.sqrt(variance).max()
        np.testing.assert_allclose(values.var((0, 1, 2)), variance, rtol=0.15)


def test_a_network_that_reads_pixels_as_they_are(model, images):
    image = tf_keras.Input((8, 8, 3))
    norm = layers.BatchNormalization(name="norm")
    conv = layers.Conv2D(8, 3, use_bias=False, name="conv")
    raw = tf_keras.Model(image, layers.Dense(4)(layers.GlobalAveragePooling2D()(norm(conv(image)))))
    values = np.asarray(tf_keras.Model(image, norm.input)(images))
    norm.moving_mean.assign(values.mean((0, 1, 2)))
    norm.moving_variance.assign(values.var((0, 1, 2)))
    found = np.asarray(tf_keras.Model(image, norm.input)(synthetic_samples(raw, 64, 0, "test")))
    spread = values.std((0, 1, 2))
    assert (np.abs(found.mean((0, 1, 2)) - values.mean((0, 1, 2))) < 0.2 * spread).all()
    np.testing.assert_allclose(found.std((0, 1, 2)), spread, rtol=0.2)


def test_another_seed_makes_other_samples(model):
    one, again, other = (synthetic_samples(model, 8, seed, "test") for seed in (1, 1, 2))
    np.testing.assert_allclose(one, again, rtol=1e-3, atol=1e-2)
    assert np.abs(one - other).mean() > 1


def test_the_file_is_calibrated_without_the_training_part(model, images, tmp_path):
    noise = np.random.default_rng(0).uniform(0, 1, (32, 8, 8, 3)).astype(np.float32)
    dark = Split(noise, np.arange(32) % 4)
    data = make_data("dark", dark, Split(images[:64], np.arange(64) % 4))
    context = Context("quantize", data, model, Recovery(method="none"), seed=0)
    errors = {}
    for source in ("training", "synthetic"):
        strategy = Quantize(calibrate_on=source, calibration_images=64)
        candidate = strategy.apply(Candidate(model), context)
        export(candidate, data, tmp_path / "model.tflite")
        difference = file_outputs(tmp_path / "model.tflite", images[:64]) - np.asarray(model(images[:64]))
        errors[source] = np.abs(difference).max() / np.abs(np.asarray(model(images[:64]))).max()
    assert errors["synthetic"] < 0.1 < errors["training"]
    assert next(calibration_samples(candidate, data, 1))[0].mean() == pytest.approx(120, rel=0.3)


def test_without_batch_norms_it_is_refused(model):
    plain = tf_keras.Sequential([tf_keras.Input((4,)), layers.Dense(3)])
    with pytest.raises(CompressError) as caught:
        synthetic_samples(plain, 8, 0, "stage quantize")
    assert "0 such batch norms" in caught.value.received
    assert "calibrate_on=training" in caught.value.fix


def looked_up() -> tf_keras.Model:
    words = tf_keras.Input((6,))
    return tf_keras.Model(words, layers.BatchNormalization()(layers.Embedding(17, 4)(words)))


def of_whole_numbers() -> tf_keras.Model:
    image = tf_keras.Input((8, 8, 1), dtype="int32")
    x = layers.Conv2D(3, 3)(layers.Rescaling(1 / 255)(image))
    return tf_keras.Model(image, layers.BatchNormalization()(x))


@pytest.mark.parametrize("make", [looked_up, of_whole_numbers])
def test_norms_that_do_not_follow_the_input_smoothly_do_not_help(make):
    with pytest.raises(CompressError, match="0 such batch norms"):
        synthetic_samples(make(), 8, 0, "stage quantize")
