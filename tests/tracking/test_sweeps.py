"""The end of a multirun in MLflow: fronts tagged and counted; several sweeps compared by ``compress.pareto``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient

from compress.cli.build import make_plan
from compress.cli.compose import compose_config
from compress.errors import CompressError
from compress.pareto import main as pareto_command
from compress.tracking.pareto import Estimate, Point, read_fronts, require_reference
from compress.tracking.process import process_tags
from compress.tracking.store import Store, TrackingSettings, connect, start_parent
from compress.tracking.sweeps import finish_sweep, note

BASELINE = {"baseline.accuracy": 100.0, "baseline.tflite_bytes": 4000.0, "baseline.latency_p50": 2.0}


@dataclass(frozen=True)
class Sweeps:
    settings: TrackingSettings
    client: MlflowClient
    experiment: str

    def parent(self) -> str:
        return start_parent(Store(self.settings.uri, self.settings.experiment), "multirun", ["-m"])

    def child(self, parent: str, name: str, seed: int, status: str = "FINISHED", **metrics: float) -> str:
        tags = {"mlflow.parentRunId": parent, "strategy": name, "seed": str(seed), "overrides": "[]"}
        run = self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id
        everything = {**BASELINE, **metrics} if metrics else {}
        self.client.log_batch(
            run,
            metrics=[Metric(key, value, 0, 0) for key, value in everything.items()],
            params=[Param("seed", str(seed)), Param("strategy.name", name)],
            tags=[RunTag("x", "y")],
        )
        self.client.set_terminated(run, status)
        return run

    def tags(self, run: str) -> dict[str, str]:
        return {key: value for key, value in self.client.get_run(run).data.tags.items() if key.startswith("pareto")}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Sweeps:
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(uri)
    client.create_experiment("tests", artifact_location=(folder / "artifacts").as_uri())
    return Sweeps(TrackingSettings(True, uri, "tests"), *connect(uri, "tests"))


@dataclass(frozen=True)
class Finished:
    parent: str
    best: str
    small: list[str]
    fast: str
    dominated: str
    broken: str


@pytest.fixture(scope="module")
def sweep(store) -> Finished:
    parent = store.parent()
    made = Finished(
        parent,
        best=store.child(parent, "best", 0, accuracy=95.0, tflite_bytes=4000, latency_p50=2.0),
        small=[
            store.child(parent, "small", seed, accuracy=accuracy, tflite_bytes=1000, latency_p50=2.0)
            for seed, accuracy in ((0, 89.0), (1, 91.0))
        ],
        fast=store.child(parent, "fast", 0, accuracy=88.0, tflite_bytes=3000, latency_p50=0.5),
        dominated=store.child(parent, "dominated", 0, accuracy=80.0, tflite_bytes=3500, latency_p50=1.5),
        broken=store.child(parent, "broken", 0, "FAILED"),
    )
    summary = finish_sweep(store.client, parent)
    assert len(summary.points) == 4
    assert summary.missing is None
    return made


def test_the_fronts_are_tagged(store, sweep):
    def on(run: str) -> tuple[str | None, str | None, str | None]:
        tags = store.tags(run)
        return tags.get("pareto"), tags.get("pareto.tflite_bytes"), tags.get("pareto.latency_p50")

    assert on(sweep.best) == ("true", "true", "true")
    assert [on(run) for run in sweep.small] == [("true", "true", "false")] * 2
    assert on(sweep.fast) == ("true", "false", "true")
    assert on(sweep.dominated) == ("false", "false", "false")
    assert on(sweep.broken) == (None, None, None)
    query = f"tags.pareto = 'true' and tags.`mlflow.parentRunId` = '{sweep.parent}'"
    assert len(store.client.search_runs([store.experiment], query)) == 4


def test_the_parent_has_charts_counts_and_hypervolumes(store, sweep):
    run = store.client.get_run(sweep.parent)
    assert run.info.status == "FAILED", "one of its runs failed"
    files = {item.path: item.file_size for item in store.client.list_artifacts(sweep.parent)}
    assert {"pareto.html", "pareto.png"} <= set(files)
    assert files["pareto.html"] < 2_200_000
    metrics = run.data.metrics
    assert (metrics["runs"], metrics["pareto_runs"]) == (5, 4)
    # Of the two small ones the mean counts: 90 % at a quarter of the bytes. The best one saves none.
    assert metrics["hypervolume.tflite_bytes"] == pytest.approx(0.9 * 0.75)
    assert metrics["hypervolume.latency_p50"] == pytest.approx(0.88 * 0.75)
    scale = json.loads(run.data.tags["hypervolume_scale.tflite_bytes"])
    assert scale == {
        "reference": {"accuracy": 0.0, "tflite_bytes": 4000.0},
        "unit": {"accuracy": 100.0, "tflite_bytes": 4000.0},
    }
    shown = run.data.tags["mlflow.note.content"].splitlines()
    assert [line.split("]")[0] for line in shown[2:]] == ["| [best", "| [small", "| [fast", "| [dominated"]
    assert f"(#/experiments/{store.experiment}/runs/{sweep.best})" in shown[2]
    assert "90.00 ± 12.71" in shown[3]


def test_an_objective_that_no_run_reports_is_told_and_the_rest_is_done(store):
    parent = store.parent()
    only = store.child(parent, "only", 0, accuracy=90.0, tflite_bytes=1000, latency_p50=1.0)
    summary = finish_sweep(store.client, parent, (("accuracy", "tflite_bytes"), ("accuracy", "tflite_bites")))
    assert summary.missing is not None
    assert "tflite_bites" in str(summary.missing)
    assert "tflite_bytes" in str(summary.missing)
    assert store.tags(only) == {"pareto": "true", "pareto.tflite_bytes": "true"}
    assert store.client.get_run(parent).info.status == "FAILED"


def test_a_default_front_that_no_board_reports_is_left_out(store):
    parent = store.parent()
    only = store.child(parent, "only", 0, accuracy=90.0, tflite_bytes=1000)
    summary = finish_sweep(store.client, parent)
    assert summary.missing is None
    assert store.tags(only) == {"pareto": "true", "pareto.tflite_bytes": "true"}
    assert store.client.get_run(parent).info.status == "FINISHED"


def test_a_job_that_died_without_a_word_is_closed_as_failed(store):
    parent = store.parent()
    tags = {"mlflow.parentRunId": parent}
    silent = store.client.create_run(store.experiment, tags={**tags, **process_tags()}).info.run_id
    finish_sweep(store.client, parent, stopped=True)
    assert store.client.get_run(silent).info.status == "RUNNING", "a job of a stopped sweep may still be at work"
    finish_sweep(store.client, parent)
    assert store.client.get_run(silent).info.status == "FAILED"
    assert store.client.get_run(parent).info.status == "FAILED"


def test_a_sweep_without_a_finished_run_is_closed(store):
    parent = store.parent()
    store.child(parent, "broken", 0, "FAILED")
    assert finish_sweep(store.client, parent, stopped=True).points == []
    assert store.client.get_run(parent).info.status == "KILLED"


def test_the_table_of_a_large_sweep_fits_into_a_tag_with_the_front_first():
    fronts = read_fronts(["accuracy", "tflite_bytes"], "")
    points = [
        Point(
            f"prune prune.sparsity=0.{i:03d} | `x` <b>",
            {f"{i:032d}": "0"},
            {"accuracy": Estimate(i / 10), "tflite_bytes": Estimate(1000.0)},
            frozenset({"tflite_bytes"} if i % 20 == 0 else ()),
        )
        for i in range(100)
    ]
    text = note(points, fronts, "1")
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    assert len(text) <= 5000
    assert [line.endswith("tflite_bytes |") for line in rows[:6]] == [True] * 5 + [False]
    assert text.endswith(f"And {100 - len(rows)} more, see `pareto.html`.")
    assert all(line.replace("\\|", "").count("|") == 5 for line in rows), "a bar in a name is no column"


def overlay(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        pareto_command(list(arguments))
    shown = capsys.readouterr()
    return int(stopped.value.code or 0), shown.out, " ".join(shown.err.split())


def test_several_sweeps_in_one_chart(store, sweep, tmp_path, capsys):
    other = store.parent()
    store.child(other, "quantize", 0, accuracy=94.0, tflite_bytes=800, latency_p50=1.0)
    code, shown, error = overlay(
        capsys,
        f"runs={sweep.parent},{other}",
        "names=grid,<search>",
        f"uri={store.settings.uri}",
        "objectives=[accuracy,tflite_bytes]",
        f"output={tmp_path}/out",
    )
    assert code == 0, error
    rows = {
        line.split("│")[1].strip(): [c.strip() for c in line.split("│")[2:6]]
        for line in shown.splitlines()
        if "│" in line
    }
    assert rows["grid"] == ["4", "2", "1", f"{0.9 * 0.75:.4f}"]
    assert rows["<search>"] == ["1", "1", "1", f"{0.94 * 0.8:.4f}"]
    assert rows["together"] == ["5", "", "2", f"{0.94 * 0.8:.4f}"]
    assert "tflite_bytes 4000" in shown
    page = Path(tmp_path, "out", "pareto.html").read_text()
    assert "\\u003csearch" in page or "&lt;search" in page
    assert "<search" not in page
    assert Path(tmp_path, "out", "pareto.png").stat().st_size > 5000


def test_mistakes_of_the_overlay(store, sweep, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = f"uri={store.settings.uri}"
    for arguments, parts in (
        (["uri=sqlite:///x.db"], ["runs", "none"]),
        (["run=1"], ["runs"]),
        (["runs=1"], ["mlflow.db", "not there"]),
        (["runs=nosuch", uri], ["nosuch", "id of a run"]),
        ([f"runs={sweep.best}", uri], ["finished children"]),
        ([f"runs={sweep.parent},{sweep.parent}", uri], ["twice"]),
        ([f"runs={sweep.parent}", "names=a,b", uri], ["names"]),
        ([f"runs={sweep.parent}", "objectives={a: 1}", uri], ["objectives"]),
        ([f"runs={sweep.parent}", "objectives=[accuracy,joules]", uri], ["joules", "finished runs reports"]),
        ([f"runs={sweep.parent}", "reference=[", uri], ["reference"]),
    ):
        code, _, error = overlay(capsys, *arguments)
        assert code == 2, (arguments, error)
        assert error.startswith("Error in "), error
        assert all(part in error for part in parts), (arguments, error)
    assert not list(tmp_path.iterdir()), "nothing was made"


def test_what_the_readme_says_of_objectives_and_reference_can_be_written():
    settings = compose_config(["tracking.objectives=[accuracy,packed_bytes]", "tracking.reference={accuracy: 80}"])
    assert make_plan(settings).tracking.objectives == ("accuracy", "packed_bytes")
    assert make_plan(settings).tracking.reference == {"accuracy": 80.0}


@pytest.mark.parametrize(
    ("reference", "parts"),
    [({"acuracy": 80.0}, ["reference", "acuracy", "nearest to it: accuracy"]), ({"accuracy": float("nan")}, ["nan"])],
)
def test_a_point_to_count_from_that_is_none_is_refused(reference, parts):
    fronts = read_fronts(["accuracy", "tflite_bytes"], "")
    require_reference({"accuracy": 80.0, "tflite_bytes": 1e5}, fronts, "reference")
    with pytest.raises(CompressError) as caught:
        require_reference(reference, fronts, "reference")
    assert all(part in str(caught.value) for part in parts)
