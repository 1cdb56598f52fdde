"""SavedModels without Keras layers: equal outputs, nothing of them runs when they are read, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tensorflow.core.protobuf import saved_model_pb2

from compress.cache.store import Entry, StageCache
from compress.candidate import Candidate
from compress.errors import CompressError
from compress.graph.rewrite import copy_model
from compress.graph.saved_graph import SavedGraph, has_layers
from compress.metrics.counts import count_nonzero_params, count_params
from compress.models import saved_model as module
from compress.models.file import FileModel, load_model_file

layers = tf_keras.layers
SHAPE = (6, 6, 1)


def small():
    image = tf_keras.Input(SHAPE, name="image")
    x = layers.BatchNormalization(name="norm")(layers.Conv2D(4, 3, name="conv")(image))
    x = layers.Dropout(0.5)(layers.ReLU()(x))
    model = tf_keras.Model(image, layers.Dense(3, name="scores")(layers.Flatten()(x)), name="small")
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.1, 1.0, w.shape) for w in model.get_weights()])
    return model


class Module(tf.Module):
    """Scores by ``body`` on an image [batch, 6, 6, 1]; ``variable`` and ``constant`` [36, 3] are there to be used."""

    def __init__(self, body=None, shape=(None, *SHAPE), **kept):
        super().__init__()
        rng = np.random.default_rng(1)
        self.variable = tf.Variable(rng.normal(size=(36, 3)).astype(np.float32), name="same")
        self.second = tf.Variable(rng.normal(size=(3,)).astype(np.float32), name="same")
        self.constant = tf.constant(rng.normal(size=(36, 3)).astype(np.float32))
        self.kept = list(kept.values())
        self.body = body or (lambda x: x @ self.variable + x @ self.constant + self.second)
        self.call = tf.function(
            lambda image: self.body(tf.reshape(image, (-1, 36))), input_signature=[tf.TensorSpec(shape, tf.float32)]
        )


def save_module(folder: Path, *arguments, **settings) -> Path:
    """Save a module of its own class, as users do."""
    module = Module(*arguments, **settings)
    tf.saved_model.save(module, folder, signatures=module.call)
    return folder


def save_with_a_loop(folder: Path) -> Path:
    def body(x):
        _, x = tf.while_loop(lambda i, _: i < 3, lambda i, x: (i + 1, tf.nn.relu(x) + 0.5), [tf.constant(0), x])
        return x[:, :3]

    path = save_module(folder, body)
    assert b"StatelessWhile" in (path / "saved_model.pb").read_bytes()
    return path


def save_by_keras_3(folder: Path) -> Path:
    keras = pytest.importorskip("keras", minversion="3")
    parts = [keras.layers.Conv2D(2, 3), keras.layers.BatchNormalization(), keras.layers.Flatten()]
    keras.Sequential([keras.Input(SHAPE), *parts, keras.layers.Dense(3)]).export(folder, verbose=False)
    return folder


def exported(folder: Path) -> Path:
    small().export(folder)
    return folder


SAVED = {
    "tf_keras export": exported,
    "module": save_module,
    "loop": save_with_a_loop,
    "keras 3 export": save_by_keras_3,
    "one image at a time": lambda folder: save_module(folder, shape=(1, *SHAPE)),
}


def samples(count: int = 4) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((count, *SHAPE)).astype(np.float32)


def load(path: Path) -> tf_keras.Model:
    return load_model_file(path, allow_code=False)


def refused(path: Path) -> CompressError:
    with pytest.raises(CompressError) as caught:
        load(path)
    assert caught.value.where == f"model.path {path}"
    return caught.value


@pytest.mark.parametrize("name", SAVED)
def test_outputs_are_those_of_tensorflow_through_every_copy(name: str, tmp_path: Path):
    path, x = SAVED[name](tmp_path / "1 model"), samples(1)
    function = tf.saved_model.load(path).signatures["serving_default"]
    (key,) = function.structured_input_signature[1]
    (wanted,) = function(**{key: tf.constant(x)}).values()
    model = load(path)
    cache = StageCache(tmp_path / "cache")
    cache.store("key", Entry(Candidate(copy_model(model)), {"skipped": []}, b"", b""))
    for copy in (model, copy_model(model), cache.load("key").candidate.model):
        assert not has_layers(copy)
        assert copy.trainable_weights == []
        np.testing.assert_allclose(copy(x), wanted, atol=1e-6)
        np.testing.assert_allclose(copy.predict(x, verbose=0), wanted, atol=1e-6)


def test_parameters_are_those_of_the_keras_model(tmp_path: Path):
    model = small()
    model.get_layer("scores").bias.assign(np.zeros(3))
    model.export(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert count_params(loaded) == count_params(model) == 40 + 8 + 4 * 4 * 4 * 3 + 3
    assert count_nonzero_params(loaded) == count_params(model) - 3


def test_the_digest_sees_the_variables_and_not_the_folders_name(tmp_path: Path):
    path = save_module(tmp_path / "model")
    shutil.copytree(path, tmp_path / "copy")
    first, copy = (FileModel(path=str(folder)).origin().digest() for folder in (path, tmp_path / "copy"))
    assert first == copy
    data = path / "variables" / "variables.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[10] ^= 1
    data.write_bytes(bytes(content))
    assert FileModel(path=str(path)).origin().digest() != first


# Nothing of a graph runs while it is read, and none of these ever.


@pytest.mark.parametrize(
    "operation", ["ReadFile", "WriteFile", "MatchingFiles", "PyFunc", "RandomUniform", "AssignAdd"]
)
def test_operations_that_do_more_than_to_compute(operation: str, tmp_path: Path):
    marker = tmp_path / "written"

    def body(x):
        kernel = tf.ones((36, 3))
        if operation == "ReadFile":
            return x @ kernel + tf.io.decode_raw(tf.io.read_file("/etc/hostname"), tf.float32)[0]
        if operation == "MatchingFiles":
            return x @ kernel + tf.cast(tf.size(tf.io.matching_files("/etc/*")), tf.float32)
        if operation == "PyFunc":
            return tf.ensure_shape(tf.numpy_function(lambda v: v, [x @ kernel], tf.float32), (None, 3))
        if operation == "RandomUniform":
            return x @ kernel + tf.random.uniform((3,))
        if operation == "AssignAdd":
            return x @ kernel + state.assign_add(1.0)
        with tf.control_dependencies([tf.io.write_file(str(marker), "x")]):
            return x @ kernel + 1.0

    state = tf.Variable(0.0)
    error = refused(save_module(tmp_path / "model", body, state=state))
    assert operation in error.received
    assert not marker.exists()


def test_a_cache_entry_is_looked_through_too(tmp_path: Path):
    """The layer itself refuses; nothing depends on where its configuration was read."""
    model = load(save_module(tmp_path / "model"))
    config = model.get_layer("graph").get_config()
    part = module.meta_graph_pb2.MetaGraphDef.FromString(module.base64.b64decode(config["graph"]))
    part.graph_def.library.function[0].node_def.add(name="forged", op="WriteFile")
    forged = module.base64.b64encode(part.SerializeToString()).decode()
    with pytest.raises(CompressError, match=r"WriteFile \(forged\)"):
        SavedGraph(**{**config, "graph": forged})


def test_a_table_is_refused_and_not_filled(tmp_path: Path):
    (tmp_path / "words").write_text("one\ntwo\n")
    index = tf.lookup.TextFileIndex
    words = tf.lookup.TextFileInitializer(
        str(tmp_path / "words"), tf.string, index.WHOLE_LINE, tf.int64, index.LINE_NUMBER
    )
    table = tf.lookup.StaticHashTable(words, -1)

    def body(x):
        return x[:, :3] + tf.cast(table.lookup(tf.strings.as_string(x[:, :3])), tf.float32)

    assert "resource" in refused(save_module(tmp_path / "model", body, table=table)).received


# Wrong folders.


def edited(path: Path, change) -> Path:
    """Change the graph of a SavedModel."""
    proto = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    change(proto.meta_graphs[0])
    (path / "saved_model.pb").write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize(
    "name", ["saved_model.pb", "variables/variables.index", "variables/variables.data-00000-of-00001"]
)
def test_truncated(name: str, share: float, tmp_path: Path):
    path = save_module(tmp_path / "model")
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: int(len(content) * share)])
    assert "SavedModel" in refused(path).expected


def test_variables_are_missing(tmp_path: Path):
    path = save_module(tmp_path / "model")
    shutil.rmtree(path / "variables")
    assert "undamaged" in refused(path).expected


def test_a_variable_changed_on_disk(tmp_path: Path):
    path = save_module(tmp_path / "model")
    data = path / "variables" / "variables.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 0xFF
    data.write_bytes(bytes(content))
    assert "undamaged" in refused(path).expected


def test_nan(tmp_path: Path):
    model = small()
    model.get_layer("scores").bias.assign([0.0, np.nan, 0.0])
    model.export(tmp_path / "model")
    with pytest.raises(CompressError, match="1 NaN or infinite"):
        load(tmp_path / "model")


def without_function(graph) -> None:
    del graph.graph_def.library.function[:]


def without_objects(graph) -> None:
    graph.ClearField("object_graph_def")


def without_tag(graph) -> None:
    del graph.meta_info_def.tags[:]


def without_signature(graph) -> None:
    del graph.signature_def["serving_default"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without_function, "undamaged"),
        (without_objects, "TensorFlow 2"),
        (without_tag, "TensorFlow 2"),
        (without_signature, "a signature serving_default with one input"),
    ],
)
def test_without_a_part(change, expected: str, tmp_path: Path):
    assert expected in refused(edited(save_module(tmp_path / "model"), change)).expected


def test_two_inputs(tmp_path: Path):
    one, two = tf_keras.Input((2,)), tf_keras.Input((2,))
    tf_keras.Model([one, two], layers.Add()([one, two])).export(tmp_path / "model")
    error = refused(tmp_path / "model")
    assert "one input and one output" in error.expected
    assert "serving_default (2 to 1)" in error.received


def test_a_fixed_batch_of_more_than_one(tmp_path: Path):
    assert "[4, 6, 6, 1]" in refused(save_module(tmp_path / "model", shape=(4, *SHAPE))).received


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_MOST_BYTES", 100)
    assert "GiB" in refused(save_module(tmp_path / "model")).received


def test_a_folder_of_something_else(tmp_path: Path):
    assert "without saved_model.pb" in refused(tmp_path).received
