"""A user's mistake: exit code 2, one paragraph that says where, what was expected, what was received, what to do."""

from __future__ import annotations

import json
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tf_keras
from mlflow.tracking import MlflowClient

from compress.cli.refused import remove_if_bare


def assert_refused(answer: tuple[int, str, str], *parts: str) -> str:
    code, _, error = answer
    assert code == 2, error
    assert "Traceback" not in error
    paragraph = " ".join(error[error.index("Error in ") :].split())
    assert "expected" in paragraph
    assert "received" in paragraph
    for part in parts:
        assert part in paragraph, f"{part!r} is not in: {paragraph}"
    return paragraph


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["strategy=prun"], ["strategy", "received prun.", "Did you mean strategy=prune?"]),
        (["strategy=lowrank+prun"], ["strategy", "received prun.", "Did you mean strategy=prune?"]),
        (["strategy=lowrank+"], ["strategy", "one of", "lowrank"]),
        (["model=resnet21"], ["model", "resnet20"]),
        (["strategy=prune", "strategy.prune.sparsty=0.5"], ["strategy.prune.sparsty", "sparsity"]),
        (["strategy=prune", "strategy.prun.sparsity=0.5"], ["prun", "prune"]),
        (["recovry.epochs=1"], ["recovry", "recovery"]),
        (["strategy=prune", "strategy.prune=0.5"], ["strategy.prune:", "received 0.5", "strategy.prune.<key>=<value>"]),
        (
            ["strategy=prune", "strategy.prune.recovery=3"],
            ["strategy.prune.recovery:", "received 3", "<key>="],
        ),
        (["model=mlp_800", "model.train=3"], ["model.train:", "received 3", "'model.train={epochs: <value>}'"]),
        (["model=mlp_1200", "model.max_norm=true"], ["model.max_norm:", "a number", "received true"]),
        (["recovery.clip_norm=true"], ["recovery.clip_norm:", "a number", "received true"]),
        (["strategy=prune", "strategy.prune.recovery.epoch=1"], ["strategy.prune.recovery.epoch", "epochs"]),
        (["strategy=lowrank", "strategy.lowrank.macs=1.5"], ["strategy.lowrank.macs", "less than 1", "1.5"]),
        (["strategy=prune", "strategy.prune.sparsity=-1"], ["strategy.prune.sparsity", "greater than 0", "-1"]),
        (["strategy=prune", "strategy.prune.sparsity=much"], ["strategy.prune.sparsity", "number", "much"]),
        (["strategy=quantize", "strategy.quantize.scheme=int3"], ["strategy.quantize.scheme", "'int8'", "int3"]),
        (["strategy=share", "strategy.share.clusters=1"], ["strategy.share.clusters", "2"]),
        (["strategy=share", "strategy.share.clusters=65537"], ["strategy.share.clusters", "65536", "65537"]),
        (
            ["strategy=share", "strategy.share.clusters=60000"],
            ["more than 60000 weights", "fc1: 32768 weights"],
        ),
        (
            ["strategy=product_quantization", "strategy.product_quantization.codewords=1"],
            ["strategy.product_quantization.codewords", "greater than or equal to 2", "1"],
        ),
        (
            ["strategy=product_quantization", "strategy.product_quantization.length=1"],
            ["strategy.product_quantization.length", "greater than or equal to 2", "1"],
        ),
        (
            ["strategy=block_circulant", "strategy.block_circulant.block=7"],
            ["fc1: 256 inputs and 128 outputs are not both multiples of block=7", "leave the stage out"],
        ),
        (
            ["strategy=block_toeplitz", "strategy.block_toeplitz.block=100"],
            ["fc1: 256 inputs and 128 outputs are not both multiples of block=100"],
        ),
        (["strategy=block_circulant", "strategy.block_circulant.block=1"], ["block_circulant.block", "2", "1"]),
        (["strategy=kronecker", "strategy.kronecker.rank=10000"], ["kronecker", "fc1: ", "would not pay"]),
        (["strategy=low_displacement", "strategy.low_displacement.rank=64"], ["fc1: 32,768 numbers", "would not pay"]),
        (["strategy=low_displacement", "strategy.low_displacement.rank=128"], ["fc1: ", "no more than rank 128"]),
        (["strategy=rate_distortion", "strategy.rate_distortion.bytes=0"], ["rate_distortion.bytes", "greater than 0"]),
        (["strategy=prune", "strategy.prune.macs=0.5", "strategy.prune.sparsity=0.5"], ["strategy.prune", "one of"]),
        (["strategy=prune", "strategy.prune.only={type: Dens}"], ["strategy.prune.only", "Dense"]),
        (["strategy=prune", "strategy.prune.only={name: 'conv('}"], ["strategy.prune.only", "regular expression"]),
        (["strategy=prune", "strategy.prune.only=middle"], ["strategy.prune.only", "first, last"]),
        (["strategy=prune", "strategy.prune.release=[lowrank]"], ["strategy.prune.release", "lowrank"]),
        (["strategy=prune", "strategy.prune.repeat=0"], ["strategy.prune.repeat", "0"]),
        (["strategy=finetune", "recovery=none"], ["strategy.finetune.recovery", "training"]),
        (["strategy=prune+lowrank"], ["lowrank", "prune", "release"]),
        (["strategy=quantize+quantize", "strategy.quantize2.scheme=float16"], ["quantize2", "quantize", "float16"]),
        (["strategy=quantize+qat", "strategy.quantize.scheme=int16"], ["qat", "quantize", "int16", "release"]),
        (
            ["strategy=quantize", "strategy.quantize.scheme=int16", "strategy.quantize.ranges=mse"],
            ["strategy.quantize:", "expected ranges=mse only beside scheme=int8;", "received scheme=int16, ranges=mse"],
        ),
        (
            ["strategy=quantize", "strategy.quantize.float_fallback.accuracy_drop=0.5"],
            [
                "strategy.quantize.float_fallback.accuracy_drop:",
                "Write 'strategy.quantize.float_fallback={accuracy_drop: 0.5}'.",
            ],
        ),
        (["strategy=prune", "strategy.prune.only.type=Dense"], ["Write 'strategy.prune.only={type: Dense}'."]),
        (["strategy=none", "strategy.prune=0.5"], ["strategy.prune", "There is no valid name here."]),
        (
            ["strategy=quantize", "strategy.quantize.float_fallback={drop: 0.5}"],
            ["expected a value for this key;", "{'drop': 0.5}", "float_fallback={accuracy_drop: <value>}"],
        ),
        (
            ["strategy=quantize", "strategy.quantize.float_fallback={accuracy_drop: 1, foo: 2}"],
            ["float_fallback.foo: expected a key that exists; received 2. Leave it out."],
        ),
        (
            ["strategy=mixed_precision", "strategy.mixed_precision.choices=[]"],
            ["choices: expected at least 2 items; received []."],
        ),
        (
            ["strategy=mixed_precision", "strategy.mixed_precision.choices=[1,16]"],
            ["choices: expected greater than or equal to 2; received 1."],
        ),
        (["strategy=prune", "board.runs=10"], ["board.runs", "100"]),
        (["strategy=prune", "seed=x"], ["seed", "integer", "x"]),
        (["strategy=prune", "model.weights=nowhere.h5"], ["model.weights", "nowhere.h5"]),
        (["strategy=prune", "data=cifar10", "data.path=/nowhere"], ["data.path", "/nowhere"]),
        (["strategy=prune", "data=npz"], ["data.path", "nothing"]),
        (
            ["strategy=prune", "data=npz", "data.path=/nowhere/x.npz"],
            [
                "data.path: expected an .npz file; received /nowhere/x.npz (no such file)",
                "data.path=/path/to/arrays.npz",
            ],
        ),
        (["strategy=prune", "data=npz", "data.path=/tmp"], ["data.path:", "/tmp (a folder)"]),
        (["strategy=prune", "data.path=x.npz"], ["data.path:", "Write data=npz data.path=x.npz."]),
        (["strategy=prune", "data=my/x.npz"], ["data:", "received my/x.npz.", "Write data=npz data.path=my/x.npz."]),
        (["strategy=prune", "model=my.keras"], ["model:", "my.keras", "Write model=file model.path=my.keras."]),
        (["strategy=prune", "model='my model.keras'"], ["model:", "Write model=file model.path=\"'my model.keras'\"."]),
        (["strategy=prune", "model=/tmp/my.h5"], ["Error in model:", "Write model=file model.path=/tmp/my.h5."]),
        (["strategy=none", "model=my.tflite"], ["Write model=file model.path=my.tflite."]),
        (["strategy=prune", "model.file=x.keras"], ["model.file:", "Write model=file model.path=x.keras."]),
        (["strategy=prune", "model.path=x.keras"], ["model.path:", "Write model=file model.path=x.keras."]),
        (["strategy=prune", "model=file", "model.file=x.keras"], ["model.file:", "Write model.path=x.keras."]),
        (["strategy=prune", "sparsity=0.5"], ["Error in sparsity:", "Write strategy.prune.sparsity=0.5."]),
        (["strategy=prune", "+sparsity=0.5"], ["Error in sparsity:", "Write strategy.prune.sparsity=0.5."]),
        (
            ["strategy=lowrank+prune", "macs=0.5"],
            ["Error in macs:", "Write strategy.lowrank.macs=0.5 or strategy.prune.macs=0.5."],
        ),
        (["strategy=prune", "prune.sparsity=0.5"], ["Error in prune", "Write strategy.prune.sparsity=0.5."]),
        (["strategy=prune", "epochs=2"], ["Error in epochs:", "Write recovery.epochs=2."]),
        (
            ["strategy=prune", "recovery.teachers=reference"],
            ["recovery.teachers: expected a list; received 'reference'. Write 'recovery.teachers=[reference]'."],
        ),
        (
            ["strategy=quantize", "strategy.quantize.float_fallback=0.5"],
            ["received 0.5. Write 'strategy.quantize.float_fallback={accuracy_drop: 0.5}'."],
        ),
        (["strategy=prune", "tracking.uri=file:///tmp/nowhere"], ["tracking.uri", "tracking.uri=sqlite:///mlflow.db"]),
        (
            ["strategy=prune", "tracking.uri=foo"],
            ["tracking.uri: expected the address of an MLflow store", "received foo", "tracking.uri=sqlite:///foo.db"],
        ),
        (["strategy=compact", "strategy.compact.macs=0.01"], ["strategy.compact.macs", "0.01"]),
        (["strategy=lowrank", "strategy.lowrank.rank=0"], ["strategy.lowrank.rank:", "a whole number from 1", "0"]),
        (["strategy=lowrank", "strategy.lowrank.rank=999"], ["strategy.lowrank.rank", "at most", "999"]),
        (["strategy=lowrank", "strategy.lowrank.form=svd"], ["strategy.lowrank.form", "'tucker'", "svd"]),
        (["strategy=lowrank", "strategy.lowrank.params=0.001"], ["strategy.lowrank.params", "0.001"]),
        (["strategy=prune", "="], ["the command line"]),
        (["strategy=null"], ["the command line", "NoneType"]),
        (["strategy=prune.yaml"], ["strategy:", "as strategy=<name>", "not strategy=prune.yaml"]),
        (["~model"], ["model", "model=<choice>"]),
        (["~strategy"], ["strategy", "strategy=none"]),
        (["~seed"], ["seed", "seed=<choice>"]),
        (["~tracking"], ["tracking"]),
        (["+foo=1"], ["foo", "a key that exists"]),
        (["+recovery.foo=1"], ["recovery.foo", "a key that exists"]),
        (["strategy.lowrank=null"], ["strategy.lowrank", "all its keys"]),
        (["~strategy.lowrank.recovery"], ["strategy.lowrank", "recovery"]),
        (["strategy=prune", "strategy.prune.block=[4]"], ["strategy.prune.block", "two whole numbers", "[4]"]),
        (["strategy.lowrank.repeat=true"], ["strategy.lowrank.repeat", "whole number"]),
        (["strategy.lowrank.recovery=null"], ["strategy.lowrank", "recovery"]),
        (["recovery.epochs=inf"], ["recovery.epochs", "inf"]),
        (["seed=-1"], ["seed", "-1"]),
        (["seed=99999999999"], ["seed", "99999999999"]),
        (["debug=maybe"], ["debug", "boolean"]),
        (["model=lenet5"], ["model", "images large enough", "(8, 8, 1)"]),
        (["cache.enabled=maybe"], ["cache.enabled", "boolean"]),
        (["cache.dir="], ["cache.dir", "at least 1 character"]),
        (["tracking=mlflow", "tracking.experiment="], ["tracking.experiment", "at least 1 character"]),
        (["experiment=nosuch"], ["experiment", "nosuch"]),
        (["recovery.batch_size=100000000000000000000"], ["recovery.batch_size", "1000000"]),
        (["recovery.temperature=0"], ["recovery.temperature", "greater than 0"]),
        (["recovery.temperature=-4"], ["recovery.temperature", "greater than 0", "-4"]),
        (["recovery.label_weight=-1"], ["recovery.label_weight", "greater than or equal to 0"]),
        (["recovery.losses={attension: 1}"], ["recovery.losses.attension", "attention"]),
        (
            ["strategy=prune", "strategy.prune.recovery.losses={atention: 1}"],
            ["strategy.prune.recovery.losses.atention", "attention"],
        ),
        (["recovery.losses={hints: -1}"], ["recovery.losses.hints: expected greater than or equal to 0"]),
        (["recovery.losses={hints: true}"], ["recovery.losses.hints: expected a valid number", "received true"]),
        (["recovery.losses={decoupled: {beta: true}}"], ["recovery.losses.decoupled.beta: expected a valid number"]),
        (["recovery.losses={hints: much}"], ["recovery.losses.hints", "much"]),
        (["recovery.losses={decoupled: {gamma: 1}}"], ["recovery.losses.decoupled.gamma", "beta"]),
        (["recovery.losses={contrastive: {temperature: 0}}"], ["losses.contrastive.temperature", "greater than 0"]),
        (["recovery.losses={soft_targets: 1}"], ["recovery.losses.soft_targets", "recovery.soft_weight"]),
        (["recovery.losses.hints=16"], ["Write 'recovery.losses={hints: 16}'."]),
        (["recovery.hint_weight=16"], ["recovery.hint_weight", "a key that exists"]),
        (
            ["strategy=distill", "strategy.distill.recovery.losses={attention: 1}", "recovery.pairs={flatten: relu3}"],
            ["strategy.distill.recovery.pairs", "flatten (256,)", "relu3 (4, 4, 64)", "feature maps"],
        ),
        (
            ["strategy=distill", "strategy.distill.recovery.losses={hints: 1}", "recovery.pairs={relu3: rellu3}"],
            ["strategy.distill.recovery.pairs", "rellu3", "relu3"],
        ),
        (["board.timeout=inf"], ["board.timeout", "1000000"]),
        (["recovery.temperature=inf"], ["recovery.temperature", "1000000"]),
        (["recovery.temperature=nan"], ["recovery.temperature", "expected a number", "received nan"]),
        (["recovery.losses=[hints]"], ["recovery.losses", "mapping", "'recovery.losses={<name>: <value>}'"]),
        (["recovery.pairs=relu2"], ["recovery.pairs", "mapping", "'recovery.pairs={<name>: <value>}'"]),
        (["strategy=prune", "strategy.prune.sparsity=1e-6"], ["prune", "at least one weight"]),
        (["strategy=none", "model.train.learning_rate=1e9", "cache=off"], ["model.train.learning_rate=1e+08"]),
        (["strategy=prune", "recovery.learning_rate=1e9"], ["strategy.prune.recovery.learning_rate=1e+08"]),
        (["--config-dir", "/nowhere"], ["--config-dir", "/nowhere"]),
        (["strategy=prune", "tracking.uri=postgresql://me:secret@host/db"], ["tracking.uri", "password"]),
    ],
    ids=lambda value: " ".join(value)[:60] if value and isinstance(value, list) else "",
)
def test_overrides(cli, overrides, parts):
    paragraph = assert_refused(cli(*overrides), *parts)
    assert "secret" not in paragraph


def test_a_tracking_store_that_does_not_answer(cli, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    answer = cli("strategy=prune", "tracking.uri=http://127.0.0.1:9")
    assert_refused(answer, "tracking.uri", "http://127.0.0.1:9", "tracking=none")


def test_a_multirun_with_a_store_that_does_not_answer(cli, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    answer = cli("-m", "strategy=prune,share", "tracking.uri=http://127.0.0.1:9")
    assert_refused(answer, "tracking.uri")


def test_a_board_that_cannot_be_reached(cli, tmp_path):
    pytest.importorskip("asyncssh")
    (tmp_path / "known_hosts").touch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = [f"board.port={free.getsockname()[1]}", f"board.known_hosts={tmp_path}/known_hosts"]
    answer = cli("strategy=none", "board=ssh", "board.host=127.0.0.1", *place, "hydra.run.dir=out")
    assert_refused(answer, "board ssh", "127.0.0.1, port", "cannot be reached", "board=host")
    assert not (tmp_path / "out" / "report.json").exists()


def test_an_unwritable_output_folder(cli, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert_refused(cli("strategy=prune", f"hydra.run.dir={tmp_path}/file/out"), "hydra.run.dir", "file")


def test_an_unwritable_cache_folder_is_refused_before_anything_is_made(cli, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert_refused(cli("strategy=prune", f"cache.dir={tmp_path}/file/cache"), "cache.dir", "cache=off")


def test_one_array_instead_of_an_archive(cli, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((3, 3)))
    assert_refused(cli("strategy=prune", "data=npz", f"data.path={tmp_path}/x.npy"), "one .npy array", "savez")


@pytest.fixture
def small_model(tmp_path):
    image = tf_keras.Input((8, 8, 1))
    x = tf_keras.layers.Conv2D(4, 3, name="conv")(image)
    outputs = tf_keras.layers.Dense(10)(tf_keras.layers.Flatten()(x))
    return tf_keras.Model(image, outputs)


def use(path) -> list[str]:
    return ["strategy=prune", "model=file", f"model.path={path}", "recovery.epochs=1"]


def test_model_file_missing(cli, tmp_path):
    assert_refused(cli(*use(tmp_path / "none.keras")), "model", "none.keras")


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_model_file_truncated(cli, tmp_path, small_model, suffix):
    file = tmp_path / f"model.{suffix}"
    small_model.save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert_refused(cli(*use(file)), "model.")


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_model_file_not_keras(cli, tmp_path, suffix):
    file = tmp_path / f"model.{suffix}"
    file.write_text("no model at all")
    assert_refused(cli(*use(file)), f"model.{suffix}")


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_model_file_with_code(cli, tmp_path, suffix):
    image = tf_keras.Input((8, 8, 1))
    x = tf_keras.layers.Lambda(lambda t: t * 2, name="doubling")(image)
    model = tf_keras.Model(image, tf_keras.layers.Dense(10)(tf_keras.layers.Flatten()(x)))
    file = tmp_path / f"model.{suffix}"
    model.save(file)
    assert_refused(cli(*use(file)), "doubling", "model.allow_code=true")
    code, _, error = cli(*use(file), "model.allow_code=true")
    assert code == 0, error


def test_nan_weights(cli, tmp_path, small_model):
    weights = small_model.get_weights()
    weights[0][0, 0, 0, 0] = np.nan
    small_model.set_weights(weights)
    small_model.save(tmp_path / "model.keras")
    assert_refused(cli(*use(tmp_path / "model.keras")), "conv", "NaN")


def test_data_whose_shape_does_not_fit(cli, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"x_{part}": rng.integers(0, 255, (40, 8, 9)).astype(np.uint8) for part in ("train", "test")}
    arrays |= {f"y_{part}": rng.integers(0, 10, 40) for part in ("train", "test")}
    np.savez(tmp_path / "data.npz", **arrays)
    image = tf_keras.Input((8, 8, 1))
    tf_keras.Model(image, tf_keras.layers.Dense(10)(tf_keras.layers.Flatten()(image))).save(tmp_path / "m.keras")
    answer = cli(*use(tmp_path / "m.keras"), "data=npz", f"data.path={tmp_path}/data.npz")
    assert_refused(answer, "(8, 8, 1)", "(8, 9)")


def test_data_with_more_labels_than_the_model_scores(cli, tmp_path):
    image = tf_keras.Input((8, 8, 1))
    tf_keras.Model(image, tf_keras.layers.Dense(3)(tf_keras.layers.Flatten()(image))).save(tmp_path / "m.keras")
    assert_refused(cli(*use(tmp_path / "m.keras")), "10 classes", "(3)")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"y_train": None}, "y_train"),
        ({"y_train": np.zeros(5, int)}, "40 samples and 5 labels"),
        ({"x_train": np.full((40, 8, 8, 1), np.nan)}, "NaN"),
        ({"y_train": np.zeros((40, 10))}, "argmax"),
        ({"y_train": np.full(40, -1)}, "-1"),
    ],
)
def test_malformed_arrays(cli, tmp_path, change, part):
    rng = np.random.default_rng(0)
    arrays = {f"x_{p}": rng.uniform(0, 16, (40, 8, 8, 1)) for p in ("train", "test")}
    arrays |= {f"y_{p}": rng.integers(0, 10, 40) for p in ("train", "test")}
    arrays = {key: value for key, value in {**arrays, **change}.items() if value is not None}
    np.savez(tmp_path / "data.npz", **arrays)
    assert_refused(cli("strategy=prune", "data=npz", f"data.path={tmp_path}/data.npz"), part)


def write_npz(path, member: bytes, encrypted: bool = False) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(f"{name}.npy", member)
    if encrypted:
        # Bit 0 of the flags, in the local and in the central header, says so.
        content = bytearray(path.read_bytes())
        for start, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            place = content.find(start)
            while place >= 0:
                content[place + offset] |= 1
                place = content.find(start, place + 1)
        path.write_bytes(bytes(content))


@pytest.mark.parametrize("kind", ["no magic", "lies about its size", "encrypted"])
def test_damaged_archives(cli, tmp_path, kind):
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 8, 8), }"
    header = header.ljust(118) + b"\n"
    lying = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    write_npz(tmp_path / "data.npz", lying if kind == "lies about its size" else b"nothing", kind == "encrypted")
    answer = cli("strategy=prune", "data=npz", f"data.path={tmp_path}/data.npz")
    assert_refused(answer, "data.path", ".npz archive of plain arrays")


@pytest.mark.parametrize(("value", "part"), [(1e300, "finite as float32"), (np.longdouble(1), "64 bits")])
def test_samples_that_no_model_reads(cli, tmp_path, value, part):
    samples, labels = np.full((40, 8, 8), value), np.arange(40) % 10
    np.savez(tmp_path / "data.npz", x_train=samples, y_train=labels, x_test=samples, y_test=labels)
    assert_refused(cli("strategy=prune", "data=npz", f"data.path={tmp_path}/data.npz"), part)


def test_an_experiment_that_was_deleted(cli, tmp_path):
    uri = f"sqlite:///{tmp_path}/runs.db"
    client = MlflowClient(uri)
    client.delete_experiment(client.create_experiment("compress"))
    assert_refused(cli("strategy=none", f"tracking.uri={uri}"), "tracking.experiment", "deleted")
    assert_refused(cli("-m", "strategy=none", f"tracking.uri={uri}"), "tracking.experiment", "deleted")


@pytest.mark.parametrize(
    "overrides",
    [
        ["strategy=none,nosuch"],
        ["hydra/sweeper=search", "strategy=prune", "strategy.prune.sparsty=interval(0.3,0.9)"],
    ],
    ids=["sweep", "search"],
)
def test_a_multirun_of_which_no_job_begins_leaves_nothing(overrides, outside, tmp_path):
    uri = f"sqlite:///{tmp_path}/runs.db"
    answer = outside("-m", "compress.run", "-m", *overrides, f"tracking.uri={uri}", "hydra.sweep.dir=swept")
    assert answer.returncode == 2, answer.stderr
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("compress").experiment_id])
    assert [run.info.status for run in runs] == []
    assert not (tmp_path / "swept" / "mlflow_parent.json").exists()


def test_pickled_arrays_are_refused(cli, tmp_path):
    values = np.array([{"code": 1}], dtype=object)
    np.savez(tmp_path / "data.npz", x_train=values, y_train=values, x_test=values, y_test=values)
    assert_refused(cli("strategy=prune", "data=npz", f"data.path={tmp_path}/data.npz"), ".npz archive of plain arrays")


def test_a_loss_that_explodes(cli):
    answer = cli("strategy=finetune", "recovery.learning_rate=1e30", "recovery.epochs=3")
    assert_refused(answer, "training", "finite loss", "recovery.learning_rate")


def test_samples_that_are_no_images(cli, tmp_path):
    arrays = {f"x_{p}": np.zeros((40, 64), np.uint8) for p in ("train", "test")}
    np.savez(tmp_path / "data.npz", **arrays, y_train=np.arange(40) % 3, y_test=np.arange(40) % 3)
    assert_refused(cli("strategy=prune", "data=npz", f"data.path={tmp_path}/data.npz"), "(64,)", "model=file")


def test_what_was_finished_stays(cli, tmp_path, session_cache):
    before = {entry.name for entry in session_cache.iterdir()}
    answer = cli(
        "strategy=prune+finetune",
        "recovery.epochs=1",
        "strategy.prune.sparsity=0.37",
        "strategy.finetune.recovery.learning_rate=1e30",
        "strategy.finetune.recovery.epochs=3",
    )
    assert_refused(answer, "training")
    new = {entry.name for entry in session_cache.iterdir()} - before
    records = [json.loads((session_cache / name / "record.json").read_text()) for name in new]
    stages = {record["result"]["name"] for record in records if "result" in record}
    assert "prune" in stages
    assert "finetune" not in stages
    assert not [entry for entry in session_cache.iterdir() if entry.name.startswith(".partial")]


def test_debug_shows_the_traceback(cli, monkeypatch):
    from compress.errors import CompressError
    from compress.run import main

    monkeypatch.setattr("sys.argv", ["run.py"])
    with pytest.raises(CompressError):
        main(["strategy=prune", "strategy.prune.sparsity=-1", "tracking=none", "debug=true"])


def test_other_jobs_of_a_multirun_go_on(cli, tmp_path):
    code, _, error = cli(
        "-m", "strategy=prune", "recovery.epochs=1", "strategy.prune.sparsity=-1,0.41", f"hydra.sweep.dir={tmp_path}/s"
    )
    assert code == 2
    assert "strategy.prune.sparsity" in error
    assert not (tmp_path / "s" / "0" / "report.json").exists()
    assert (tmp_path / "s" / "1" / "report.json").exists()


def test_a_command_that_is_refused_leaves_no_folder(cli, tmp_path):
    assert_refused(cli("strategy=lowrank", "strategy.lowrank.macs=1.5"), "strategy.lowrank.macs")
    assert not list(tmp_path.glob("outputs/*/*"))


@pytest.mark.parametrize("place", ["out", "outputs/2000-01-01/00-00-00-000000"])
def test_a_folder_that_was_there_is_left(cli, tmp_path, place):
    (tmp_path / place).mkdir(parents=True)
    assert_refused(cli("strategy=lowrank", "strategy.lowrank.macs=1.5", f"hydra.run.dir={place}"), "macs")
    assert (tmp_path / place / ".hydra" / "config.yaml").is_file()


def test_a_run_that_had_begun_keeps_its_folder(cli, tmp_path):
    assert_refused(cli("strategy=share", "strategy.share.clusters=60000", "model.train.epochs=1"), "60000")
    (folder,) = tmp_path.glob("outputs/*/*")
    assert "baseline" in (folder / "run.log").read_text()


@pytest.mark.parametrize("extra", ["mine.txt", ".hydra/mine.yaml", "folder/", "run.log"])
def test_only_what_hydra_wrote_is_removed(tmp_path, extra):
    def folder(name: str) -> Path:
        made = tmp_path / name
        (made / ".hydra").mkdir(parents=True)
        for file in (".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "run.log"):
            (made / file).touch()
        return made

    bare, kept = folder("bare"), folder("kept")
    if extra.endswith("/"):
        (kept / extra).mkdir()
    else:
        (kept / extra).write_text("mine")
    before = sorted(kept.rglob("*"))
    for one in (bare, kept):
        remove_if_bare(one)
    assert not bare.exists()
    assert sorted(kept.rglob("*")) == before
