"""Weights on grids: the file holds the very levels, in four bits where the runtime reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tf_keras

from compress.candidate import Calibration, Candidate, Storage
from compress.data.source import Data, Split, make_data
from compress.deploy.tflite import export
from compress.metrics.accuracy import file_outputs
from compress.metrics.tflite_file import TFLiteFile
from compress.strategies.quantization.grid import OnGrid
from compress.strategies.quantization.stored import Stored

pytestmark = pytest.mark.filterwarnings("ignore:.*experimental_preserve_all_tensors")
layers = tf_keras.layers
KERNELS = ("conv", "strided", "wide", "pointwise", "dense")


@pytest.fixture(scope="module")
def data() -> Data:
    part = Split(np.random.default_rng(1).normal(size=(64, 9, 9, 3)).astype(np.float32), np.arange(64) % 5)
    return make_data("random", part, part)


def network() -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((9, 9, 3), name="image")
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="conv")(image)
    x = layers.Conv2D(7, 3, strides=2, use_bias=False, name="strided")(x)
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = layers.Conv2D(5, (1, 3), dilation_rate=2, padding="same", activation="relu", name="wide")(x)
    x = layers.Conv2D(9, 1, name="pointwise")(x)
    return tf_keras.Model(image, layers.Dense(5, name="dense")(layers.Flatten()(x)))


def on_grid(bits: int) -> tuple[tf_keras.Model, OnGrid]:
    """The network with its kernels moved to the nearest levels, some beyond what is clipped, and the guarantee."""
    model, steps, shapes = network(), {}, {}
    rng = np.random.default_rng(0)
    for name in KERNELS:
        kernel = model.get_layer(name).kernel
        spread = [1] * (len(kernel.shape) - 1) + [-1]
        name = f"{name}/kernel"
        steps[name] = (rng.uniform(0.05, 0.4, kernel.shape[-1]) / 2 ** (bits - 2)).astype(np.float32).reshape(spread)
        shapes[name] = kernel.shape
    guarantee = OnGrid("quantize", steps, dict.fromkeys(steps, bits), shapes)
    for name in KERNELS:
        kernel = model.get_layer(name).kernel
        kernel.assign(guarantee.project(f"{name}/kernel", kernel.value()))
    return model, guarantee


@pytest.mark.parametrize("scheme", ["int8", "weight_only"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_the_file_holds_the_very_levels(bits, scheme, data, tmp_path: Path):
    model, guarantee = on_grid(bits)
    storage = Storage(scheme, Calibration(images=32))
    candidate = Candidate(model, storage=storage).with_guarantee(guarantee)
    file = TFLiteFile.read(export(candidate, data, tmp_path / "model.tflite").path)
    assert guarantee.check(model) == guarantee.check_file(file) == []
    assert Stored("quantize", scheme).check_file(file) == []
    for name in KERNELS:
        kernel = model.get_layer(name).kernel.numpy()
        np.testing.assert_allclose(file.weights_of(name, kernel.shape), kernel, rtol=1e-4, atol=1e-7)
        (operator,) = file.operators_of(name)
        stored = file.stored(operator.inputs[1])
        assert stored.bits == (4 if bits <= 4 else 8)
        assert np.abs(stored.data).max() <= 2 ** (bits - 1) - 1
    expected = model.predict(data.test.x, verbose=0)
    gap = np.abs(file_outputs(tmp_path / "model.tflite", data.test.x) - expected).max() / np.abs(expected).max()
    if scheme == "weight_only":
        assert gap <= 1e-5
    else:
        # What is left is the rounding of activations, which the converter's own weights suffer from, too.
        plain = export(Candidate(model, storage=storage), data, tmp_path / "plain.tflite").path
        least = np.abs(file_outputs(plain, data.test.x) - expected).max() / np.abs(expected).max()
        assert gap <= least + 0.01


def test_what_stands_beside_a_layer_is_merged_into_its_steps(data, tmp_path):
    tf_keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    image = tf_keras.Input((9, 9, 3), name="image")
    x = layers.Conv2D(8, 3, use_bias=False, name="conv")(layers.Rescaling(1 / 16)(image))
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    model = tf_keras.Model(image, layers.Dense(5, name="dense")(layers.Flatten()(x)))
    for weight in model.get_layer("norm").weights:
        signs = rng.choice([-1, 1] if "gamma" in weight.name else [1], weight.shape)
        weight.assign(signs * rng.uniform(0.5, 1.5, weight.shape))
    kernel = rng.integers(-7, 8, (3, 3, 3, 8)) * rng.uniform(0.05, 0.4, 8)
    kernel[..., 3] = 0
    model.get_layer("conv").kernel.assign(kernel)
    steps = np.maximum(np.abs(kernel).max((0, 1, 2), keepdims=True) / 7, 1e-13).astype(np.float32)
    name = "conv/kernel"
    guarantee = OnGrid("quantize", {name: steps}, {name: 4}, {name: kernel.shape})
    for scheme in ("int8", "weight_only"):
        candidate = Candidate(model, storage=Storage(scheme, Calibration(images=64))).with_guarantee(guarantee)
        file = TFLiteFile.read(export(candidate, data, tmp_path / "model.tflite").path)
        assert guarantee.check_file(file) == []
        expected = model.predict(data.test.x, verbose=0)
        gap = np.abs(file_outputs(tmp_path / "model.tflite", data.test.x) - expected).max() / np.abs(expected).max()
        assert gap <= (0.02 if scheme == "weight_only" else 0.05)


def test_fewer_bits_are_a_smaller_file(data, tmp_path):
    sizes = {}
    for bits in (4, 8):
        model, guarantee = on_grid(bits)
        storage = Storage("int8", Calibration(images=8))
        candidate = Candidate(model, storage=storage).with_guarantee(guarantee)
        sizes[bits] = export(candidate, data, tmp_path / f"{bits}.tflite").path.stat().st_size
    weights = sum(np.prod(network().get_layer(name).kernel.shape) for name in KERNELS)
    assert sizes[8] - sizes[4] == pytest.approx(weights / 2, abs=200)


def test_a_weight_beside_the_grid_or_beyond_it_is_found():
    model, guarantee = on_grid(4)
    assert guarantee.check(model) == []
    for wrong in (0.4, 8.0):
        kernel = model.get_layer("dense").kernel
        before = kernel.numpy()
        changed = before.copy()
        changed[0, 0] = wrong * guarantee.steps["dense/kernel"][0, 0]
        kernel.assign(changed)
        (violation,) = guarantee.check(model)
        assert violation.layer == "dense/kernel"
        kernel.assign(before)


def test_a_file_with_other_integers_is_found(data, tmp_path):
    model, guarantee = on_grid(4)
    for scheme, found in (("int8", "at most 7"), ("float32", "float32")):
        candidate = Candidate(model, storage=Storage(scheme, Calibration(images=8)))
        file = TFLiteFile.read(export(candidate, data, tmp_path / "model.tflite").path)
        assert {v.layer for v in guarantee.check_file(file) if found in v.found} == set(guarantee.steps)


def test_cut_channels_leave_the_steps_of_the_others():
    _, guarantee = on_grid(4)
    after = guarantee.cut(lambda name, value: value[:, :, [0, 2]][..., [1, 3, 4]] if name == "conv/kernel" else value)
    np.testing.assert_array_equal(after.steps["conv/kernel"], guarantee.steps["conv/kernel"][..., [1, 3, 4]])
    assert tuple(after.shapes["conv/kernel"]) == (3, 3, 2, 3)
    np.testing.assert_array_equal(after.steps["dense/kernel"], guarantee.steps["dense/kernel"])


@pytest.mark.parametrize("scheme", ["int8", "weight_only"])
def test_layers_may_stay_floats(scheme, data, tmp_path):
    model = network()
    storage = Storage(scheme, Calibration(images=8), float_layers=("conv", "dense"))
    file = TFLiteFile.read(export(Candidate(model, storage=storage), data, tmp_path / "model.tflite").path)
    kinds = {name: file.stored(op.inputs[1]).dtype for name in KERNELS for op in file.operators_of(name)}
    assert kinds["conv"] == kinds["dense"] == np.float32
    if scheme == "int8":
        assert kinds["wide"] == kinds["pointwise"] == np.int8
        assert Stored("quantize", scheme, ("conv", "dense")).check_file(file) == []
        assert len(Stored("quantize", scheme).check_file(file)) == 2


@pytest.mark.parametrize("normed", [False, True])
def test_every_call_of_a_shared_layer_computes_with_the_levels(normed, data, tmp_path: Path):
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((9, 9, 3), name="image")
    shared = layers.Conv2D(3, 3, padding="same", name="shared", bias_initializer="random_normal")
    norm = layers.BatchNormalization(gamma_initializer=tf_keras.initializers.RandomUniform(0.5, 2)) if normed else None
    x = image
    for _ in range(2):
        x = layers.ReLU()(norm(shared(x)) if norm else shared(x))
    model = tf_keras.Model(image, layers.Dense(5, name="dense")(layers.Flatten()(x)))
    steps = np.abs(shared.kernel).max((0, 1, 2), keepdims=True) / 5
    guarantee = OnGrid("quantize", {"shared/kernel": steps}, {"shared/kernel": 4}, {"shared/kernel": (3, 3, 3, 3)})
    shared.kernel.assign(guarantee.project("shared/kernel", shared.kernel.value()))
    export(Candidate(model, (guarantee,), Storage("int8", Calibration(32))), data, tmp_path / "model.tflite")
    found, wanted = file_outputs(tmp_path / "model.tflite", data.test.x), model.predict(data.test.x, verbose=0)
    assert np.mean((found - wanted) ** 2) < 0.003 * wanted.var()
    kernels = [t.bits for op, t in TFLiteFile.read(tmp_path / "model.tflite").weighted if op.name == "CONV_2D"]
    assert kernels == [4, 4]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_channel_of_tiny_weights_keeps_its_bias(bits, data, tmp_path: Path):
    model, guarantee = on_grid(bits)
    conv = model.get_layer("conv")
    tiny = np.where(np.arange(8) < 2, np.float32(1e-9), np.float32(1))
    conv.kernel.assign(conv.kernel * tiny)
    conv.bias.assign(np.where(np.arange(8) < 2, 2.5, 0.1).astype(np.float32))
    steps = {**guarantee.steps, "conv/kernel": guarantee.steps["conv/kernel"] * tiny}
    shrunk = OnGrid("quantize", steps, guarantee.bits, guarantee.shapes)
    candidate = Candidate(model, storage=Storage("int8", Calibration(images=32))).with_guarantee(shrunk)
    file = TFLiteFile.read(export(candidate, data, tmp_path / "model.tflite").path)
    assert shrunk.check(model) == shrunk.check_file(file) == []
    (operator,) = file.operators_of("conv")
    bias = file.tensors[operator.inputs[2]]
    np.testing.assert_allclose(bias.data * bias.scales, conv.bias.numpy(), atol=0.01)


def test_steps_of_zero_hold_zeros(data, tmp_path: Path):
    model, guarantee = on_grid(4)
    conv = model.get_layer("conv")
    alive = (np.arange(8) > 0).astype(np.float32)
    conv.kernel.assign(conv.kernel * alive)
    steps = {**guarantee.steps, "conv/kernel": guarantee.steps["conv/kernel"] * alive}
    switched_off = OnGrid("quantize", steps, guarantee.bits, guarantee.shapes)
    candidate = Candidate(model, storage=Storage("int8", Calibration(images=32))).with_guarantee(switched_off)
    with np.errstate(all="raise"):
        file = TFLiteFile.read(export(candidate, data, tmp_path / "model.tflite").path)
    kernel = file.weights_of("conv", conv.kernel.shape)
    np.testing.assert_allclose(kernel, conv.kernel.numpy(), rtol=1e-4, atol=1e-7)
