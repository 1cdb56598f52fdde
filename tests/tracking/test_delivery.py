"""A store that goes away in the middle: what it has not taken is kept, and sent later, once."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException

from compress import deliver as command
from compress.errors import CompressError
from compress.tracking import store as store_module
from compress.tracking.delivery import deliver, end_sweep
from compress.tracking.entries import Metrics, Parameters, RunEnded
from compress.tracking.journal import Journal
from compress.tracking.recorder import open_recorder
from compress.tracking.store import Store, TrackingSettings, connect, start_parent, write_parent
from tests.tracking.runs import SECRET, config_of, finished

BEFORE, AFTER = "before", "after"
UNSENT = Path(".compress_unsent")


class Line:
    """What stands between a client and its store: calls fail as the plan says, before or after they are done."""

    def __init__(self, plan: list[str | None]) -> None:
        self.plan = plan
        self.away = False

    def wrap(self, client: Any) -> Any:
        line = self

        class Client:
            def __getattr__(self, name: str) -> Any:
                real = getattr(client, name)
                return line.call(real) if callable(real) else real

        return Client()

    def call(self, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            fate = BEFORE if self.away else self.plan.pop(0) if self.plan else None
            if fate == BEFORE:
                raise MlflowException("no route to host")
            answer = real(*args, **kwargs)
            if fate == AFTER:
                raise MlflowException("the answer was lost")
            return answer

        return call


@pytest.fixture
def line(monkeypatch) -> Line:
    drawn = Line([])

    def connect_by_it(uri: str, experiment: str) -> Any:
        client, found = connect(uri, experiment)
        return drawn.wrap(client), found

    monkeypatch.setattr(store_module, "connect", connect_by_it)
    monkeypatch.setattr(store_module, "_PAUSE_SECONDS", 0.0)
    return drawn


def record(tracking: TrackingSettings, sweep: Path, folder: Path) -> None:
    report, result = finished(folder, tflite_bytes=2000)
    with open_recorder(tracking, config_of(tracking), sweep, command=[]) as recorder:
        for stage in (result.baseline, *result.stages):
            recorder.stage(stage)
        recorder.finish(report, result, folder)


def begun(tracking: TrackingSettings, folder: Path) -> tuple[Path, str]:
    parent = start_parent(Store(tracking.uri, tracking.experiment), "multirun", ["-m"])
    write_parent(folder, parent)
    return folder, parent


def told(tracking: TrackingSettings, parent: str) -> list[dict[str, Any]]:
    """Return all that the store has of the parent's children, without what differs from one run to the next."""
    client, experiment = connect(tracking.uri, tracking.experiment)
    runs = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    varying = ("record", "serve", "mlflow.parentRunId", "process")
    return [
        {
            "status": run.info.status,
            "metrics": {
                key: Counter((m.step, m.value) for m in client.get_metric_history(run.info.run_id, key))
                for key in run.data.metrics
            },
            "params": run.data.params,
            "tags": {key: value for key, value in run.data.tags.items() if not key.startswith(varying)},
            "files": sorted((f.path, f.file_size) for f in client.list_artifacts(run.info.run_id)),
        }
        for run in runs
    ]


@pytest.fixture(scope="module")
def undisturbed(database, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    here = Path.cwd()
    os.chdir(folder)
    try:
        sweep, parent = begun(database, folder / "sweep")
        record(database, sweep, folder / "run")
    finally:
        os.chdir(here)
    (run,) = told(database, parent)
    return run


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(st.sampled_from([None, None, BEFORE, AFTER]), max_size=40), lasting=st.booleans())
def test_whatever_call_fails_nothing_is_lost_or_doubled(plan, lasting, line, database, undisturbed, tmp_path):
    line.plan = []
    sweep, parent = begun(database, tmp_path / f"sweep{time.monotonic_ns()}")
    line.plan, folder = list(plan), tmp_path / "run"
    record(database, sweep, folder)
    if lasting:
        # The run's own folder may be gone when the store is there again.
        shutil.rmtree(folder)
    line.plan = []
    deliver(UNSENT, Store(database.uri, database.experiment))
    assert told(database, parent) == [undisturbed]
    assert not UNSENT.exists()


def test_a_run_that_starts_and_ends_while_the_store_is_away_is_sent_by_the_next(line, database, undisturbed, tmp_path):
    sweep, parent = begun(database, tmp_path / "sweep")
    line.away = True
    record(database, sweep, tmp_path / "run")
    assert told(database, parent) == []
    (kept,) = UNSENT.glob("*.jsonl")
    assert SECRET not in kept.read_text()
    shutil.rmtree(tmp_path / "run")
    line.away = False
    record(database, tmp_path / "no_sweep", tmp_path / "next")
    assert told(database, parent) == [undisturbed]
    assert not UNSENT.exists()


def test_a_multirun_that_ends_while_the_store_is_away_gets_its_fronts_later(line, database, tmp_path):
    sweep, parent = begun(database, tmp_path / "sweep")
    record(database, sweep, tmp_path / "first")
    line.away = True
    record(database, sweep, tmp_path / "second")
    store = Store(database.uri, database.experiment)
    assert end_sweep(store, parent, database, stopped=False) is None
    client, _ = connect(database.uri, database.experiment)
    assert client.get_run(parent).info.status == "RUNNING"
    line.away = False
    assert deliver(UNSENT, store).runs == 2
    run = client.get_run(parent)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["runs"] == 2
    assert [m.step for m in client.get_metric_history(parent, "hypervolume.tflite_bytes")] == [0]
    assert {item["tags"]["pareto"] for item in told(database, parent)} == {"true"}
    assert deliver(UNSENT, store).runs == 0


def test_the_end_of_a_multirun_waits_for_runs_that_are_not_there_yet(line, database, tmp_path):
    sweep, parent = begun(database, tmp_path / "sweep")
    store = Store(database.uri, database.experiment)
    with open_recorder(database, config_of(database), sweep, command=[]):
        # A job in another process, still at work.
        assert end_sweep(store, parent, database, stopped=False) is None
        assert deliver(UNSENT, store).runs == 0
        client, _ = connect(database.uri, database.experiment)
        assert client.get_run(parent).info.status == "RUNNING"
    assert deliver(UNSENT, store).runs == 1
    assert client.get_run(parent).info.status == "FINISHED"


def test_what_a_killed_process_has_kept_is_sent_and_its_run_closed(outside, database, tmp_path):
    code = (
        "import os, signal; from pathlib import Path; from compress.tracking import store;\n"
        "from compress.tracking.entries import Metrics; from compress.tracking.journal import Journal\n"
        "def away(uri, experiment): raise store.StoreAway('x', expected='', received='', fix='')\n"
        "store.connect = away\n"
        f"journal = Journal.begin(Path('.compress_unsent'), store.Store({database.uri!r}, 'tests'), 'killed', {{}})\n"
        "journal.add(Metrics({'a': 1.0}, 0, 5), Metrics({'a': float('nan')}, 1, 6))\n"
        "open(journal.file, 'a').write('{\"entry\": {\"val')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert outside("-c", code, cwd=tmp_path).returncode == -signal.SIGKILL
    assert deliver(UNSENT, Store(database.uri, database.experiment)).runs == 1
    client, experiment = connect(database.uri, database.experiment)
    (run,) = client.search_runs([experiment], "attributes.run_name = 'killed'")
    assert run.info.status == "KILLED"
    assert [(m.step, m.timestamp) for m in client.get_metric_history(run.info.run_id, "a")] == [(0, 5), (1, 6)]
    assert not UNSENT.exists()


def test_a_store_that_is_away_is_not_asked_again_and_again(line, database, monkeypatch, tmp_path):
    monkeypatch.setattr(store_module, "_PAUSE_SECONDS", 60.0)
    asked = []
    monkeypatch.setattr(store_module, "connect", lambda *_: asked.append(1) or _raise())
    journal = Journal.begin(UNSENT, Store(database.uri, database.experiment), "slow", {})
    for step in range(5):
        journal.add(Metrics({"a": 1.0}, step, 0))
    assert len(asked) == 1
    journal.add(RunEnded("FINISHED", 0))
    assert not journal.close()
    assert len(asked) == 2


def _raise() -> Iterator[None]:
    raise store_module.StoreAway("tracking.uri", expected="", received="", fix="")


def test_what_the_store_refuses_for_good_is_an_error_and_the_rest_is_sent(database, tmp_path):
    sweep, parent = begun(database, tmp_path / "sweep")
    record(database, sweep, tmp_path / "first")
    recording = open_recorder(database, config_of(database), sweep, command=[])
    recorder = recording.__enter__()
    client, experiment = connect(database.uri, database.experiment)
    (child,) = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}' and status = 'RUNNING'")
    # MLflow does not take another value for a parameter that it has.
    recorder._journal.add(Parameters({"seed": "another"}))
    with pytest.raises(CompressError, match="takes what is reported"):
        recording.__exit__(None, None, None)
    assert client.get_run(child.info.run_id).info.status == "FINISHED"
    assert not UNSENT.exists()
    store = Store(database.uri, database.experiment)
    summary = end_sweep(store, parent, database, stopped=False)
    assert summary is not None
    assert len(summary.points) == 1


def test_settings_whose_names_mlflow_does_not_take_are_escaped(database, tmp_path):
    sweep, parent = begun(database, tmp_path / "sweep")
    config = {**config_of(database), "strategy": {"quantize": {"layer_bits": {"d.*": 8, "/a": 4, "x" * 300: 2}}}}
    with open_recorder(database, config, sweep, command=[]):
        pass
    (run,) = told(database, parent)
    assert run["params"]["strategy.quantize.layer_bits.d.:2a:"] == "8"
    assert run["params"]["strategy.quantize.layer_bits.:2f:a"] == "4"


def test_an_error_that_is_not_the_stores_is_not_taken_for_its_being_away(database, monkeypatch, tmp_path):
    _, parent = begun(database, tmp_path / "sweep")
    store = Store(database.uri, database.experiment)

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr("compress.tracking.delivery.finish_sweep", broken)
    with pytest.raises(KeyError, match="a defect"):
        end_sweep(store, parent, database, stopped=False)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert deliver(UNSENT, store).runs == 1, "the end of the multirun was written down before"
    client, _ = connect(database.uri, database.experiment)
    assert client.get_run(parent).info.status == "FINISHED"


def test_the_end_of_a_multirun_is_sent_last_whatever_the_clock_said(line, database, monkeypatch, tmp_path):
    sweep, parent = begun(database, tmp_path / "sweep")
    line.away = True
    record(database, sweep, tmp_path / "run")
    monkeypatch.setattr("compress.tracking.journal.now", lambda: 5)
    store = Store(database.uri, database.experiment)
    assert end_sweep(store, parent, database, stopped=False) is None
    line.away = False
    assert deliver(UNSENT, store).runs == 2
    client, _ = connect(database.uri, database.experiment)
    assert client.get_run(parent).data.metrics["runs"] == 1


def test_an_answer_that_the_network_loses_makes_no_second_run(tmp_path):
    """The HTTP client below MLflow's would ask again by itself, where nobody looks for the run first."""
    asked: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.answer({"experiment": {"experiment_id": "1", "name": "tests", "lifecycle_stage": "active"}})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append(self.path.rpartition("/mlflow/")[2])
            run = {"info": {"run_id": "made", "experiment_id": "1", "lifecycle_stage": "active"}, "data": {}}
            if asked == ["runs/create"]:
                self.connection.shutdown(socket.SHUT_RDWR)
            elif self.path.endswith("search"):
                self.answer({"runs": [run]})
            else:
                self.answer({"run": run})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    journal = Journal.begin(UNSENT, Store(f"http://127.0.0.1:{server.server_port}", "tests"), "name", {})
    journal.add(Metrics({"a": 1.0}, 0, 1), RunEnded("FINISHED", 2))
    assert journal.close()
    server.shutdown()
    assert journal.run == "made"
    assert asked.count("runs/create") == 1
    assert asked.count("runs/log-batch") == 1


@pytest.fixture
def out_of_reach(database, tmp_path) -> TrackingSettings:
    """An experiment whose folder of files cannot be written, as that of another user."""
    client, _ = connect(database.uri, database.experiment)
    (tmp_path / "file").touch()
    name = f"elsewhere {tmp_path.name}"
    client.create_experiment(name, artifact_location=f"{tmp_path}/file/folder")
    return dataclasses.replace(database, experiment=name)


def test_a_folder_of_files_that_cannot_be_written_is_told_and_others_are_sent(out_of_reach, database, tmp_path):
    sweep, _ = begun(out_of_reach, tmp_path / "sweep")
    with pytest.raises(CompressError, match=r"tracking\.experiment=") as caught:
        record(out_of_reach, sweep, tmp_path / "run")
    assert str(tmp_path / "file") in caught.value.received
    assert len(list(UNSENT.glob("*.jsonl"))) == 1, "it is kept"
    Journal.begin(UNSENT, Store(database.uri, database.experiment), "whole", {}).keep()
    done = deliver(UNSENT, Store(database.uri, database.experiment))
    assert (done.runs, len(done.kept), len(done.problems)) == (1, 1, 1)


def test_a_multirun_whose_files_cannot_be_written_ends_with_an_error(out_of_reach, cli, tmp_path):
    store = [f"tracking.uri={out_of_reach.uri}", f"tracking.experiment='{out_of_reach.experiment}'"]
    jobs = [
        "-m",
        "strategy=prune,share",
        "recovery=none",
        "model.train.epochs=0",
        "data.test_limit=50",
        "board=roofline",
    ]
    code, _, error = cli(*jobs, *store, "hydra.sweep.dir=sweep")
    assert code == 2
    assert str(tmp_path / "file") in " ".join(error.split()).replace(" ", "")
    assert "Traceback" not in error


def test_what_killed_processes_leave_beside_their_files_is_removed(database):
    UNSENT.mkdir()
    (UNSENT / "a.jsonl.lock").touch()
    (UNSENT / "a").mkdir()
    (UNSENT / "b.jsonl").touch()
    (UNSENT / "b.jsonl.lock").touch()
    (UNSENT / "c.jsonl.lock").touch()
    (UNSENT / ".c.jsonl.partial").touch()
    assert deliver(UNSENT, Store(database.uri, database.experiment)).problems == ()
    assert not UNSENT.exists()


def test_a_folder_in_which_nothing_can_be_kept_is_refused_before_a_run_is_made(database, tmp_path):
    (tmp_path / "file").touch()
    own = dataclasses.replace(database, unsent=str(tmp_path / "file"))
    client, experiment = connect(database.uri, database.experiment)
    before = len(client.search_runs([experiment]))
    with pytest.raises(CompressError, match=r"tracking\.unsent"), open_recorder(own, config_of(own), None, command=[]):
        pass
    assert len(client.search_runs([experiment])) == before


@pytest.mark.parametrize("content", ["[]\n", "no json\n", '{"start": {"version": 9}}\n', '{"start": 1}\n{}\n'])
def test_a_damaged_file_is_told_and_the_others_are_sent(content, database, capsys, tmp_path):
    UNSENT.mkdir()
    (UNSENT / "0.jsonl").write_text(content)
    journal = Journal.begin(UNSENT, Store(database.uri, database.experiment), "whole", {})
    journal.keep()
    with pytest.raises(SystemExit) as exited:
        command.main([f"uri={database.uri}"])
    assert exited.value.code == 2
    shown = capsys.readouterr()
    assert "sent: 1 run; kept: 1" in shown.out
    assert "0.jsonl" in shown.err
    assert [file.name for file in UNSENT.iterdir()] == ["0.jsonl"]


def test_what_is_meant_for_another_store_is_left_alone_and_told(database, capsys, tmp_path):
    journal = Journal.begin(UNSENT, Store("sqlite:///other.db", "tests"), "other", {})
    journal.keep()
    with pytest.raises(SystemExit) as exited:
        command.main([f"uri={database.uri}"])
    assert exited.value.code == 2
    assert f"1 for sqlite:///{tmp_path}/other.db" in capsys.readouterr().out
    # The same store, written in another way.
    assert deliver(UNSENT, Store("sqlite:///./other.db", "tests")).runs == 1


@pytest.mark.parametrize(
    ("words", "part"),
    [(["ury=x"], "uri"), (["folder=none_here"], "tracking.unsent"), (["uri=sqlite:///none.db"], "not there")],
)
def test_wrong_words_are_explained(words, part, capsys):
    with pytest.raises(SystemExit) as exited:
        command.main(words)
    assert exited.value.code == 2
    assert part in " ".join(capsys.readouterr().err.split())
