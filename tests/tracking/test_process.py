"""Whether the process of a run is still at work: said only where it is sure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.tracking.process import has_ended, process_tags
from compress.tracking.store import close_orphans, connect

CODE = "import json; from compress.tracking.process import process_tags; print(json.dumps(process_tags()))"


@pytest.fixture(scope="module")
def ended() -> dict[str, str]:
    """The tags of a process that has ended."""
    import subprocess
    import sys

    from tests.conftest import REPOSITORY

    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(REPOSITORY)}
    )
    return json.loads(done.stdout)


def test_a_process_that_is_there_has_not_ended_and_one_that_is_gone_has(ended):
    assert not has_ended(process_tags())
    assert has_ended(ended)


def test_a_number_that_another_process_has_now_is_not_taken_for_the_old_one():
    assert has_ended({**process_tags(), "process.started": "1"})


@pytest.mark.parametrize("key", ["process.machine", "process.space", "process.id"])
def test_what_cannot_be_known_is_not_said(key, ended):
    assert not has_ended({**ended, key: "another"})
    assert not has_ended({k: v for k, v in ended.items() if k != key})
    assert not has_ended({})


def test_after_a_restart_of_the_machine_everything_before_has_ended(ended):
    known = Path("/etc/machine-id").is_file()
    assert has_ended({**process_tags(), "process.boot": "before"}) is known


def test_runs_that_a_killed_process_has_left_are_closed_and_others_are_not(ended, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    client, experiment = connect(f"sqlite:///{tmp_path}/runs.db", "tests")
    tags = {"orphan": ended, "mine": process_tags(), "foreign": {**ended, "process.machine": "x"}, "untagged": {}}
    runs = {name: client.create_run(experiment, tags=own).info.run_id for name, own in tags.items()}
    assert close_orphans(client, experiment) == 1
    status = {name: client.get_run(run).info.status for name, run in runs.items()}
    assert status == {"orphan": "KILLED", "mine": "RUNNING", "foreign": "RUNNING", "untagged": "RUNNING"}
