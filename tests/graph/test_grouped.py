"""Grouped convolutions and shuffled channels: NumPy's own sums, and the exported file."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from compress.candidate import Candidate
from compress.data.source import Split, make_data
from compress.deploy.tflite import export
from compress.errors import CompressError
from compress.graph.grouped import grouped_convolution, groups_apart, shuffle_channels
from compress.metrics.accuracy import file_outputs
from compress.metrics.counts import count_macs, count_params


@pytest.fixture(scope="module")
def model() -> tf_keras.Model:
    image = tf_keras.Input((5, 4, 12))
    x = shuffle_channels(grouped_convolution(image, 6, 3, "first"), 3, "shuffle")
    return tf_keras.Model(image, grouped_convolution(x, 8, 2, "second"))


def expected(model: tf_keras.Model, x: np.ndarray) -> np.ndarray:
    first, second = (
        np.stack(np.split(np.asarray(model.get_layer(name).kernel)[0, 0], groups, axis=-1))
        for name, groups in (("first", 3), ("second", 2))
    )
    # Channel c of group g goes to place 3 c + g.
    y = np.einsum("nhwgi,gio->nhwog", x.reshape(*x.shape[:3], 3, 4), first).reshape(*x.shape[:3], 2, 3)
    return np.einsum("nhwgi,gio->nhwgo", y, second).reshape(*x.shape[:3], 8)


def test_groups_are_apart_and_the_shuffle_mixes_them(model):
    x = np.random.default_rng(0).normal(size=(3, 5, 4, 12)).astype(np.float32)
    np.testing.assert_allclose(model(x), expected(model, x), atol=1e-5)
    assert count_params(model) == 12 * 6 // 3 + 6 * 8 // 2
    assert count_macs(model) == 5 * 4 * count_params(model)


def test_the_exported_file_runs_and_agrees(model, tmp_path):
    x = np.random.default_rng(1).normal(size=(4, 5, 4, 12)).astype(np.float32)
    flat = tf_keras.Model(model.input, tf_keras.layers.Flatten()(model.output))
    part = Split(x, np.arange(4))
    artifact = export(Candidate(flat), make_data("random", part, part), tmp_path / "model.tflite")
    outputs = file_outputs(artifact.path, x)
    np.testing.assert_allclose(outputs, expected(model, x).reshape(4, -1), atol=1e-5)


@pytest.mark.parametrize(
    ("size", "padding", "strides", "data_format"),
    [(3, "same", 2, None), (3, "valid", 1, "channels_first"), (1, "same", 1, None), (1, "same", 2, "channels_first")],
)
def test_training_computes_the_same_outputs_and_gradients(size, padding, strides, data_format):
    shape = (4, 6, 7) if data_format else (6, 7, 4)
    layer = tf_keras.layers.Conv2D(6, size, strides, padding=padding, groups=2, data_format=data_format)
    image = tf_keras.Input(shape)
    model = tf_keras.Model(image, layer(image))
    x = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)

    def gradients():
        with tf.GradientTape() as tape:
            outputs = model(x)
            loss = tf.reduce_sum(outputs**2)
        return [outputs, *tape.gradient(loss, model.trainable_variables)]

    with groups_apart(model):
        assert "_jit_compiled_convolution_op" in vars(layer)
        apart = tf.function(gradients)()
    assert "_jit_compiled_convolution_op" not in vars(layer)
    for one, other in zip(apart, tf.function(gradients, jit_compile=True)(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_groups_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(CompressError, match=r"layer wide.*5 groups divide.*12 channels in, 10 out"):
        grouped_convolution(tf_keras.Input((5, 4, 12)), 10, 5, "wide")
