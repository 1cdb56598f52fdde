"""The guarantee of few levels: it is kept, its breaches are found, in the model and in the file."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from compress.candidate import Calibration, Candidate, Storage
from compress.data.source import Split, make_data
from compress.deploy.tflite import export
from compress.metrics.tflite_file import TFLiteFile
from compress.strategies.quantization.levels import Levels

layers = tf_keras.layers
VALUES = np.array([-0.7, 0.0, 0.4], np.float32)


@pytest.fixture
def model() -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((8, 8, 2))
    x = layers.Conv2D(6, 3, use_bias=False, name="conv")(image)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    built = tf_keras.Model(image, layers.Dense(5, name="dense")(layers.Flatten()(x)))
    rng = np.random.default_rng(0)
    for weight in built.get_layer("norm").weights:
        weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    return built


def bound(model: tf_keras.Model) -> Levels:
    """Move the convolution's weights to levels, with a scale for each output, and say so."""
    rng = np.random.default_rng(1)
    kernel = model.get_layer("conv").kernel
    scales = rng.uniform(0.5, 2, (1, 1, 1, 6)).astype(np.float32)
    kernel.assign(rng.choice(VALUES, kernel.shape) * scales)
    return Levels("ternary", {"conv/kernel": VALUES}, {"conv/kernel": scales}, {"conv/kernel": kernel.shape})


def test_what_lies_between_levels_is_found_and_moved_to_the_nearest(model):
    guarantee = bound(model)
    assert guarantee.check(model) == []
    kernel = model.get_layer("conv").kernel
    before = kernel.numpy()
    noise = np.random.default_rng(2).uniform(-0.1, 0.1, before.shape) * guarantee.scales["conv/kernel"]
    kernel.assign(before + noise)
    (violation,) = guarantee.check(model)
    assert violation.layer == "conv/kernel"
    np.testing.assert_allclose(guarantee.project("conv/kernel", kernel.value()), before, atol=1e-6)


@pytest.mark.parametrize("scheme", ["float32", "float16", "int8"])
def test_the_file_is_counted_output_by_output(scheme, model, tmp_path):
    guarantee = bound(model)
    part = Split(np.random.default_rng(3).normal(size=(16, 8, 8, 2)).astype(np.float32), np.arange(16) % 5)
    storage = Storage(scheme, Calibration(images=8))

    def written() -> TFLiteFile:
        candidate = Candidate(model, storage=storage)
        return TFLiteFile.read(export(candidate, make_data("random", part, part), tmp_path / "model.tflite").path)

    # The batch norm gives each output other values, but no more of them.
    assert guarantee.check_file(written()) == []
    kernel = model.get_layer("conv").kernel
    changed = kernel.numpy()
    changed[0, 0, 0, 2] *= 1.3
    changed[1, 1, 1, 2] = 0.2
    kernel.assign(changed)
    (violation,) = guarantee.check_file(written())
    assert "distinct values in an output, at most 3" in violation.found


def test_cut_channels_leave_the_scales_of_the_others(model):
    guarantee = bound(model)
    after = guarantee.cut(lambda name, value: value[..., [0, 5]])
    np.testing.assert_array_equal(after.scales["conv/kernel"], guarantee.scales["conv/kernel"][..., [0, 5]])
    assert tuple(after.shapes["conv/kernel"]) == (3, 3, 2, 2)
    np.testing.assert_array_equal(after.levels["conv/kernel"], VALUES)


def test_it_holds_while_training(model):
    guarantee = bound(model)
    value = tf.random.stateless_normal((3, 3, 2, 6), (1, 2))
    once = guarantee.project("conv/kernel", value)
    np.testing.assert_array_equal(guarantee.project("conv/kernel", once), once)
