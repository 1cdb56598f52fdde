"""Layers stay floats until the file is as accurate as asked for, however the others' weights are rounded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tf_keras
from sklearn.datasets import load_digits

from compress.candidate import Candidate
from compress.data.source import Data, Split, Unlabelled, make_data
from compress.deploy import integer
from compress.deploy.integer import Calibrated
from compress.deploy.tflite import export
from compress.errors import CompressError
from compress.metrics.accuracy import accuracy, file_outputs, keras_outputs
from compress.metrics.tflite_file import TFLiteFile
from compress.strategies.quantization.post_training import FloatFallback, Quantize
from compress.strategies.strategy import Context
from compress.training import Recovery

layers = tf_keras.layers
FIRST, SECOND = "fc1", "fc2"


@pytest.fixture(scope="module")
def data() -> Data:
    """Handwritten digits of 8 x 8 pixels."""
    digits = load_digits()
    x, y = (digits.images / 16).astype(np.float32)[..., None], digits.target.astype(np.int64)
    return make_data("digits", Split(x[:1000], y[:1000]), Split(x[1200:1500], y[1200:1500]))


def network(data: Data, spread: float = 1.0) -> tf_keras.Model:
    """Random features, and a layer solved for the classes. ``spread``: how much larger four of the features are."""
    rng = np.random.default_rng(0)
    first, bias = rng.normal(size=(64, 64)) / 4, rng.normal(size=64) * 0.3
    features = np.maximum(data.train.x.reshape(len(data.train), -1) @ first + bias, 0)
    rows = np.c_[features, np.ones(len(features))]
    solved = 3 * np.linalg.solve(rows.T @ rows + 0.3 * np.eye(65), rows.T @ (np.eye(10)[data.train.y] * 2 - 1))
    scale = np.ones(64)
    scale[:4] = spread
    image = tf_keras.Input((8, 8, 1))
    x = layers.Dense(64, activation="relu", name=FIRST)(layers.Flatten()(image))
    model = tf_keras.Model(image, layers.Dense(10, name=SECOND)(x))
    model.get_layer(FIRST).set_weights([first * scale, bias * scale])
    model.get_layer(SECOND).set_weights([solved[:-1] / scale[:, None], solved[-1]])
    return model


@pytest.mark.parametrize(
    ("settings", "spread"),
    [({"bits": 2}, 1.0), ({"rounding": "second_order"}, 3e3), ({}, 3e3), ({"bits": 3, "equalise": True}, 3e3)],
    ids=str,
)
def test_the_file_is_as_accurate_as_asked_for(data, tmp_path: Path, settings, spread):
    model = network(data, spread)
    context = Context("quantize", data, model, Recovery(method="none"), seed=0)
    before = accuracy(keras_outputs(model, data.validation.x), data.validation.y)
    images = {"rounding_images": 64} if {"bits", "rounding"} & set(settings) else {}
    losing = Quantize(calibration_images=64, **images, **settings)

    def file_of(strategy: Quantize) -> tuple[Candidate, float, TFLiteFile]:
        made = strategy.apply(Candidate(model), context)
        path = export(made, data, tmp_path / "model.tflite").path
        found = accuracy(file_outputs(path, data.validation.x), data.validation.y)
        return made, found, TFLiteFile.read(path)

    made, without, _ = file_of(losing)
    assert made.storage.float_layers == ()
    if "equalise" not in settings:
        assert without < before - 1
    made, after, file = file_of(replace(losing, float_fallback=FloatFallback(accuracy_drop=0.5)))
    assert after >= before - 0.5 - 1e-9
    assert bool(made.storage.float_layers) == (without < before - 0.5)
    listed = {item.layer for item in made.skipped if item.by_choice and "accuracy" in item.reason}
    assert listed == set(made.storage.float_layers)
    for name in made.storage.float_layers:
        stored = file.weights_of(name, tuple(model.get_layer(name).kernel.shape))
        assert stored.dtype == np.float32
        if "equalise" not in settings:
            np.testing.assert_array_equal(stored, model.get_layer(name).kernel)
    assert [violation for g in made.guarantees for violation in g.check_file(file)] == []


def test_what_has_no_labels_cannot_be_judged(data):
    unlabelled = replace(data, validation=Unlabelled(data.validation.x))
    context = Context("quantize", unlabelled, network(data), Recovery(method="none"), seed=0)
    strategy = Quantize(float_fallback=FloatFallback(accuracy_drop=0.5))
    with pytest.raises(CompressError, match=r"strategy\.quantize\.float_fallback: expected labels of the validation"):
        strategy.apply(Candidate(context.reference), context)


@pytest.mark.parametrize("settings", [{}, {"bits": 2, "rounding_images": 64}], ids=str)
def test_a_layer_that_litert_cannot_compute_with_integers_becomes_a_float(data, settings):
    """Four features that are a hundred thousand times as large as the others leave these no steps."""
    model = network(data, 1e5)
    context = Context("quantize", data, model, Recovery(method="none"), seed=0)
    plain = Quantize(calibration_images=64, **settings)
    with pytest.raises(CompressError, match=rf"layer {SECOND}.*less than 256 steps.*float_fallback"):
        file_of_it(plain, model, context)
    made = replace(plain, float_fallback=FloatFallback(accuracy_drop=0.5)).apply(Candidate(model), context)
    assert SECOND in made.storage.float_layers


def file_of_it(strategy: Quantize, model: tf_keras.Model, context: Context) -> bytes:
    candidate = strategy.apply(Candidate(model), context)
    return Calibrated.of(candidate, context.data).quantized()


def test_what_is_not_refused_runs(data, tmp_path):
    """And what is refused would not: the limit is that of LiteRT's kernels."""
    refused = []
    for spread in np.geomspace(1e2, 1e5, 13):
        model = network(data, float(spread))
        context = Context("quantize", data, model, Recovery(method="none"), seed=0)
        try:
            content = file_of_it(Quantize(calibration_images=64), model, context)
        except CompressError:
            refused.append(True)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(integer, "_LARGEST_MULTIPLIER", np.inf)
                content = file_of_it(Quantize(calibration_images=64), model, context)
        else:
            refused.append(False)
        (tmp_path / "model.tflite").write_bytes(content)
        if refused[-1]:
            with pytest.raises(CompressError, match="XNNPACK"):
                file_outputs(tmp_path / "model.tflite", data.test.x[:2])
        else:
            assert np.isfinite(file_outputs(tmp_path / "model.tflite", data.test.x[:2])).all()
    assert set(refused) == {True, False}
    assert refused == sorted(refused)
