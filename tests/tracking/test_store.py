"""MLflow: what is written is found again; a password never is."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.candidate import Numbers
from compress.errors import CompressError
from compress.tracking.recorder import NoRecorder, metrics_of, open_recorder
from compress.tracking.store import (
    Store,
    TrackingSettings,
    connect,
    flatten,
    read_parent,
    redacted,
    start_parent,
    without_password,
    write_parent,
)
from tests.tracking.runs import NUMBERS, SECRET, config_of, finished

KEYS = st.text("abcxyz_0", min_size=1, max_size=4)
LEAVES = st.integers() | st.text("ab.", max_size=3) | st.none() | st.lists(st.integers(), max_size=2) | st.just({})
TREES = st.dictionaries(KEYS, st.recursive(LEAVES, lambda inner: st.dictionaries(KEYS, inner, max_size=3)), max_size=4)


def unflattened(flat: dict) -> dict:
    tree: dict = {}
    for key, value in flat.items():
        place = tree
        *path, last = key.split(".")
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return tree


@given(TREES)
def test_flattening_loses_nothing(tree):
    flat = flatten(tree)
    assert unflattened(flat) == tree
    assert not any(isinstance(value, dict) and value for value in flat.values())


def test_flattening_by_hand():
    assert flatten({"a": {"b": {"c": 1}, "d": {}}, "e": [1, {"f": 2}]}) == {"a.b.c": 1, "a.d": {}, "e": [1, {"f": 2}]}


@pytest.mark.parametrize(
    ("given_text", "shown"),
    [
        (f"https://me:{SECRET}@mlflow.example/path?x=1", "https://***@mlflow.example/path?x=1"),
        (f"mysql+pymysql://me:{SECRET}@db:3306/runs", "mysql+pymysql://***@db:3306/runs"),
        (f"https://{SECRET}@mlflow.example", "https://***@mlflow.example"),
        (f"postgresql://db/runs?user=me&password={SECRET}&x=1", "postgresql://db/runs?user=me&password=***&x=1"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("http://localhost:5000", "http://localhost:5000"),
        ("me@example.org wrote ://nothing", "me@example.org wrote ://nothing"),
        (f"could not connect to https://me:{SECRET}@a or http://b", "could not connect to https://***@a or http://b"),
    ],
)
def test_a_password_in_a_uri_is_blanked(given_text, shown):
    assert without_password(given_text) == shown


@pytest.mark.parametrize("password", [f"pa/{SECRET}", f"p@{SECRET}", f"{SECRET}/x"])
def test_a_password_with_a_slash_or_an_at_sign_is_blanked(password):
    assert SECRET not in without_password(f"postgresql://me:{password}@db.example/runs")


def test_passwords_are_blanked_wherever_they_stand_and_nothing_else_changes():
    uri = f"https://me:{SECRET}@mlflow.example"
    config = {"seed": 0, "tracking": {"uri": uri, "list": [uri, 1, {"deep": uri}]}, "none": None, "ratio": 0.5}
    before = json.dumps(config)
    clean = redacted(config)
    assert SECRET not in json.dumps(clean)
    assert clean["seed"] == 0
    assert clean["none"] is None
    assert clean["tracking"]["list"][1:] == [1, {"deep": "https://***@mlflow.example"}]
    assert json.dumps(config) == before


def test_numbers_as_metrics():
    metrics = metrics_of(NUMBERS)
    assert metrics["accuracy_gap"] == pytest.approx(-0.5)
    assert (metrics["latency_p50"], metrics["latency_mean"]) == (1.0, 1.5)
    assert "packed_bytes" not in metrics
    assert all(isinstance(value, float) for value in metrics.values())
    unmeasured = Numbers(**{**vars(NUMBERS), "latency_ms": None, "latency_failure": "crash", "packed_bytes": 7})
    assert not [key for key in metrics_of(unmeasured) if key.startswith("latency")]
    assert metrics_of(unmeasured)["packed_bytes"] == 7.0
    assert "relative_latency" not in metrics
    assert metrics_of(Numbers(**{**vars(NUMBERS), "speedup": 4.0}))["relative_latency"] == 0.25


def test_a_run_is_found_again(database, tmp_path):
    report, result = finished(tmp_path / "out", tflite_bytes=2000)
    with open_recorder(database, config_of(database), None, command=["strategy=prune"]) as recorder:
        for stage in (result.baseline, *result.stages):
            recorder.stage(stage)
        recorder.finish(report, result, tmp_path / "out")
    client, experiment = connect(database.uri, database.experiment)
    runs = client.search_runs([experiment])
    (child,) = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert {child.info.status, parent.info.status} == {"FINISHED"}
    assert "strategy=prune" in parent.data.tags["command"]
    assert (parent.info.run_name, child.info.run_name) == ("run", "prune")
    assert child.data.params["strategy.prune.sparsity"] == "0.5"
    assert child.data.params["seed"] == "0"
    assert SECRET not in json.dumps({**child.data.params, **child.data.tags, **parent.data.tags})
    metrics = child.data.metrics
    assert (metrics["baseline.tflite_bytes"], metrics["prune.tflite_bytes"]) == (4000, 2000)
    assert (metrics["ratio.tflite_bytes"], metrics["prune.seconds"]) == (2.0, 2.5)
    assert (metrics["stages_made"], metrics["stages_cached"]) == (2, 0)
    history = client.get_metric_history(child.info.run_id, "tflite_bytes")
    assert [(m.step, m.value) for m in history] == [(0, 4000), (1, 2000)]
    files = {item.path for item in client.list_artifacts(child.info.run_id)}
    assert {"config.yaml", "report.json", "model.tflite", "model.cmp", "layers.png"} <= files
    config = Path(client.download_artifacts(child.info.run_id, "config.yaml", str(tmp_path))).read_text()
    assert SECRET not in config
    assert "sparsity: 0.5" in config


@pytest.mark.parametrize(("error", "status"), [(CompressError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_run_that_ends_early_is_closed_as_such(error, status, database):
    raised = error("x", expected="", received="", fix="") if error is CompressError else error()
    client, experiment = connect(database.uri, database.experiment)
    before = {run.info.run_id for run in client.search_runs([experiment])}
    with pytest.raises(error), open_recorder(database, config_of(database), None, command=[]):
        raise raised
    added = [run for run in client.search_runs([experiment]) if run.info.run_id not in before]
    assert [run.info.status for run in added] == [status, status]


def test_the_runs_of_a_multirun_hang_under_its_parent(database, tmp_path):
    client, experiment = connect(database.uri, database.experiment)
    sweep = tmp_path / "sweep"
    assert read_parent(sweep) is None
    parent = start_parent(Store(database.uri, database.experiment), "multirun", ["-m"])
    write_parent(sweep, parent)
    assert read_parent(sweep) == parent
    overrides = ["strategy=prune", f"hydra.x=https://me:{SECRET}@server"]
    with open_recorder(database, config_of(database), sweep, command=[], overrides=overrides):
        assert client.get_run(parent).info.status == "RUNNING"
    (child,) = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert json.loads(child.data.tags["overrides"]) == ["strategy=prune", "hydra.x=https://***@server"]
    assert client.get_run(parent).info.status == "RUNNING", "the multirun closes it, not the job"


def test_nothing_is_recorded_without_tracking(tmp_path):
    with open_recorder(TrackingSettings(False, "", "compress"), {"seed": 0}, None, command=[]) as recorder:
        assert isinstance(recorder, NoRecorder)
    assert not list(tmp_path.iterdir())


def test_a_store_that_does_not_answer_is_an_error_without_the_password():
    with pytest.raises(CompressError) as caught:
        connect(f"http://me:{SECRET}@127.0.0.1:1", "tests")
    assert caught.value.where == "tracking.uri"
    assert SECRET not in str(caught.value)


def test_two_first_runs_at_once_share_a_store(outside, tmp_path):
    """Both make the tables of a new SQLite file; the later one waits for them."""
    code = (
        f"from compress.tracking.store import connect; connect('sqlite:///{tmp_path}/runs.db', 'tests'); print('there')"
    )
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: outside("-c", code), range(2)))
    assert [answer.stdout.strip() for answer in answers] == ["there", "there"], answers[0].stderr + answers[1].stderr


def test_a_first_run_that_is_killed_leaves_no_half_made_store(tmp_path, monkeypatch):
    """MLflow refuses a SQLite file for ever in which only some of its tables were made."""
    from mlflow.store.db import utils

    uri, whole = f"sqlite:///{tmp_path}/runs.db", utils._upgrade_db

    def killed(engine) -> None:
        whole(engine)
        raise KeyboardInterrupt

    monkeypatch.setattr(utils, "_upgrade_db", killed)
    with pytest.raises(KeyboardInterrupt):
        connect(uri, "tests")
    assert not (tmp_path / "runs.db").exists()
    (tmp_path / ".runs.db.0.partial").write_bytes(b"half of a database")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    _, experiment = connect(uri, "tests")
    assert experiment
    assert not list(tmp_path.glob(".*partial*"))
