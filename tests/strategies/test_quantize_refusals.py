"""Post-training quantization refuses what LiteRT would not run and what would change nothing, and says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from compress.candidate import Candidate
from compress.data.source import Data, Split, make_data
from compress.deploy.tflite import export
from compress.errors import CompressError
from compress.graph.rewrite import rewrite
from compress.metrics.accuracy import file_outputs, keras_outputs
from compress.metrics.tflite_file import TFLiteFile
from compress.strategies.quantization.post_training import Quantize
from compress.strategies.strategy import Context
from compress.training import Recovery

layers = tf_keras.layers
Part = Callable[[tf.Tensor], tf.Tensor]


@pytest.fixture(scope="module")
def data() -> Data:
    """Random sequences: 8 steps of 8 numbers."""
    x = np.random.default_rng(0).normal(size=(64, 8, 8)).astype(np.float32)
    part = Split(x, np.arange(64) % 10)
    return make_data("random", part, part)


def network(part: Part) -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    sequence = tf_keras.Input((8, 8))
    return rewrite(tf_keras.Model(sequence, layers.Dense(10, name="head")(part(sequence))))


def applied(strategy: Quantize, model: tf_keras.Model, data: Data) -> Candidate:
    return strategy.apply(Candidate(model), Context("quantize", data, model, Recovery(method="none"), seed=0))


def dense(x: tf.Tensor, **fields: object) -> tf.Tensor:
    return layers.Dense(32, name="inner", **fields)(layers.Flatten()(x))


def volumes(x: tf.Tensor) -> tf.Tensor:
    x = layers.Conv3D(16, 2, padding="same", activation="relu", name="one")(layers.Reshape((4, 4, 4, 1))(x))
    return layers.Flatten()(layers.Conv3D(16, 3, padding="same", name="two")(x))


def test_what_half_precision_cannot_hold_is_refused_by_name(data):
    model = network(dense)
    applied(Quantize(scheme="float16"), model, data)
    kernel = model.get_layer("inner").kernel
    kernel.assign(kernel + np.eye(*kernel.shape) * 1e5)
    with pytest.raises(CompressError, match="layer inner: expected weights up to 65504"):
        applied(Quantize(scheme="float16"), model, data)


def test_a_fixed_batch_size_is_named_where_it_is_in_the_way(data):
    sequence = tf_keras.Input(batch_shape=(1, 8, 8))
    model = rewrite(tf_keras.Model(sequence, layers.Dense(10, name="head")(dense(sequence))))
    applied(Quantize(), model, data)
    with pytest.raises(CompressError, match="fixed batch size of 1"):
        applied(Quantize(bits=4, rounding_images=16), model, data)


@pytest.mark.parametrize(
    ("part", "floats"),
    [(lambda x: layers.GRU(32, name="gru")(x), ()), (volumes, ("one", "two"))],
    ids=["GRU", "Conv3D"],
)
def test_dynamic_files_hold_what_they_promise(data, tmp_path: Path, part, floats):
    model = network(part)
    made = applied(Quantize(scheme="dynamic"), model, data)
    path = export(made, data, tmp_path / "model.tflite").path
    assert tuple(item.layer for item in made.skipped) == floats
    assert [v for guarantee in made.guarantees for v in guarantee.check_file(TFLiteFile.read(path))] == []
    np.testing.assert_allclose(file_outputs(path, data.test.x), keras_outputs(model, data.test.x), atol=0.05)


def test_a_file_of_small_layers_is_not_dynamic(data, tmp_path: Path):
    made = applied(Quantize(scheme="dynamic"), network(layers.Flatten()), data)
    path = export(made, data, tmp_path / "model.tflite").path
    (violation,) = [v for guarantee in made.guarantees for v in guarantee.check_file(TFLiteFile.read(path))]
    assert "fewer than 1024 weights: dynamic leaves them floats" in violation.found


@pytest.mark.parametrize(
    ("part", "operator"),
    [
        (lambda x: layers.LayerNormalization(name="norm")(dense(x)), "norm.*SQUARED_DIFFERENCE"),
        (lambda x: tf.reduce_sum(dense(x), -1, keepdims=True), "tf.math.reduce_sum.*SUM"),
    ],
    ids=["layer norm", "sum"],
)
def test_operators_without_a_form_of_16_bits_are_named_with_their_layer(data, tmp_path: Path, part, operator):
    made = applied(Quantize(scheme="int16"), network(part), data)
    with pytest.raises(CompressError, match=rf"export as int16, layer {operator}.*scheme=int8"):
        export(made, data, tmp_path / "model.tflite")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "part", "reason"),
    [
        ({"layer_bits": {"nosuch": 8}}, dense, r"strategy\.quantize\.layer_bits.*nosuch"),
        ({"equalise": True}, layers.Flatten(), "for equalise, two layers"),
        (
            {"bias_correction": True},
            lambda x: dense(x, use_bias=False),
            "for bias_correction, a layer",
        ),
        ({"bits": 4}, lambda x: layers.Flatten()(layers.Masking()(x)), "quantize \\(bits=8, rounding=nearest\\)"),
    ],
    ids=["layer_bits", "equalise", "bias_correction", "masks"],
)
def test_what_would_change_nothing_is_refused(data, settings, part, reason):
    model = network(part)
    if "bias_correction" in settings:
        model = tf_keras.Model(model.input, model.get_layer("inner").output)
    with pytest.raises(CompressError, match=reason):
        applied(Quantize(**settings), model, data)


def test_matrices_that_stay_at_8_bits_are_listed(data):
    made = applied(Quantize(bits=4, rounding_images=16), network(lambda x: layers.LSTM(8, name="memory")(x)), data)
    assert [item.layer for item in made.skipped] == ["memory"]
    assert "8 bits" in made.skipped[0].reason
