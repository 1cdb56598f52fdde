"""The export: every scheme runs and agrees with Keras; what the file looks like from LiteRT's side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from ai_edge_litert.interpreter import Interpreter

from compress.candidate import Artifact, Calibration, Candidate, Storage
from compress.data.source import Data, Split, make_data
from compress.deploy.tflite import export
from compress.errors import CompressError
from compress.strategies.sharing.codebook import Codebook

pytestmark = pytest.mark.filterwarnings("ignore:.*experimental_preserve_all_tensors")
layers = tf_keras.layers
SCHEMES = ("float32", "float16", "weight_only", "dynamic", "int8", "int16")
# Rounding of float32; 2^-11 of a weight; half of 1/127 of the largest weight and, for int8, of the largest activation.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "weight_only": 0.02, "dynamic": 0.02, "int8": 0.04, "int16": 0.04}


@pytest.fixture(scope="module")
def model() -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((8, 8, 16), name="image")
    x = layers.Conv2D(16, 3, padding="same", use_bias=False, name="conv")(image)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Flatten()(layers.MaxPooling2D()(layers.ReLU()(x)))
    built = tf_keras.Model(image, layers.Dense(5, name="dense")(x))
    rng = np.random.default_rng(0)
    # Channels of very different size, so that one scale for each and one for all are told apart.
    kernel = rng.normal(size=(3, 3, 16, 16)) * np.geomspace(0.01, 1, 16)
    built.get_layer("conv").set_weights([kernel.astype(np.float32)])
    built.get_layer("norm").set_weights([rng.uniform(0.5, 1.5, 16).astype(np.float32) for _ in range(4)])
    return built


@pytest.fixture(scope="module")
def data() -> Data:
    x = np.random.default_rng(1).normal(size=(64, 8, 8, 16)).astype(np.float32)
    part = Split(x, np.arange(64) % 5)
    return make_data("random", part, part)


def run(artifact: Artifact, x: np.ndarray) -> np.ndarray:
    interpreter = Interpreter(model_path=str(artifact.path))
    interpreter.allocate_tensors()
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()
    assert source["dtype"] == target["dtype"] == np.float32
    assert source["shape"].tolist() == [1, *x.shape[1:]]
    assert target["shape"].tolist()[0] == 1
    outputs = []
    for image in x:
        interpreter.set_tensor(source["index"], image[None])
        interpreter.invoke()
        outputs.append(interpreter.get_tensor(target["index"])[0])
    return np.array(outputs)


def stored(path: Path) -> list[dict]:
    """Details of the constant weight tensors, with their values."""
    interpreter = Interpreter(model_path=str(path), experimental_preserve_all_tensors=True)
    # Read before the allocation: kernels then spread one scale over all channels.
    details = interpreter.get_tensor_details()
    interpreter.allocate_tensors()
    computed = {i for op in interpreter._get_ops_details() for i in op["outputs"]}
    computed |= {detail["index"] for detail in interpreter.get_input_details()}
    return [
        {**detail, "value": interpreter.get_tensor(detail["index"])}
        for detail in details
        if detail["index"] not in computed and len(detail["shape"]) > 1 and np.prod(detail["shape"]) > 1000
    ]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_file_reads_and_writes_float32_one_sample_at_a_time_and_agrees_with_keras(scheme, model, data, tmp_path):
    artifact = export(
        Candidate(model, storage=Storage(scheme, Calibration(images=32))), data, tmp_path / "model.tflite"
    )
    assert artifact.storage.scheme == scheme
    assert [file.name for file in tmp_path.iterdir()] == ["model.tflite"]
    expected = model.predict(data.test.x, verbose=0)
    gap = np.abs(run(artifact, data.test.x) - expected).max() / np.abs(expected).max()
    assert gap <= TOLERANCE[scheme]
    if scheme not in ("float32", "float16"):
        assert gap > 1e-5, "nothing was quantized"


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        ("float32", np.float32),
        ("float16", np.float16),
        *((s, np.int8) for s in ("weight_only", "dynamic", "int8", "int16")),
    ],
)
def test_weights_are_written_as_the_scheme_says(scheme, dtype, model, data, tmp_path):
    artifact = export(Candidate(model, storage=Storage(scheme, Calibration(images=8))), data, tmp_path / "model.tflite")
    weights = stored(artifact.path)
    assert len(weights) == 2
    assert {weight["dtype"] for weight in weights} == {dtype}


def test_the_batch_norm_is_gone_from_the_file(model, data, tmp_path):
    artifact = export(Candidate(model), data, tmp_path / "model.tflite")
    operators = [op["op_name"] for op in Interpreter(model_path=str(artifact.path))._get_ops_details()]
    assert operators == ["CONV_2D", "MAX_POOL_2D", "RESHAPE", "FULLY_CONNECTED"]


def test_the_file_is_the_same_every_time(model, data, tmp_path):
    candidate = Candidate(model, storage=Storage("int8", Calibration(images=8)))
    files = [export(candidate, data, tmp_path / f"{i}.tflite").path.read_bytes() for i in range(2)]
    assert files[0] == files[1]


def shared(model: tf_keras.Model, clusters: int) -> tuple[tf_keras.Model, Codebook]:
    """The model without its batch norm and with few values in both kernels."""
    rng = np.random.default_rng(2)
    image = tf_keras.Input((8, 8, 16), name="image")
    x = layers.Conv2D(16, 3, padding="same", name="conv")(image)
    x = layers.Flatten()(layers.MaxPooling2D()(layers.ReLU()(x)))
    copy = tf_keras.Model(image, layers.Dense(5, name="dense")(x))
    labels = {}
    for name in ("conv", "dense"):
        kernel = copy.get_layer(name).kernel
        chosen = rng.integers(0, clusters, kernel.shape)
        if name == "conv":
            # The last channel holds small values only: under a scale of its own they would be other integers.
            chosen[..., -1] = np.where(chosen[..., -1] % 2, clusters // 2, clusters // 2 + 1)
        labels[f"{name}/kernel"] = chosen
        kernel.assign(np.linspace(-1, 1, clusters).astype(np.float32)[chosen])
    return copy, Codebook("share", clusters, labels)


@pytest.mark.parametrize("scheme", ["weight_only", "dynamic", "int8"])
def test_a_codebook_gets_one_scale_for_each_tensor(scheme, model, data, tmp_path):
    copy, guarantee = shared(model, 8)
    candidate = Candidate(copy, storage=Storage(scheme, Calibration(images=8)))
    free = stored(export(candidate, data, tmp_path / "free.tflite").path)
    bound = stored(export(candidate.with_guarantee(guarantee), data, tmp_path / "bound.tflite").path)
    assert max(len(weight["quantization_parameters"]["scales"]) for weight in free) > 1
    assert max(len(np.unique(weight["value"])) for weight in free) > 8
    assert len(bound) == 2
    for weight in bound:
        assert weight["dtype"] == np.int8
        assert len(weight["quantization_parameters"]["scales"]) == 1
        assert len(np.unique(weight["value"])) <= 8


def test_an_unknown_input_size_is_refused(data, tmp_path):
    image = tf_keras.Input((None, None, 3))
    model = tf_keras.Model(image, layers.GlobalAveragePooling2D()(image))
    with pytest.raises(CompressError, match="None, None"):
        export(Candidate(model), data, tmp_path / "model.tflite")
    assert not list(tmp_path.iterdir())


def test_what_the_converter_refuses_is_refused_with_the_scheme_and_leaves_the_old_file(model, data, tmp_path):
    path = export(Candidate(model), data, tmp_path / "model.tflite").path
    before = path.read_bytes()
    image = tf_keras.Input((8, 8), name="image")
    inverse = tf_keras.Model(image, layers.Flatten()(tf.linalg.inv(image)))
    with pytest.raises(CompressError) as caught:
        export(Candidate(inverse, storage=Storage("float16")), data, path)
    assert caught.value.where == "export as float16, layer tf.linalg.inv"
    assert "MatrixInverse" in caught.value.received
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.tflite"]
