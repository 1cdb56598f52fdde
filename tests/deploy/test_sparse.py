"""Sparse storage: the file is smaller, holds the same weights and gives the same outputs, or stays as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from ai_edge_litert.interpreter import Interpreter

from compress.candidate import Calibration, Candidate, Storage
from compress.data.source import Data, Split, make_data
from compress.deploy import tflite
from compress.deploy.sparse import store_sparsely
from compress.deploy.tflite import export
from compress.errors import CompressError
from compress.metrics.tflite_file import TFLiteFile

layers = tf_keras.layers
KINDS = {
    "pointwise": ((6, 6, 32), lambda: layers.Conv2D(48, 1, name="layer")),
    "3x3": ((6, 6, 16), lambda: layers.Conv2D(32, 3, name="layer")),
    "grouped": ((6, 6, 16), lambda: layers.Conv2D(32, 3, groups=2, name="layer")),
    "depthwise": ((6, 6, 96), lambda: layers.DepthwiseConv2D(3, name="layer")),
    "transposed": ((4, 4, 16), lambda: layers.Conv2DTranspose(32, 3, name="layer")),
    "conv1d": ((9, 24), lambda: layers.Conv1D(48, 3, name="layer")),
    "dense": ((300,), lambda: layers.Dense(20, name="layer")),
}


def pruned(model: tf_keras.Model, sparsity: float) -> tf_keras.Model:
    rng = np.random.default_rng(0)
    model.set_weights(
        [
            rng.normal(size=w.shape).astype(np.float32) * (w.ndim == 1 or rng.random(w.shape) >= sparsity)
            for w in model.get_weights()
        ]
    )
    return model


def chain(kind: str, sparsity: float = 0.9) -> tf_keras.Model:
    shape, make = KINDS[kind]
    image = tf_keras.Input(shape)
    return pruned(tf_keras.Model(image, make()(image)), sparsity)


def network(sparsity: float) -> tf_keras.Model:
    image = tf_keras.Input((6, 6, 16))
    x = layers.ReLU()(layers.Conv2D(32, 3, name="conv")(image))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(64, 1, name="pointwise")(x))
    return pruned(tf_keras.Model(image, layers.Dense(40, name="dense")(x)), sparsity)


def samples(model: tf_keras.Model) -> Data:
    x = np.random.default_rng(1).normal(size=(16, *model.input_shape[1:])).astype(np.float32)
    part = Split(x, np.arange(16) % 2)
    return make_data("random", part, part)


@pytest.fixture
def both(tmp_path, monkeypatch):
    """Export a model and return its file and the dense one that it was made from."""

    def make(model: tf_keras.Model, scheme: str) -> tuple[TFLiteFile, TFLiteFile]:
        made = []
        monkeypatch.setattr(tflite, "store_sparsely", lambda content: made.append(content) or store_sparsely(content))
        path = export(
            Candidate(model, storage=Storage(scheme, Calibration(images=8))), samples(model), tmp_path / "model.tflite"
        ).path
        assert [file.name for file in tmp_path.iterdir()] == ["model.tflite"]
        return TFLiteFile.read(path), TFLiteFile(*made)

    return make


def dense_file(model: tf_keras.Model) -> TFLiteFile:
    return TFLiteFile(tf.lite.TFLiteConverter.from_keras_model(model).convert())


def outputs(file: TFLiteFile, x: np.ndarray) -> np.ndarray:
    interpreter = Interpreter(model_content=file.content)
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(source["index"], x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(source["index"], x)
    interpreter.invoke()
    return interpreter.get_tensor(target["index"])


def kernel_of(model: tf_keras.Model, name: str) -> np.ndarray:
    layer = model.get_layer(name)
    return np.asarray(layer.depthwise_kernel if isinstance(layer, layers.DepthwiseConv2D) else layer.kernel)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_kernel_is_stored_sparsely_and_is_the_same(kind):
    model = chain(kind)
    before, kernel = dense_file(model), kernel_of(model, "layer")
    file = TFLiteFile(store_sparsely(before.content))
    assert (file.sparse_kernels, before.sparse_kernels) == (1, 0)
    np.testing.assert_array_equal(file.kernel_of("layer", kernel.shape), kernel)
    # Values of four bytes and, of this few channels, an index of one or two; segments, operator and names besides.
    saved = kernel.nbytes - np.count_nonzero(kernel) * 6
    assert len(before.content) - len(file.content) > 0.9 * saved - 1000
    x = samples(model).test.x
    np.testing.assert_allclose(outputs(file, x), outputs(before, x), rtol=1e-5, atol=1e-5)
    assert file.macs() == before.macs()
    assert file.peak_memory_bytes() == before.peak_memory_bytes()
    assert file.operator_of("layer") == before.operator_of("layer")


@pytest.mark.parametrize(
    ("scheme", "sparse_kernels"),
    # LiteRT refuses expanded int8 weights in a dense layer, and under float activations anywhere.
    [("float32", 3), ("float16", 3), ("dynamic", 0), ("int8", 2)],
)
def test_the_kernels_that_the_runtime_expands_are_stored_sparsely(scheme, sparse_kernels, both):
    model = network(0.9)
    file, before = both(model, scheme)
    assert file.sparse_kernels == sparse_kernels
    assert (len(file.content) < 0.9 * len(before.content)) == bool(sparse_kernels)
    for name in ("conv", "pointwise", "dense"):
        shape = kernel_of(model, name).shape
        stored = file.kernel_of(name, shape)
        assert stored.dtype == before.kernel_of(name, shape).dtype
        np.testing.assert_array_equal(stored, before.kernel_of(name, shape))
        assert not stored[kernel_of(model, name) == 0].any()
    for (_, after), (_, tensor) in zip(file.weighted, before.weighted, strict=True):
        np.testing.assert_array_equal(after.scales, tensor.scales)
    x = samples(model).test.x
    expected = outputs(before, x)
    np.testing.assert_allclose(outputs(file, x), expected, atol=1e-5 * np.abs(expected).max())


def test_a_board_that_expands_no_kernels_gets_a_file_that_it_runs(pipeline, tmp_path):
    network(0.9).save(tmp_path / "zeros.keras")
    data = samples(network(0.9))
    parts = {"x_train": data.train.x, "y_train": data.train.y, "x_test": data.test.x, "y_test": data.test.y}
    np.savez(tmp_path / "data.npz", **parts)
    brought = [f"model.path={tmp_path}/zeros.keras", "data=npz", f"data.path={tmp_path}/data.npz"]
    made = pipeline("strategy=quantize", "model=file", *brought, "board=microcontroller", cache=False)
    numbers = made.run(tmp_path).final
    assert numbers.on_board["arena_bytes"] > 0
    assert numbers.sparse_kernels == 0


def test_what_the_dynamic_scheme_leaves_in_float32_is_stored_sparsely(both):
    # A kernel of fewer than 1024 values.
    file, before = both(chain("depthwise"), "dynamic")
    assert file.sparse_kernels == 1
    assert len(file.content) < len(before.content)


def test_two_layers_that_share_a_kernel_share_its_sparse_form():
    image = tf_keras.Input((6, 6, 32))
    twice = layers.Conv2D(32, 3, padding="same", name="layer")
    model = pruned(tf_keras.Model(image, twice(twice(image))), 0.9)
    before = dense_file(model)
    file = TFLiteFile(store_sparsely(before.content))
    assert file.sparse_kernels == 1
    assert len(file.weighted) == 2
    np.testing.assert_array_equal(file.kernel_of("layer", (3, 3, 32, 32)), kernel_of(model, "layer"))
    x = samples(model).test.x
    np.testing.assert_allclose(outputs(file, x), outputs(before, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("scheme", "sparsity"), [("float32", 0.2), ("float32", 0.0), ("int8", 0.5)])
def test_few_zeros_stay_dense_and_cost_no_run(scheme, sparsity, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the runtime was started")

    monkeypatch.setattr(tflite, "file_outputs", refuse)
    model = network(sparsity)
    path = export(
        Candidate(model, storage=Storage(scheme, Calibration(images=8))), samples(model), tmp_path / "model.tflite"
    ).path
    assert TFLiteFile.read(path).sparse_kernels == 0


def crash(path: Path, inputs: np.ndarray) -> np.ndarray:
    if "sparse" in path.name:
        raise CompressError("LiteRT run", expected="a file", received="exit code -11", fix="none")
    return np.ones((len(inputs), 2))


@pytest.mark.parametrize(
    "run",
    [
        crash,
        lambda path, inputs: np.ones((len(inputs), 2)) * (1.01 if "sparse" in path.name else 1.0),
        lambda path, inputs: np.ones((len(inputs), 2)) * (np.nan if "sparse" in path.name else 1.0),
    ],
    ids=["crash", "other outputs", "nan"],
)
def test_a_file_that_the_runtime_does_not_run_alike_stays_dense(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tflite, "file_outputs", run)
    model = network(0.9)
    path = export(Candidate(model), samples(model), tmp_path / "model.tflite").path
    assert TFLiteFile.read(path).sparse_kernels == 0


def test_a_kernel_of_zeros_alone_stays_dense_and_the_others_do_not():
    model = network(0.9)
    model.get_layer("pointwise").kernel.assign(tf.zeros((1, 1, 32, 64)))
    file = TFLiteFile(store_sparsely(dense_file(model).content))
    assert file.sparse_kernels == 2
    assert not file.kernel_of("pointwise", (1, 1, 32, 64)).any()


def test_the_same_file_gives_the_same_and_a_sparse_one_is_left_alone():
    content = dense_file(network(0.9)).content
    once = store_sparsely(content)
    assert once == store_sparsely(content)
    assert store_sparsely(once) is None
