"""A model from a file: what loads, what is refused, and that nothing in a file runs by itself."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from compress.errors import CompressError
from compress.models import file as module
from compress.models.file import FileModel, load_model_file

layers = tf_keras.layers
NAMES = ("model.keras", "model.h5", "model.hdf5")


def small(name: str = "small"):
    image = tf_keras.Input((6, 6, 1), name="image")
    part = tf_keras.Sequential([tf_keras.Input((4, 4, 2)), layers.BatchNormalization(), layers.ReLU()], name="part")
    x = part(layers.Conv2D(2, 3, name="conv")(image))
    x = tf.nn.relu6(x + 3.0)[:, 1:]
    return tf_keras.Model(image, layers.Dense(3, name="scores")(layers.Flatten()(x)), name=name)


def saved(model, path: Path) -> Path:
    model.save(path)
    return path


def refused(path: Path, *, allow_code: bool = False) -> CompressError:
    with pytest.raises(CompressError) as caught:
        load_model_file(path, allow_code=allow_code)
    error = caught.value
    assert str(path) in error.where or error.where.startswith("model ")
    assert error.expected
    assert error.received
    assert error.fix
    return error


@pytest.mark.parametrize("name", NAMES)
def test_tf_keras_file_loads_flat_with_equal_outputs(name: str, tmp_path: Path):
    model = small()
    loaded = load_model_file(saved(model, tmp_path / name), allow_code=False)
    assert not [layer for layer in loaded.layers if isinstance(layer, tf_keras.Model)]
    x = np.random.default_rng(0).standard_normal((2, 6, 6, 1)).astype("float32")
    np.testing.assert_allclose(loaded(x), model(x), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_keras_3_file_loads(name: str, tmp_path: Path):
    keras = pytest.importorskip("keras", minversion="3")
    model = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Conv2D(2, 3), keras.layers.Flatten()])
    loaded = load_model_file(saved(model, tmp_path / name), allow_code=False)
    x = np.ones((1, 4, 4, 1), np.float32)
    np.testing.assert_allclose(loaded(x), np.asarray(model(x)), atol=1e-6)


def test_compiled_model_with_custom_loss_loads(tmp_path: Path):
    def my_loss(true, guess):
        return tf.reduce_mean(true - guess)

    for name in NAMES:
        model = small()
        model.compile("adam", my_loss)
        assert load_model_file(saved(model, tmp_path / name), allow_code=False).optimizer is None


def test_hdf5_file_called_keras_loads(tmp_path: Path):
    saved(small(), tmp_path / "model.h5").rename(tmp_path / "model.keras")
    assert load_model_file(tmp_path / "model.keras", allow_code=False).name == "small"


class TestFileModel:
    def test_builds_the_model(self, tmp_path: Path):
        source = FileModel(path=str(saved(small(), tmp_path / "model.keras")))
        assert source.origin().file == tmp_path / "model.keras"
        assert source.origin().schedule is None
        assert source.build(None, 0).name == "small"

    def test_needs_a_path(self):
        with pytest.raises(CompressError, match=r"model\.path=/path/to"):
            FileModel().origin()

    def test_says_that_a_file_is_missing_before_reading(self, tmp_path: Path):
        with pytest.raises(CompressError, match="no such file"):
            FileModel(path=str(tmp_path / "model.keras")).origin()

    def test_allows_code_only_when_asked(self, tmp_path: Path):
        path = saved(lambda_model(), tmp_path / "model.keras")
        with pytest.raises(CompressError, match="allow_code=true"):
            FileModel(path=str(path)).build(None, 0)
        assert FileModel(path=str(path), allow_code=True).build(None, 0).name == "carrier"


def test_missing_file(tmp_path: Path):
    assert refused(tmp_path / "model.keras").received == "no such file"


def test_folder(tmp_path: Path):
    (tmp_path / "model.keras").mkdir()
    assert refused(tmp_path / "model.keras").received == "a folder without saved_model.pb"


@pytest.mark.parametrize("name", NAMES)
def test_empty_file(name: str, tmp_path: Path):
    (tmp_path / name).touch()
    assert refused(tmp_path / name).received == "an empty file"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_truncated_file(name: str, share: float, tmp_path: Path):
    path = saved(small(), tmp_path / name)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert "undamaged" in refused(path).expected


def test_changed_weights_in_the_archive(tmp_path: Path):
    path = saved(small(), tmp_path / "model.keras")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    assert "undamaged" in refused(path).expected


@pytest.mark.parametrize("name", NAMES)
def test_text(name: str, tmp_path: Path):
    (tmp_path / name).write_text("not a model at all")
    assert "neither" in refused(tmp_path / name).received


def test_zip_without_config(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert refused(tmp_path / "model.keras").received == "readme.txt"


@pytest.mark.parametrize("config", [b"{", b"[]", b'{"class_name": "Functional"}', b"[" * 100_000, b"\xff\xfe"])
def test_zip_with_a_config_that_is_none(config: bytes, tmp_path: Path):
    path = replaced(saved(small(), tmp_path / "model.keras"), {"config.json": config})
    assert "undamaged" in refused(path).expected


def test_zip_called_h5(tmp_path: Path):
    saved(small(), tmp_path / "model.keras").rename(tmp_path / "model.h5")
    assert refused(tmp_path / "model.h5").fix == "If it is a .keras file, call it so."


def test_weights_only(tmp_path: Path):
    small().save_weights(tmp_path / "old.h5")
    small().save_weights(tmp_path / "model.weights.h5")
    for name in ("old.h5", "model.weights.h5"):
        assert "weights alone" in refused(tmp_path / name).received


@pytest.mark.parametrize("name", ["model.onnx", "model", "model.pt"])
def test_unknown_ending(name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(b"content")
    assert "ending" in refused(tmp_path / name).received


def test_tflite(tmp_path: Path):
    (tmp_path / "model.tflite").write_bytes(b"content")
    assert "holds no Keras layers" in refused(tmp_path / "model.tflite").received


class Subclassed(tf_keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(2)

    def call(self, x):
        return self.dense(x)


class OwnLayer(layers.Layer):
    def call(self, x):
        return x


def test_subclassed_model(tmp_path: Path):
    model = Subclassed()
    model(np.ones((1, 3), np.float32))
    error = refused(saved(model, tmp_path / "model.keras"))
    assert error.received == "a subclassed model (class Subclassed), which has no graph of layers to read"
    assert "functional API" in error.fix
    # As it is written where the class is no part of a module.
    config = {"module": None, "class_name": "Subclassed", "config": {}, "registered_name": "Subclassed"}
    file = replaced(tmp_path / "model.keras", {"config.json": json.dumps(config).encode()})
    assert refused(file).received == error.received


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("allow_code", [False, True])
def test_custom_layer(name: str, allow_code: bool, tmp_path: Path):
    model = tf_keras.Sequential([tf_keras.Input((2,)), OwnLayer(name="own")])
    assert "OwnLayer" in refused(saved(model, tmp_path / name), allow_code=allow_code).received


def test_registered_layer(tmp_path: Path):
    @tf_keras.saving.register_keras_serializable("somebody")
    class Registered(layers.Layer):
        pass

    for name in NAMES:
        model = tf_keras.Sequential([tf_keras.Input((2,)), Registered()])
        assert "somebody>Registered" in refused(saved(model, tmp_path / name)).received


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(name: str, value: float, tmp_path: Path):
    model = small()
    model.get_layer("scores").bias.assign([0.0, value, 0.0])
    error = refused(saved(model, tmp_path / name))
    assert "layer scores" in error.where
    assert "1 NaN or infinite" in error.received


def test_keras_3_weights_that_are_not_finite(tmp_path: Path):
    keras = pytest.importorskip("keras", minversion="3")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, name="scores")])
    model.layers[0].bias.assign([np.nan, 0.0])
    assert "layer scores" in refused(saved(model, tmp_path / "model.keras")).where


def replaced(path: Path, members: dict[str, bytes]) -> Path:
    """Write the archive anew with other members in it."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in {**content, **members}.items():
            archive.writestr(name, value)
    return path


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "assets/../../outside", "..\\outside", "C:outside"])
def test_member_outside_the_archive(name: str, tmp_path: Path):
    path = replaced(saved(small(), tmp_path / "model.keras"), {name: b"x"})
    assert refused(path).received == repr(name)


@pytest.mark.parametrize("name", NAMES)
def test_more_content_than_the_limit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_MOST_BYTES", 100)
    assert "GiB" in refused(saved(small(), tmp_path / name)).received


def test_array_larger_than_its_file(tmp_path: Path):
    path = saved(small(), tmp_path / "model.h5")
    with h5py.File(path, "a") as file:
        file.create_dataset("model_weights/conv/huge", (2**40,), "f4", chunks=(1024,), compression="gzip")
    assert "4096.0 GiB" in refused(path).received


def test_weights_in_another_file(tmp_path: Path):
    path = saved(small(), tmp_path / "model.h5")
    with h5py.File(path, "a") as file:
        del file["model_weights/conv"]
        file["model_weights/conv"] = h5py.ExternalLink("/etc/other.h5", "/secret")
    assert "points to another file" in refused(path).received


# Keras 3 is optional.


@pytest.fixture
def without_keras_3(monkeypatch: pytest.MonkeyPatch):
    """Nothing can import ``keras``."""
    monkeypatch.setitem(sys.modules, "keras", None)


@pytest.mark.parametrize("name", NAMES)
def test_keras_3_file_without_keras_3(name: str, tmp_path: Path, request: pytest.FixtureRequest):
    keras = pytest.importorskip("keras", minversion="3")
    path = saved(keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]), tmp_path / name)
    source = FileModel(path=str(path))
    model = source.build(None, 0)
    request.getfixturevalue("without_keras_3")
    for call in (lambda: source.build(None, 0), lambda: source.save(model, tmp_path / "out.keras")):
        with pytest.raises(CompressError, match=r"pip install 'compress\[keras3\]'"):
            call()
    assert not (tmp_path / "out.keras").exists()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("without_keras_3")
def test_tf_keras_files_need_no_keras_3(name: str, tmp_path: Path):
    source = FileModel(path=str(saved(small(), tmp_path / name)))
    source.save(source.build(None, 0), tmp_path / "out.keras")
    assert load_model_file(tmp_path / "out.keras", allow_code=False).name == "small"


@pytest.mark.usefixtures("without_keras_3")
def test_saved_models_need_no_keras_3(tmp_path: Path):
    small().export(tmp_path / "exported")
    assert load_model_file(tmp_path / "exported", allow_code=False).output_shape == (None, 3)


# Nothing in a file runs by itself.


def lambda_model(wrap=lambda layer: layer, marker: Path | None = None):
    """A model whose Lambda layer makes the folder ``marker`` when it is called."""
    if marker is None:
        function = lambda x: x * 2.0  # noqa: E731
    else:
        text = str(marker)
        function = eval(f"lambda x: (__import__('os').makedirs({text!r}, exist_ok=True), x * 2.0)[1]")
    x = tf_keras.Input((3, 2))
    return tf_keras.Model(x, wrap(layers.Lambda(function, name="carried"))(x), name="carrier")


def inside_a_model(layer):
    inner = tf_keras.Sequential([tf_keras.Input((3, 2)), layer], name="inner")
    return tf_keras.Sequential([tf_keras.Input((3, 2)), inner], name="outer")


@pytest.mark.parametrize("wrap", [lambda layer: layer, inside_a_model, layers.TimeDistributed])
@pytest.mark.parametrize("name", NAMES)
def test_lambda_is_refused_before_it_runs(name: str, wrap, tmp_path: Path):
    marker = tmp_path / "ran"
    path = saved(lambda_model(wrap, marker), tmp_path / name)
    shutil.rmtree(marker)
    error = refused(path)
    assert error.where.endswith("layer carried")
    assert "allow_code=true" in error.fix
    assert not marker.exists()


@pytest.mark.parametrize("name", NAMES)
def test_lambda_loads_if_code_is_allowed(name: str, tmp_path: Path):
    model = lambda_model(inside_a_model)
    loaded = load_model_file(saved(model, tmp_path / name), allow_code=True)
    x = np.ones((1, 3, 2), np.float32)
    np.testing.assert_array_equal(loaded(x), model(x))


@pytest.mark.parametrize("name", NAMES)
def test_keras_3_lambda(name: str, tmp_path: Path):
    keras = pytest.importorskip("keras", minversion="3")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: x * 2.0, name="carried")])
    path = saved(model, tmp_path / name)
    assert refused(path).where.endswith("layer carried")
    np.testing.assert_array_equal(load_model_file(path, allow_code=True)(np.ones((1, 2))), [[2.0, 2.0]])


def changed(path: Path, change) -> Path:
    """Change the configuration of the last layer in a ``.keras`` or ``.h5`` file."""
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read("config.json"))
        change(config["config"]["layers"][-1])
        return replaced(path, {"config.json": json.dumps(config).encode()})
    with h5py.File(path, "a") as file:
        config = json.loads(file.attrs["model_config"])
        change(config["config"]["layers"][-1])
        file.attrs["model_config"] = json.dumps(config)
    return path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("activation", "found"),
    [
        ({"class_name": "__lambda__", "config": {"value": "4wEAAAA="}}, "Python code"),
        ({"class_name": "function", "module": "builtins", "config": "exec", "registered_name": "exec"}, "exec"),
        ({"class_name": "function", "module": "os", "config": "system", "registered_name": "system"}, "system"),
        ({"class_name": "Popen", "module": "subprocess", "config": {"args": "true"}}, "Popen"),
        ({"class_name": "get_file", "module": "keras.utils", "config": {"origin": "http://x"}}, "get_file"),
        ({"class_name": "TFSMLayer", "module": "keras.layers", "config": {"filepath": "/tmp/x"}}, "TFSMLayer"),
        ({"class_name": "ResidualWrapper", "config": {"residual_function": []}}, "Python code"),
        ({"class_name": "Dense", "config": {"units": 1, "any_type": "lambda"}}, "Python code"),
        ({"class_name": "Dense", "module": "keras.layers", "config": {}, "registered_name": "a>Lambda"}, "Python code"),
        ({"class_name": "TFOpLambda", "config": {"function": "keras.utils.get_file"}}, "tf.keras.utils.get_file"),
        ({"class_name": "TFOpLambda", "config": {"function": "io.write_file"}}, "tf.io.write_file"),
        ({"class_name": "TFOpLambda", "config": {"function": "numpy_function"}}, "tf.numpy_function"),
        ({"class_name": "TensorFlowOpLayer", "config": {"node_def": '{"op": "WriteFile"}'}}, "files"),
    ],
)
def test_crafted_configuration(name: str, activation: dict, found: str, tmp_path: Path):
    path = changed(saved(small(), tmp_path / name), lambda layer: layer["config"].update(activation=activation))
    error = refused(path)
    assert found in error.received
    assert error.where == f"model.path {path}, layer scores"


@pytest.mark.parametrize("name", NAMES)
def test_layer_that_keras_lacks(name: str, tmp_path: Path):
    path = changed(saved(small(), tmp_path / name), lambda layer: layer.update(class_name="Dens", registered_name=None))
    assert "Dens" in refused(path).received
