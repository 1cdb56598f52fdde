"""The main job from the command line: report, files, MLflow, determinism, shared prefixes, resuming after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import tf_keras
from ai_edge_litert.interpreter import Interpreter
from mlflow.tracking import MlflowClient
from sklearn.datasets import load_digits

from compress.deploy.packing import unpack
from compress.tracking.report import SCHEMA_FILE
from tests.conftest import REPOSITORY

QUICK = ["recovery.epochs=1", "board.runs=100", "board.warmup=1", "board.precision=null"]
SAME = ("accuracy", "accuracy_keras", "params", "nonzero_params", "macs", "tflite_bytes", "packed_bytes", "gzip_bytes")


def read(folder: Path) -> dict:
    report = json.loads((folder / "report.json").read_text())
    jsonschema.validate(report, json.loads(SCHEMA_FILE.read_text()))
    return report


def same_numbers(report: dict) -> list:
    parts = [report["baseline"], *report["stages"], report["final"]]
    return [[part[key] for key in SAME] for part in parts]


def test_the_default_job(cli, tmp_path):
    code, shown, error = cli(*QUICK, "hydra.run.dir=out", f"tracking.uri=sqlite:///{tmp_path}/runs.db")
    assert code == 0, error
    report = read(tmp_path / "out")
    assert report["strategy"] == "lowrank+prune"
    for word in ("baseline", "lowrank", "prune", "gain", "accuracy", ".tflite bytes"):
        assert word in shown
    for name in ("keras", "tflite", "packed"):
        assert (tmp_path / "out" / report["artifacts"][name]).is_file()
    assert (tmp_path / "out" / "model.tflite").stat().st_size == report["final"]["tflite_bytes"]
    assert (tmp_path / "out" / "model.cmp").stat().st_size == report["final"]["packed_bytes"]
    unpack(tmp_path / "out" / "model.cmp", tmp_path / "unpacked.tflite")
    assert (tmp_path / "unpacked.tflite").read_bytes() == (tmp_path / "out" / "model.tflite").read_bytes()
    unpack(tmp_path / "out" / "model.cmp", tmp_path / "unpacked.keras")
    unpacked, saved = (
        tf_keras.models.load_model(tmp_path / name, compile=False) for name in ("unpacked.keras", "out/model.keras")
    )
    assert [w.tobytes() for w in unpacked.get_weights()] == [w.tobytes() for w in saved.get_weights()]

    # The accuracy, recomputed with nothing of the project: the file reads raw pixels.
    bunch = load_digits()
    test = np.arange(len(bunch.target)) % 5 == 4
    interpreter = Interpreter(model_path=str(tmp_path / "out" / "model.tflite"))
    interpreter.allocate_tensors()
    source, target = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    right = 0
    for image, label in zip(bunch.images[test], bunch.target[test], strict=True):
        interpreter.set_tensor(source, image[None, :, :, None].astype(np.float32))
        interpreter.invoke()
        right += int(interpreter.get_tensor(target).argmax() == label)
    assert report["final"]["accuracy"] == pytest.approx(100 * right / test.sum())

    client = MlflowClient(f"sqlite:///{tmp_path}/runs.db")
    experiment = client.get_experiment_by_name("compress").experiment_id
    runs = client.search_runs([experiment])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(parents) == len(children) == 1
    assert {run.info.status for run in runs} == {"FINISHED"}
    metrics = children[0].data.metrics
    for key in SAME:
        assert metrics[key] == report["final"][key]
        assert metrics[f"baseline.{key}"] == report["baseline"][key]
        assert metrics[f"lowrank.{key}"] == report["stages"][0][key]
    assert metrics["latency_p50"] == report["final"]["latency_ms"]["p50"]
    assert metrics["board_load_ms"] == report["final"]["on_board"]["load_ms"] > 0
    assert report["baseline"]["speedup"] is None
    assert metrics["speedup"] == report["final"]["speedup"] > 0
    assert metrics["relative_latency"] == 1 / metrics["speedup"]
    assert metrics["baseline.relative_latency"] == 1.0
    assert metrics["ratio.gzip_bytes"] == report["ratios"]["gzip_bytes"]
    assert children[0].data.params["strategy.prune.ramp"] == "0.25"
    files = {item.path for item in client.list_artifacts(children[0].info.run_id)}
    assert {"report.json", "model.tflite", "layers.png", "config.yaml", "card.md", "model"} <= files
    assert f"runs:/{children[0].info.run_id}/model" in children[0].data.tags["serve"]
    served = {item.path for item in client.list_artifacts(children[0].info.run_id, "model")}
    assert {"model/MLmodel", "model/served_model.py", "model/artifacts"} <= served
    assert (tmp_path / "out" / "layers.png").is_file()
    assert report["artifacts"]["card"] == "card.md"
    assert f"{report['final']['accuracy']:.2f} %" in (tmp_path / "out" / "card.md").read_text()


def test_an_integer_file_shows_its_noise_layer_by_layer(cli, tmp_path):
    store = f"tracking.uri=sqlite:///{tmp_path}/runs.db"
    code, _, error = cli("strategy=quantize", *QUICK, "hydra.run.dir=out", store)
    assert code == 0, error
    noise = read(tmp_path / "out")["stages"][0]["noise"]
    layers = [row["layer"] for row in noise]
    assert {"conv1", "conv2", "conv3", "fc1"} <= set(layers)
    assert layers.index("conv1") < layers.index("conv2") < layers.index("fc1")
    assert all(15 < row["signal_to_noise_db"] < 80 for row in noise)
    assert (tmp_path / "out" / "noise.png").stat().st_size > 5_000

    client = MlflowClient(f"sqlite:///{tmp_path}/runs.db")
    experiment = client.get_experiment_by_name("compress").experiment_id
    (run,) = (r for r in client.search_runs([experiment]) if "mlflow.parentRunId" in r.data.tags)
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "noise.json", str(tmp_path))).read_text())
    assert [row[table["columns"].index("layer")] for row in table["data"]] == layers
    assert "noise.png" in {item.path for item in client.list_artifacts(run.info.run_id)}


def test_same_seed_same_numbers_and_another_seed_others(cli, tmp_path):
    reports = []
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        arguments = [
            "strategy=lowrank+prune+share+quantize",
            *QUICK,
            f"seed={seed}",
            "cache=off",
            "model.train.epochs=4",
        ]
        code, _, error = cli(*arguments, f"hydra.run.dir={folder}")
        assert code == 0, error
        reports.append(read(tmp_path / folder))
    assert same_numbers(reports[0]) == same_numbers(reports[1])
    assert same_numbers(reports[0]) != same_numbers(reports[2])
    bytes_of = [(tmp_path / folder / "model.tflite").read_bytes() for folder in "abc"]
    assert bytes_of[0] == bytes_of[1]
    assert bytes_of[0] != bytes_of[2]


def test_a_multirun_shares_its_prefix_and_tags_the_front(cli, tmp_path):
    arguments = ["-m", "strategy=lowrank,lowrank+prune,lowrank+quantize", *QUICK, "hydra.sweep.dir=sweep"]
    code, _, error = cli(*arguments, f"tracking.uri=sqlite:///{tmp_path}/runs.db", "cache.dir=own_cache")
    assert code == 0, error
    reports = [read(tmp_path / "sweep" / str(job)) for job in range(3)]
    assert [[stage["cached"] for stage in report["stages"]] for report in reports] == [
        [False],
        [True, False],
        [True, False],
    ]
    assert reports[1]["stages"][0]["latency_ms"] == reports[0]["stages"][0]["latency_ms"]

    client = MlflowClient(f"sqlite:///{tmp_path}/runs.db")
    experiment = client.get_experiment_by_name("compress").experiment_id
    runs = client.search_runs([experiment])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    assert parents[0].info.status == "FINISHED"
    files = {item.path for item in client.list_artifacts(parents[0].info.run_id)}
    assert {"pareto.html", "pareto.png"} <= files
    children = [run for run in runs if run not in parents]
    assert len(children) == 3

    # The front, recomputed pair by pair.
    def beaten(run, key: str) -> bool:
        mine = run.data.metrics
        return any(
            o.data.metrics["accuracy"] >= mine["accuracy"]
            and o.data.metrics[key] <= mine[key]
            and (o.data.metrics["accuracy"], o.data.metrics[key]) != (mine["accuracy"], mine[key])
            for o in children
        )

    front = {run.info.run_id for run in children if not (beaten(run, "tflite_bytes") and beaten(run, "latency_p50"))}
    found = {run.info.run_id for run in client.search_runs([experiment], 'tags.pareto = "true"')}
    assert found == front


def test_a_killed_multirun_continues_with_the_same_numbers(tmp_path):
    arguments = [
        *("-m", "strategy=lowrank,lowrank+prune,lowrank+quantize", *QUICK, "tracking=none", "model.train.epochs=3"),
        "strategy.lowrank.recovery.epochs=2",
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}

    def command(folder: str, *more: str) -> list[str]:
        return [
            sys.executable,
            "-m",
            "compress.run",
            *arguments,
            f"hydra.sweep.dir={folder}",
            f"cache.dir={folder}_cache",
            *more,
        ]

    undisturbed = subprocess.run(
        command("calm"), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert undisturbed.returncode == 0, undisturbed.stderr

    running = subprocess.Popen(command("killed"), cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    deadline = time.monotonic() + 240
    for line in running.stdout:
        assert time.monotonic() < deadline
        if "prune: running" in line:
            break
    time.sleep(1.0)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "1" / "report.json").exists()

    again = subprocess.run(
        command("killed"), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    for job in range(3):
        calm, resumed = (read(tmp_path / folder / str(job)) for folder in ("calm", "killed"))
        assert same_numbers(calm) == same_numbers(resumed)
        assert resumed["stages"][0]["cached"]
    calm_bytes, resumed_bytes = ((tmp_path / f / "1" / "model.tflite").read_bytes() for f in ("calm", "killed"))
    assert calm_bytes == resumed_bytes
    kept = [entry for entry in (tmp_path / "killed_cache").iterdir() if entry.name != ".locks"]
    assert all((entry / "manifest.json").exists() for entry in kept)


@pytest.mark.data
@pytest.mark.parametrize("strategy", ["lowrank+prune", "lowrank+prune+quantize"])
def test_resnet20_on_cifar10_in_short(cli, data_dir, tmp_path, strategy):
    """A twentieth of the training data and a tenth of the test data; results/ holds the whole."""
    code, _, error = cli(
        *("model=resnet20", "data=cifar10", f"strategy={strategy}", "data.train_limit=2560", "data.test_limit=1000"),
        *("recovery.epochs=1", "hydra.run.dir=out"),
    )
    assert code == 0, error
    report = read(tmp_path / "out")
    assert report["baseline"]["params"] == 269722
    assert report["baseline"]["macs"] == 40551040
    assert abs(report["baseline"]["accuracy"] - report["baseline"]["accuracy_keras"]) <= 0.1
    assert report["ratios"]["nonzero_params"] >= 2
    assert report["final"]["accuracy"] >= report["baseline"]["accuracy"] - 8
    if strategy.endswith("quantize"):
        assert report["ratios"]["tflite_bytes"] >= 4
