"""Accuracy and outputs of Keras models and of exported files, in a process of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import given
from hypothesis import strategies as st

from compress.candidate import Candidate
from compress.data.source import Split, make_data
from compress.deploy.tflite import export
from compress.errors import CompressError
from compress.metrics import accuracy as module
from compress.metrics.accuracy import accuracy, file_accuracy, file_outputs, keras_accuracy, keras_outputs

layers = tf_keras.layers


def random(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def written(model: tf_keras.Model, folder: Path) -> Path:
    part = Split(random((8, *model.input_shape[1:])), np.arange(8) % 2)
    return export(Candidate(model), make_data("random", part, part), folder / "model.tflite").path


def one_by_one(model: tf_keras.Model, x: np.ndarray) -> np.ndarray:
    return np.concatenate([np.asarray(model(x[i : i + 1], training=False)) for i in range(len(x))])


def classifier() -> tf_keras.Model:
    image = tf_keras.Input((6, 5, 2), name="image")
    x = layers.Conv2D(4, 3, activation="relu")(image)
    return tf_keras.Model(image, layers.Dense(3)(layers.Flatten()(x)))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=50))
def test_accuracy_is_the_share_of_hits(pairs):
    guesses, labels = np.array(pairs).T
    hits = sum(guess == label for guess, label in pairs)
    assert accuracy(np.eye(5)[guesses], labels) == pytest.approx(100 * hits / len(pairs))


def test_the_file_and_keras_agree_on_outputs_and_accuracy(tmp_path):
    model, x = classifier(), random((11, 6, 5, 2))
    labels = np.asarray(model(x)).argmax(1)
    labels[:4] = (labels[:4] + 1) % 3
    path = written(model, tmp_path)
    np.testing.assert_allclose(keras_outputs(model, x, batch=3), np.asarray(model(x)), atol=1e-5)
    np.testing.assert_allclose(file_outputs(path, x), np.asarray(model(x)), atol=1e-5)
    assert keras_accuracy(model, Split(x, labels)) == pytest.approx(100 * 7 / 11)
    assert file_accuracy(path, Split(x, labels)) == pytest.approx(100 * 7 / 11)


def test_every_sample_is_run_once_and_in_order(tmp_path):
    model = classifier()
    path = written(model, tmp_path)
    for count, batch in [(10, 4), (3, 8), (1, 4), (8, 4), (5, 1)]:
        x = random((10, 6, 5, 2))[:count]
        outputs = file_outputs(path, x, batch=batch, threads=1)
        np.testing.assert_allclose(outputs, one_by_one(model, x), atol=1e-5)


def fixed_reshape() -> tf_keras.Model:
    values = tf_keras.Input((6,), name="values")
    folded = tf.reshape(tf.reshape(values, [1, 2, 3])[:, ::-1], [1, 6])
    return tf_keras.Model(values, layers.Dense(3)(folded))


def mean_over_the_batch() -> tf_keras.Model:
    values = tf_keras.Input((6,), name="values")
    return tf_keras.Model(values, layers.Dense(3)(values - 0.5 * tf.reduce_max(values, axis=0, keepdims=True)))


def first_of_the_batch() -> tf_keras.Model:
    values = tf_keras.Input((6,), name="values")
    return tf_keras.Model(values, layers.Dense(3)(values) + layers.Dense(3)(tf.slice(values, [0, 0], [1, 3])))


@pytest.mark.parametrize("build", [fixed_reshape, mean_over_the_batch, first_of_the_batch])
@pytest.mark.parametrize("count", [10, 8])
def test_a_graph_for_one_sample_at_a_time_still_gives_right_outputs(build, count, tmp_path):
    model, x = build(), random((count, 6))
    np.testing.assert_allclose(file_outputs(written(model, tmp_path), x, batch=4), one_by_one(model, x), atol=1e-5)


def test_integer_inputs_and_outputs_are_quantized_by_their_scales(tmp_path):
    model, x = classifier(), random((9, 6, 5, 2))
    call = tf.function(lambda image: model(image, training=False))
    signature = call.get_concrete_function(tf.TensorSpec((1, 6, 5, 2), tf.float32))
    converter = tf.lite.TFLiteConverter.from_concrete_functions([signature], model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([image[None]] for image in x)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    path = tmp_path / "integers.tflite"
    path.write_bytes(converter.convert())
    outputs, expected = file_outputs(path, x, batch=4), np.asarray(model(x))
    assert outputs.dtype == np.float32
    assert np.abs(outputs - expected).max() < 0.05 * np.abs(expected).max()


def test_a_file_that_the_runtime_rejects_is_an_error(tmp_path):
    path = tmp_path / "garbage.tflite"
    path.write_bytes(b"\x1c\0\0\0TFL3" + bytes(range(200)))
    with pytest.raises(CompressError, match=r"garbage\.tflite"):
        file_outputs(path, random((2, 4)))


def test_a_crash_of_the_runtime_is_an_error(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text("import os\nos.abort()\n")
    monkeypatch.setattr(module, "_WORKER", script)
    with pytest.raises(CompressError, match="signal 6"):
        file_outputs(tmp_path / "any.tflite", random((2, 4)))
