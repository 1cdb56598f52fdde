"""The reader of exported files: operations, kernels and memory, against Keras, NumPy and hand counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.candidate import Calibration, Candidate, Storage
from compress.data.source import Data, Split, make_data
from compress.deploy.tflite import export
from compress.errors import CompressError
from compress.metrics.counts import count_macs
from compress.metrics.size import file_bytes, gzip_bytes
from compress.metrics.tflite_file import TFLiteFile

layers = tf_keras.layers


def chain(shape: tuple[int, ...], *parts: tf_keras.layers.Layer) -> tf_keras.Model:
    image = tf_keras.Input(shape, name="image")
    x = image
    for part in parts:
        x = part(x)
    return randomised(tf_keras.Model(image, x))


def randomised(model: tf_keras.Model) -> tf_keras.Model:
    """Every weight gets a value of its own, so that a wrong layout cannot go unnoticed."""
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.1, 1.0, w.shape).astype(np.float32) for w in model.get_weights()])
    return model


def samples(model: tf_keras.Model, count: int = 16) -> Data:
    x = np.random.default_rng(1).normal(size=(count, *model.input_shape[1:])).astype(np.float32)
    part = Split(x, np.arange(count) % 2)
    return make_data("random", part, part)


def exported(model: tf_keras.Model, folder: Path, scheme: str = "float32") -> TFLiteFile:
    candidate = Candidate(model, storage=Storage(scheme, Calibration(images=8)))
    return TFLiteFile.read(export(candidate, samples(model), folder / "model.tflite").path)


MODELS = {
    "conv": lambda: chain((8, 7, 3), layers.Conv2D(4, (2, 3), name="layer")),
    "conv-strided": lambda: chain((9, 9, 3), layers.Conv2D(4, 3, strides=2, padding="same", name="layer")),
    "conv-dilated": lambda: chain((9, 9, 3), layers.Conv2D(4, 3, dilation_rate=2, padding="same", name="layer")),
    "conv-1x1": lambda: chain((5, 6, 3), layers.Conv2D(4, 1, activation="relu", name="layer")),
    "conv1d": lambda: chain((8, 3), layers.Conv1D(4, 3, name="layer")),
    "depthwise": lambda: chain((8, 8, 3), layers.DepthwiseConv2D((2, 3), depth_multiplier=2, name="layer")),
    "depthwise-strided": lambda: chain(
        (9, 9, 3), layers.DepthwiseConv2D(3, strides=2, padding="same", name="layer", use_bias=False)
    ),
    "depthwise-one-channel": lambda: chain((8, 8, 1), layers.DepthwiseConv2D(3, depth_multiplier=2, name="layer")),
    "transposed": lambda: chain((5, 5, 3), layers.Conv2DTranspose(4, (2, 3), strides=2, padding="same", name="layer")),
    "transposed-valid": lambda: chain((5, 4, 3), layers.Conv2DTranspose(4, 3, strides=2, name="layer")),
    "grouped": lambda: chain((8, 8, 4), layers.Conv2D(6, 3, groups=2, name="layer")),
    "conv1d-transposed": lambda: chain((8, 4), layers.Conv1DTranspose(6, 3, name="layer")),
    "conv3d": lambda: chain((5, 5, 5, 2), layers.Conv3D(3, 2, name="layer")),
    "dense": lambda: chain((6,), layers.Dense(5, name="layer")),
    "dense-3d": lambda: chain((7, 6), layers.Dense(5, activation="relu", name="layer")),
}


def keras_kernel(model: tf_keras.Model) -> np.ndarray:
    layer = model.get_layer("layer")
    return np.asarray(layer.depthwise_kernel if "depthwise" in type(layer).__name__.lower() else layer.kernel)


@pytest.mark.parametrize("name", MODELS)
def test_a_float_file_holds_exactly_the_keras_kernel_and_its_multiply_adds(name, tmp_path):
    model = MODELS[name]()
    file, kernel = exported(model, tmp_path), keras_kernel(model)
    stored = file.kernel_of("layer", kernel.shape)
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, kernel)
    assert file.macs() == count_macs(model) > 0


@pytest.mark.parametrize("scheme", ["float16", "int8"])
def test_the_scheme_does_not_change_the_multiply_adds(scheme, tmp_path):
    model = chain(
        (9, 9, 3),
        layers.Conv2D(4, 3, strides=2),
        layers.DepthwiseConv2D(3, depth_multiplier=2),
        layers.Flatten(),
        layers.Dense(5),
    )
    assert exported(model, tmp_path, scheme).macs() == 16 * 27 * 4 + 4 * 9 * 8 + 32 * 5


def test_a_shared_layer_is_counted_at_each_call(tmp_path):
    image = tf_keras.Input((8, 8, 3))
    twice = layers.Conv2D(3, 3, padding="same")
    model = randomised(tf_keras.Model(image, twice(twice(image))))
    assert exported(model, tmp_path).macs() == count_macs(model) == 2 * 64 * 81


def test_both_kernels_of_a_separable_layer_are_found(tmp_path):
    model = chain((8, 8, 4), layers.SeparableConv2D(6, 3, depth_multiplier=2, name="layer"))
    file, layer = exported(model, tmp_path), model.get_layer("layer")
    for kernel in (np.asarray(layer.depthwise_kernel), np.asarray(layer.pointwise_kernel)):
        np.testing.assert_array_equal(file.kernel_of("layer", kernel.shape), kernel)
    assert file.macs() == count_macs(model) == 36 * (9 * 8 + 8 * 6)


@pytest.mark.parametrize("name", ["conv", "depthwise", "transposed", "dense"])
def test_a_float16_file_holds_the_rounded_kernel(name, tmp_path):
    model = MODELS[name]()
    kernel = keras_kernel(model)
    file = exported(model, tmp_path, "float16")
    np.testing.assert_array_equal(file.kernel_of("layer", kernel.shape), kernel.astype(np.float16))


@pytest.mark.parametrize("name", ["conv", "depthwise", "transposed", "dense"])
def test_an_int8_file_holds_the_integers_of_the_specification(name, tmp_path):
    model = MODELS[name]()
    kernel = keras_kernel(model)
    file = exported(model, tmp_path, "int8")
    integers = file.kernel_of("layer", kernel.shape)
    assert integers.dtype == np.int8
    # Symmetric, narrow range, one scale for each output channel; of a transposed one the outputs come third.
    axes = {"depthwise": (0, 1), "transposed": (0, 1, 3)}.get(name, tuple(range(kernel.ndim - 1)))
    scale = np.abs(kernel).max(axis=axes, keepdims=True) / 127
    assert np.abs(integers - kernel / scale).max() <= 0.5 + 1e-3
    (_, tensor), *_ = file.weighted
    assert tensor.scales.size == scale.size
    np.testing.assert_allclose(np.sort(tensor.scales), np.sort(scale.ravel()), rtol=1e-5)


def test_names_are_compared_whole(tmp_path):
    names = ["conv", "conv_1", "a_conv", "conv1", "conv11"]
    image = tf_keras.Input((6, 6, 2))
    x = image
    for name in names:
        x = layers.Conv2D(2, 3, padding="same", activation="relu", name=name)(x)
    model = randomised(tf_keras.Model(image, x))
    file = exported(model, tmp_path)
    for name in names:
        kernel = np.asarray(model.get_layer(name).kernel)
        np.testing.assert_array_equal(file.kernel_of(name, kernel.shape), kernel)
    assert file.kernel_of("con", (3, 3, 2, 2)) is None
    assert file.kernel_of("conv", (3, 3, 2, 4)) is None
    assert file.operator_of("nothing") is None
    assert file.output_channels_of("nothing") is None


def test_two_layers_with_equal_kernels_are_both_found(tmp_path):
    # The converter stores such a kernel once, under a name that belongs to neither layer.
    model = chain(
        (8, 8, 4),
        layers.Conv2D(4, 3, name="one"),
        layers.Conv2D(4, 3, name="two", activation="relu"),
        layers.GlobalAveragePooling2D(),
    )
    model.get_layer("two").set_weights(model.get_layer("one").get_weights())
    file = exported(model, tmp_path)
    kernel = np.asarray(model.get_layer("one").kernel)
    for name in ("one", "two"):
        np.testing.assert_array_equal(file.kernel_of(name, kernel.shape), kernel)
        assert file.operator_of(name) == "CONV_2D"
        assert file.output_channels_of(name) == 4


def test_a_batch_norm_after_the_layer_is_folded_into_the_stored_kernel(tmp_path):
    model = chain(
        (8, 8, 3),
        layers.Conv2D(4, 3, use_bias=False, name="layer"),
        layers.BatchNormalization(name="norm"),
        layers.ReLU(),
    )
    kernel, norm = keras_kernel(model), model.get_layer("norm")
    gain = np.asarray(norm.gamma) / np.sqrt(np.asarray(norm.moving_variance) + norm.epsilon)
    stored = exported(model, tmp_path).kernel_of("layer", kernel.shape)
    np.testing.assert_allclose(stored, kernel * gain, rtol=1e-5)


def residual() -> tf_keras.Model:
    image = tf_keras.Input((6, 6, 2))
    one = layers.Conv2D(4, 3, padding="same", name="one")(image)
    two = layers.Conv2D(4, 3, padding="same", name="two")(one)
    return randomised(tf_keras.Model(image, layers.Add()([one, two])))


PIXELS = 6 * 6


@pytest.mark.parametrize(
    ("build", "scheme", "expected"),
    [
        # image + one, one + two, one + two + sum
        (residual, "float32", 4 * PIXELS * (4 + 4 + 4)),
        # The weights that a float16 file converts back to float32 are no activations.
        (residual, "float16", 4 * PIXELS * (4 + 4 + 4)),
        # The image is dead when the second convolution runs: 8 + 16 channels, not 2 + 8 + 16.
        (
            lambda: chain((6, 6, 2), layers.Conv2D(8, 3, padding="same"), layers.Conv2D(16, 1), layers.Conv2D(1, 1)),
            "float32",
            4 * PIXELS * (8 + 16),
        ),
        # int8: the last convolution's 8 channels as integers and, beside them, as the floats that are returned.
        (lambda: chain((6, 6, 2), layers.Conv2D(8, 3, padding="same")), "int8", PIXELS * (8 + 4 * 8)),
    ],
    ids=["residual", "float16", "chain", "int8"],
)
def test_peak_memory_by_hand(build, scheme, expected, tmp_path):
    assert exported(build(), tmp_path, scheme).peak_memory_bytes() == expected


@given(content=st.binary(max_size=64).filter(lambda b: b[4:8] != b"TFL3"))
def test_what_is_no_tflite_file_is_refused(content):
    with pytest.raises(CompressError, match="TFL3"):
        TFLiteFile(content, "given.tflite")


def test_a_cut_file_is_refused(tmp_path):
    content = exported(MODELS["conv"](), tmp_path).content
    for length in range(8, len(content) // 2, 97):
        with pytest.raises(CompressError):
            TFLiteFile(content[:length], "given.tflite")


def test_sizes_on_disk(tmp_path):
    one, two = tmp_path / "one.tflite", tmp_path / "another-name.tflite"
    content = np.random.default_rng(0).integers(0, 4, 5000, np.uint8).tobytes()
    one.write_bytes(content)
    two.write_bytes(content)
    assert file_bytes(one) == 5000
    assert gzip_bytes(one) == gzip_bytes(two)
    # Two bits of information in each byte: no coder can do better.
    assert 5000 * 2 / 8 < gzip_bytes(one) < 2000


@settings(max_examples=25)
@given(content=st.binary(max_size=400))
def test_gzip_bytes_are_those_of_a_file_that_unpacks_to_the_same(content, tmp_path_factory):
    import zlib

    path = tmp_path_factory.mktemp("gzip") / "file"
    path.write_bytes(content)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    # RFC 1952: ten bytes before the deflated data (no name, no time), eight after them.
    assert gzip_bytes(path) == 10 + len(deflate.compress(content) + deflate.flush()) + 8


@pytest.mark.parametrize(
    ("channels", "groups", "depthwise"), [(1, 1, True), (2, 1, False), (4, 4, True), (4, 2, False)]
)
def test_what_is_depthwise(channels, groups, depthwise):
    conv = layers.DepthwiseConv2D(3, name="conv")
    if channels != groups:
        conv = layers.Conv2D(4, 3, groups=groups, name="conv")
    model = chain((6, 6, channels), conv)
    file = TFLiteFile(tf.lite.TFLiteConverter.from_keras_model(model).convert())
    assert file.is_depthwise("conv") == depthwise
    assert not file.is_depthwise("nothing")
