"""Kernels of grouped convolutions, which the converter gives no name, are found in the file all the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tf_keras

from compress.candidate import Candidate, Storage
from compress.data.source import Data, Split, make_data
from compress.deploy.tflite import export
from compress.graph.rewrite import rewrite
from compress.metrics.accuracy import file_outputs, keras_outputs
from compress.metrics.tflite_file import TFLiteFile
from compress.strategies.quantization.aware import QuantizeAware
from compress.strategies.strategy import Context
from compress.training import Recovery

layers = tf_keras.layers
NAMES = ("one", "two", "three")


@pytest.fixture(scope="module")
def data() -> Data:
    """Random images."""
    x = np.random.default_rng(0).normal(size=(64, 8, 8, 3)).astype(np.float32)
    part = Split(x, np.arange(64) % 4)
    return make_data("random", part, part)


def network(groups: int, bias: bool) -> tf_keras.Model:
    """Three grouped convolutions of one shape with a batch norm and a ReLU behind each, as in RegNets."""
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((8, 8, 3))
    x = layers.Conv2D(16, 3, padding="same", name="stem")(image)
    for name in NAMES:
        x = layers.Conv2D(16, 3, padding="same", groups=groups, use_bias=bias, name=name)(x)
        x = layers.ReLU()(layers.BatchNormalization(gamma_initializer=tf_keras.initializers.RandomUniform(0.5, 1.5))(x))
    return rewrite(tf_keras.Model(image, layers.Dense(4, name="head")(layers.GlobalAveragePooling2D()(x))))


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("groups", [4, 16])
def test_each_kernel_stands_under_its_layer(data, tmp_path: Path, groups, bias):
    model = network(groups, bias)
    path = export(Candidate(model, storage=Storage()), data, tmp_path / "model.tflite").path
    file = TFLiteFile.read(path)
    for name in NAMES:
        kernel = np.asarray(model.get_layer(name).kernel)
        found = file.weights_of(name, kernel.shape)
        # The batch norm behind it is multiplied into it.
        factors = (found * kernel).sum((0, 1, 2)) / (kernel**2).sum((0, 1, 2))
        np.testing.assert_allclose(found, kernel * factors, atol=1e-5)
    np.testing.assert_allclose(file_outputs(path, data.test.x), keras_outputs(model, data.test.x), atol=1e-4)


@pytest.mark.parametrize("groups", [4, 16])
def test_their_levels_are_those_that_training_found(data, tmp_path: Path, groups):
    model = network(groups, bias=False)
    recovery = Recovery(epochs=0.2, batch_size=8, learning_rate=1e-4)
    made = QuantizeAware(calibration_images=32).apply(Candidate(model), Context("qat", data, model, recovery, seed=0))
    path = export(made, data, tmp_path / "model.tflite").path
    assert [v for guarantee in made.guarantees for v in guarantee.check_file(TFLiteFile.read(path))] == []
    for name in NAMES:
        kernel = np.asarray(made.model.get_layer(name).kernel)
        found = TFLiteFile.read(path).weights_of(name, kernel.shape)
        np.testing.assert_allclose(found, kernel, atol=1e-6 * np.abs(kernel).max())
