"""Integer files run whatever the sizes of what they add up, layers that have died among them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tf_keras

from compress.candidate import Calibration, Candidate, Storage
from compress.data.source import Data, Split, make_data
from compress.deploy.tflite import export
from compress.metrics.accuracy import file_outputs, keras_outputs

layers = tf_keras.layers


@pytest.fixture(scope="module")
def data() -> Data:
    """Random images."""
    x = np.random.default_rng(0).random((64, 8, 8, 3)).astype(np.float32)
    part = Split(x, np.arange(64) % 4)
    return make_data("random", part, part)


def network(*, scale: float, bias: float = 0.0, less: bool = False) -> tf_keras.Model:
    """Two convolutions that are added, or subtracted, the second one's outputs ``scale`` times the first one's."""
    rng = np.random.default_rng(1)
    image = tf_keras.Input((8, 8, 3))
    one = layers.Conv2D(8, 3, activation="relu", name="one")
    other = layers.Conv2D(8, 3, activation="relu", name="other")
    kernel, own = rng.normal(size=(3, 3, 3, 8)) / 3, np.ones(8)
    merged = (layers.Subtract if less else layers.Add)()([one(image), other(image)])
    head = layers.Dense(4, name="head")
    model = tf_keras.Model(image, head(layers.GlobalAveragePooling2D()(merged)))
    one.set_weights([kernel, own])
    other.set_weights([scale * kernel if less else scale * rng.normal(size=kernel.shape) / 3, scale * own + bias])
    head.set_weights([rng.normal(size=(8, 4)), np.zeros(4)])
    return model


@pytest.mark.parametrize("ranges", ["minmax", "mse"])
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"scale": 1.0, "bias": -100.0}, 0.06),
        ({"scale": 1e-5}, 0.06),
        ({"scale": 1e-2}, 0.06),
        ({"scale": 3e3}, 0.06),
        # What is left of a difference that nearly cancels is below the steps of its operands.
        ({"scale": 1.001, "less": True}, 4.0),
    ],
    ids=["always zero", "tiny", "small", "large", "cancelling"],
)
def test_the_file_runs_and_gives_what_the_model_gives(data, tmp_path: Path, settings, tolerance, ranges):
    model = network(**settings)
    storage = Storage("int8", Calibration(32, ranges))
    path = export(Candidate(model, storage=storage), data, tmp_path / "model.tflite").path
    wanted, found = keras_outputs(model, data.test.x), file_outputs(path, data.test.x)
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()
    assert np.isfinite(found).all()


def test_a_model_whose_outputs_are_always_zero_has_a_file(data, tmp_path: Path):
    model = network(scale=1.0)
    model.get_layer("head").set_weights([np.zeros((8, 4)), np.zeros(4)])
    path = export(Candidate(model, storage=Storage("int8")), data, tmp_path / "model.tflite").path
    np.testing.assert_array_equal(file_outputs(path, data.test.x), 0)
