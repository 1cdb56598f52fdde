"""What docs/runs.md says to a team: an MLflow server on PostgreSQL, a folder for artifacts, killed in the middle."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from compress import deliver as command
from compress.tracking.delivery import end_sweep
from compress.tracking.recorder import open_recorder
from compress.tracking.store import Store, TrackingSettings, connect, start_parent, write_parent
from tests.tracking.runs import config_of, finished

_SECONDS = 240.0


def programs() -> Path | None:
    """Return the folder of PostgreSQL's programs, None where it is not installed."""
    found = shutil.which("initdb")
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    places = [Path(found).resolve()] if found else installed[-1:]
    return places[0].parent if places else None


pytestmark = pytest.mark.skipif(programs() is None, reason="PostgreSQL is not installed")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(ready: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + _SECONDS
    while not ready():
        assert time.monotonic() < end, f"{what} does not answer"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """The URI of an empty database."""
    places = programs()
    assert places is not None
    # PostgreSQL refuses to be run by root, whose folders for tests nobody else can enter.
    account: dict[str, Any] = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="compress-") as work:
        if account:
            shutil.chown(work, **account)
        yield from serve_database(Path(work), places, account)


def serve_database(folder: Path, places: Path, account: dict[str, Any]) -> Iterator[str]:
    data = folder / "data"
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "cwd": folder, **account}
    subprocess.run(
        [str(places / "initdb"), "-D", str(data), "-U", "compress", "-A", "trust", "--no-sync"], check=True, **quiet
    )
    port = free_port()
    server = subprocess.Popen(
        [str(places / "postgres"), "-D", str(data), "-p", str(port), "-h", "127.0.0.1", "-k", str(folder), "-F"],
        stderr=subprocess.DEVNULL,
        **quiet,
    )
    check = [str(places / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
    try:
        wait_for(lambda: subprocess.run(check, check=False).returncode == 0, "PostgreSQL")
        yield f"postgresql+psycopg://compress@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)


@dataclass
class Server:
    """An MLflow server that can be killed and started again."""

    database: str
    artifacts: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
                *("--backend-store-uri", self.database, "--artifacts-destination", str(self.artifacts)),
                *("--workers", "1"),
            ],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )
        wait_for(self._answers, "the MLflow server")

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, "the MLflow server has ended"
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


@pytest.fixture(scope="module")
def server(postgresql, tmp_path_factory) -> Iterator[Server]:
    made = Server(postgresql, tmp_path_factory.mktemp("artifacts"))
    made.start()
    yield made
    made.kill()


def test_a_server_killed_in_the_middle_of_a_sweep_has_all_of_it_in_the_end(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tracking = TrackingSettings(True, server.uri, "team")
    store, sweep = Store(server.uri, "team"), tmp_path / "sweep"
    parent = start_parent(store, "multirun", ["-m"])
    write_parent(sweep, parent)

    def record(name: str, between: Sequence[Callable[[], None]] = ()) -> None:
        report, result = finished(tmp_path / name, tflite_bytes=2000)
        with open_recorder(tracking, config_of(tracking), sweep, command=[]) as recorder:
            recorder.stage(result.baseline)
            for happens in between:
                happens()
            for stage in result.stages:
                recorder.stage(stage)
            recorder.finish(report, result, tmp_path / name)

    record("whole")
    record("cut", [server.kill])
    assert end_sweep(store, parent, tracking, stopped=False) is None
    assert len(list(tmp_path.glob(".compress_unsent/*.jsonl"))) == 2
    server.start()
    with pytest.raises(SystemExit) as exited:
        command.main([f"uri={server.uri}"])
    assert exited.value.code == 0
    assert "sent: 2 runs; kept: 0" in capsys.readouterr().out

    client, experiment = connect(server.uri, "team")
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert len(children) == 2
    first, second = (
        {
            "status": run.info.status,
            "params": run.data.params,
            "pareto": run.data.tags["pareto"],
            "files": sorted((f.path, f.file_size) for f in client.list_artifacts(run.info.run_id)),
            "metrics": {
                key: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
                for key in run.data.metrics
            },
        }
        for run in children
    )
    assert first == second
    assert first["metrics"]["tflite_bytes"] == [(0, 4000.0), (1, 2000.0)]
    assert client.get_run(parent).info.status == "FINISHED"
    assert {f.path for f in client.list_artifacts(parent)} == {"pareto.html", "pareto.png"}
    assert any(server.artifacts.rglob("model.tflite"))
