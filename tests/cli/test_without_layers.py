"""Models without Keras layers, from the command line: a SavedModel is quantized, a .tflite file is measured."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from ai_edge_litert.interpreter import Interpreter

from compress.cli.places import conf_dir
from compress.data.digits import Digits
from compress.deploy.packing import unpack
from compress.errors import CompressError
from compress.metrics.counts import count_macs, count_params
from compress.tracking.report import SCHEMA_FILE

from .test_bad_input import assert_refused

layers = tf_keras.layers
QUICK = ("board.runs=100", "board.warmup=1", "board.precision=null")
STRATEGIES = sorted(file.stem for file in (conf_dir() / "strategy").glob("*.yaml"))
NEEDED = {"auto": ["budget.bytes=1000"]}
"""Settings without which a strategy is refused for another reason."""


@pytest.fixture(scope="module")
def model() -> tf_keras.Model:
    """Right more often than by chance: the scores are the distances to the mean image of each class."""
    data = Digits().load()
    means = np.stack([data.train.x[data.train.y == label].mean(0).reshape(-1) for label in range(10)], axis=1)
    image = tf_keras.Input((8, 8, 1))
    x = layers.Conv2D(2, 1, name="conv")(image)
    model = tf_keras.Model(image, layers.Dense(10, name="scores")(layers.Flatten()(x)), name="means")
    both = np.repeat(means, 2, axis=0)
    model.set_weights([np.ones((1, 1, 1, 2)), np.zeros(2), both, -(means**2).sum(0)])
    return model


@pytest.fixture(scope="module")
def saved_model(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "means"
    model.export(folder)
    return folder


@pytest.fixture(scope="module", params=["float32", "int8", "int8 inputs"])
def tflite(model, request, tmp_path_factory) -> Path:
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if request.param != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        images = Digits().load().train.x[:100].reshape(-1, 1, 8, 8, 1).astype(np.float32)
        converter.representative_dataset = lambda: ([image] for image in images)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    if request.param == "int8 inputs":
        converter.inference_input_type = converter.inference_output_type = tf.int8
    file = tmp_path_factory.mktemp("tflite") / "means.tflite"
    file.write_bytes(converter.convert())
    return file


def use(path: Path) -> list[str]:
    return ["model=file", f"model.path={path}", *QUICK]


def read(folder: Path) -> dict:
    report = json.loads((folder / "report.json").read_text())
    jsonschema.validate(report, json.loads(SCHEMA_FILE.read_text()))
    return report


@pytest.mark.parametrize(("scheme", "dtype"), [("int8", np.int8), ("float16", np.float16), ("dynamic", np.int8)])
def test_a_saved_model_is_quantized(scheme, dtype, cli, saved_model, model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.keras").write_text("of an earlier run")
    settings = ("strategy=quantize", f"strategy.quantize.scheme={scheme}", "hydra.run.dir=out")
    code, shown, error = cli(*use(saved_model), *settings)
    assert code == 0, error
    report = read(tmp_path / "out")
    before, after = report["baseline"], report["final"]
    data = Digits().load()
    right = model.predict(data.test.x.reshape(-1, 8, 8, 1), verbose=0).argmax(1) == data.test.y
    assert before["accuracy"] == before["accuracy_keras"] == pytest.approx(100 * right.mean())
    assert after["accuracy"] == pytest.approx(before["accuracy"], abs=2)
    assert before["params"] == after["params"] == count_params(model)
    assert before["macs"] == after["macs"] == count_macs(model)
    assert report["ratios"]["tflite_bytes"] > (1.2 if scheme == "float16" else 1.4)
    assert report["model"] == "means"
    assert report["artifacts"] == {"keras": None, "tflite": "model.tflite", "packed": "model.cmp", "card": "card.md"}
    assert not (tmp_path / "out" / "model.keras").exists()
    assert "SavedModel" in shown
    details = Interpreter(model_path=str(tmp_path / "out" / "model.tflite")).get_tensor_details()
    assert dtype in {d["dtype"] for d in details if np.prod(d["shape"]) == 1280}


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name not in ("quantize", "pack")])
def test_a_saved_model_cannot_be_changed(name, pipeline, saved_model, tmp_path):
    with pytest.raises(CompressError) as caught:
        pipeline(f"strategy=quantize+{name}", *NEEDED.get(name, []), *use(saved_model)).run(tmp_path)
    assert caught.value.where == f"stage {name}"
    assert "without Keras layers" in caught.value.received
    assert ".keras" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_saved_model_is_packed(pipeline, saved_model, tmp_path):
    (tmp_path / "fixed").mkdir()
    (tmp_path / "packed").mkdir()
    sizes = {}
    for coder, folder in {"none": "fixed", "smallest": "packed"}.items():
        built = pipeline("strategy=quantize+pack", f"strategy.pack.coder={coder}", *use(saved_model))
        sizes[coder] = built.run(tmp_path / folder).final.packed_bytes
        unpack(tmp_path / folder / "model.cmp", tmp_path / folder / "again.tflite")
        assert (tmp_path / folder / "again.tflite").read_bytes() == (tmp_path / folder / "model.tflite").read_bytes()
    assert sizes["smallest"] < sizes["none"]


def right_answers(file: Path) -> np.ndarray:
    """Which test images the file recognises, by LiteRT alone."""
    interpreter = Interpreter(model_path=str(file))
    interpreter.allocate_tensors()
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()
    scale, zero = source["quantization"]
    data, found = Digits().load(), []
    for image in data.test.x.reshape(-1, 1, 8, 8, 1).astype(np.float32):
        image = np.clip(np.round(image / scale) + zero, -128, 127) if scale else image
        interpreter.set_tensor(source["index"], image.astype(source["dtype"]))
        interpreter.invoke()
        found.append(interpreter.get_tensor(target["index"]).argmax())
    return np.array(found) == data.test.y


def test_a_tflite_file_is_measured(cli, tflite, model, tmp_path, request):
    # With a store once: it takes long to be made.
    is_float = request.node.callspec.params["tflite"] == "float32"
    store = [f"tracking.uri=sqlite:///{tmp_path}/runs.db"] if is_float else []
    answer = cli(*use(tflite), "strategy=none", "hydra.run.dir=out", *store)
    assert answer[0] == 0, answer[2]
    report = read(tmp_path / "out")
    numbers = report["final"]
    assert numbers["accuracy"] == pytest.approx(100 * right_answers(tflite).mean())
    assert numbers["accuracy_keras"] is None
    assert numbers["params"] == count_params(model)
    assert numbers["macs"] == count_macs(model)
    assert numbers["tflite_bytes"] == tflite.stat().st_size
    assert numbers["latency_ms"]["p50"] > 0
    assert report["stages"] == []
    assert report["model"] == "means"
    assert (tmp_path / "out" / "model.tflite").read_bytes() == tflite.read_bytes()


@pytest.fixture(scope="module")
def float_file(model, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("float") / "means.tflite"
    file.write_bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())
    return file


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_tflite_file_cannot_be_changed(name, pipeline, float_file, tmp_path):
    with pytest.raises(CompressError) as caught:
        pipeline(f"strategy={name}", *NEEDED.get(name, []), *use(float_file)).run(tmp_path)
    assert caught.value.where == f"stage {name}"
    assert "strategy=none" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_measuring_a_file_where_it_lies(pipeline, float_file, tmp_path):
    """The output folder may be the file's own."""
    content = float_file.read_bytes()
    (tmp_path / "model.tflite").write_bytes(content)
    pipeline("strategy=none", *use(tmp_path / "model.tflite")).run(tmp_path)
    assert (tmp_path / "model.tflite").read_bytes() == content
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.cmp", "model.tflite"]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.5, 0.95])
def test_a_truncated_tflite_file(share, pipeline, float_file, tmp_path):
    content, file = float_file.read_bytes(), tmp_path / "cut.tflite"
    file.write_bytes(content[: int(len(content) * share)])
    (tmp_path / "out").mkdir()
    with pytest.raises(CompressError):
        pipeline("strategy=none", *use(file)).run(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_tflite_files_that_are_none(cli, tmp_path, monkeypatch, float_file):
    from compress.models import file as module

    (tmp_path / "text.tflite").write_text("no model at all")
    assert_refused(cli(*use(tmp_path / "text.tflite"), "strategy=none"), "text.tflite", "TFL3")
    assert_refused(cli(*use(tmp_path / "absent.tflite"), "strategy=none"), "absent.tflite", "no such file")
    monkeypatch.setattr(module, "_MOST_TFLITE_BYTES", 100)
    assert_refused(cli(*use(float_file), "strategy=none"), "GiB", f"{float_file.stat().st_size:,} bytes")


def test_a_tflite_file_for_other_data(cli, tmp_path):
    values = tf_keras.Input((5,))
    content = tf.lite.TFLiteConverter.from_keras_model(tf_keras.Model(values, layers.Dense(10)(values))).convert()
    (tmp_path / "other.tflite").write_bytes(content)
    assert_refused(cli(*use(tmp_path / "other.tflite"), "strategy=none"), "other.tflite", "(5)", "(8, 8, 1)")
