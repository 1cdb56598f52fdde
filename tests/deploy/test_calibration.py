"""What ranges cannot be taken from is refused, and what overflows is named."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from compress.candidate import Calibration, Candidate, Storage
from compress.data.source import Split, make_data
from compress.deploy.integer import Calibrated
from compress.errors import CompressError
from compress.metrics.accuracy import file_outputs
from compress.metrics.tflite_file import TFLiteFile

layers = tf_keras.layers
LABELS = np.arange(16) % 3


@pytest.fixture(scope="module")
def model() -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((6, 6, 2))
    x = layers.Conv2D(4, 3, activation="relu", name="first")(image)
    x = layers.Conv2D(4, 3, name="second")(x)
    return tf_keras.Model(image, layers.Dense(3, name="dense")(layers.Flatten()(x)))


def calibrate(
    model: tf_keras.Model, x: np.ndarray, samples: np.ndarray | None = None, ranges: str = "minmax"
) -> Calibrated:
    part = Split(x.astype(np.float32), LABELS[: len(x)])
    candidate = Candidate(model, storage=Storage("int8", Calibration(8, ranges)), samples=samples)
    return Calibrated.of(candidate, make_data("made", part, part))


def test_all_equal_samples(model):
    with pytest.raises(CompressError, match="samples of nothing but 3"):
        calibrate(model, np.full((16, 6, 6, 2), 3.0))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none(value, model):
    good = np.random.default_rng(0).normal(size=(16, 6, 6, 2)).astype(np.float32)
    bad = good.copy()
    bad[:, 2, 3, 1] = value
    with pytest.raises(CompressError, match="NaN or infinite"):
        calibrate(model, good, samples=bad)


def test_no_samples(model):
    good = np.random.default_rng(0).normal(size=(16, 6, 6, 2)).astype(np.float32)
    with pytest.raises(CompressError, match="no sample"):
        calibrate(model, good, samples=good[:0])


def test_a_recurrent_layer_some_of_whose_tensors_are_empty():
    sequence = tf_keras.Input((2, 2))
    model = tf_keras.Model(sequence, layers.LSTM(3)(sequence))
    x = np.random.default_rng(0).normal(size=(16, 2, 2))
    operators = {operator.name for operator in TFLiteFile(calibrate(model, x, ranges="mse").quantized()).operators}
    assert "UNIDIRECTIONAL_SEQUENCE_LSTM" in operators


def test_a_recurrent_layer_computes_in_any_ranges(tmp_path):
    tf_keras.utils.set_random_seed(1)
    sequence = tf_keras.Input((10, 6))
    inner = layers.LSTM(12, return_sequences=True)(sequence)
    model = tf_keras.Model(sequence, layers.Dense(3, name="dense")(layers.Flatten()(inner)))
    x = np.random.default_rng(0).normal(size=(128, 10, 6)).astype(np.float32)
    part = Split(x, np.arange(128) % 3)
    expected, errors = model.predict(x, verbose=0), {}
    for ranges in ("minmax", "percentile", "mse"):
        candidate = Candidate(model, storage=Storage("int8", Calibration(128, ranges)))
        content = Calibrated.of(candidate, make_data("made", part, part)).quantized()
        (tmp_path / "model.tflite").write_bytes(content)
        errors[ranges] = np.mean((file_outputs(tmp_path / "model.tflite", x) - expected) ** 2) / expected.var()
    # Its outputs and what it computes before their projection are the same numbers: one range for both.
    assert max(errors.values()) < 2 * errors["minmax"] < 0.01


@pytest.mark.parametrize(
    "layer",
    [
        layers.GRU(3),
        layers.LSTM(3, return_state=True),
        layers.Bidirectional(layers.SimpleRNN(3)),
        layers.Bidirectional(layers.LSTM(3)),
        layers.LSTM(3, "relu"),
    ],
)
def test_loops_are_refused_before_the_converter_crashes_on_them(layer):
    sequence = tf_keras.Input((2, 2))
    model = tf_keras.Model(
        sequence, layers.Concatenate()([*tf.nest.flatten(layer(sequence)), layers.Flatten()(sequence)])
    )
    with pytest.raises(CompressError, match=layer.name):
        calibrate(model, np.random.default_rng(0).normal(size=(16, 2, 2)))


def test_the_layer_that_overflows_is_named(model):
    x = np.random.default_rng(0).normal(size=(16, 6, 6, 2)).astype(np.float32)
    bad = tf_keras.models.clone_model(model)
    bad.set_weights(model.get_weights())
    bad.get_layer("first").kernel.assign(1e20 * np.abs(bad.get_layer("first").kernel))
    bad.get_layer("second").kernel.assign(1e20 * np.abs(bad.get_layer("second").kernel))
    with pytest.raises(CompressError) as caught:
        calibrate(bad, np.abs(x))
    assert "layer second" in caught.value.where
    assert "e+38" in caught.value.received
