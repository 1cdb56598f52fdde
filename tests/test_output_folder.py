"""One command at a time in an output folder, and nothing left of the lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from compress.errors import CompressError
from compress.pipeline.folder import LOCK, alone_in
from tests.conftest import QUICK, REPOSITORY

HOLD = """
import sys, time
from pathlib import Path
from compress.pipeline.folder import alone_in
with alone_in(Path(sys.argv[1]), "hydra.run.dir"):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def another_command(folder: Path):
    """Hold the folder as another process does."""
    folder.mkdir(exist_ok=True)
    with FileLock(folder / LOCK):
        yield
    (folder / LOCK).unlink(missing_ok=True)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_the_second_is_refused_and_nothing_stays(tmp_path):
    folder = tmp_path / "out"
    with another_command(folder):
        with pytest.raises(CompressError, match="out: expected a folder that no other command is working in"):
            alone_in(folder, "hydra.run.dir").__enter__()
        (folder / "report.json").write_text("{}")
    with alone_in(folder, "hydra.run.dir"):
        pass
    assert names(folder) == ["report.json"]


def test_a_command_may_take_its_folder_twice(tmp_path):
    with alone_in(tmp_path, "hydra.run.dir"):
        with alone_in(tmp_path, "hydra.run.dir"):
            pass
        assert names(tmp_path) == [LOCK]
        with pytest.raises(Timeout):
            FileLock(tmp_path / LOCK, timeout=0).acquire()
    assert names(tmp_path) == []


@pytest.mark.parametrize("again", ["link", "other/../out", "./out"])
def test_a_folder_is_the_same_under_another_name(tmp_path, monkeypatch, again):
    monkeypatch.chdir(tmp_path)
    for name in ("out", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with alone_in(tmp_path / "out", "hydra.run.dir"), alone_in(Path(again), "hydra.run.dir"):
        assert names(tmp_path / "out") == [LOCK]


def test_a_folder_that_was_made_for_nothing_goes(tmp_path):
    with alone_in(tmp_path / "out", "hydra.run.dir"):
        pass
    assert names(tmp_path) == []


def test_a_killed_command_does_not_block_the_folder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(CompressError):
        alone_in(tmp_path, "hydra.run.dir").__enter__()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with alone_in(tmp_path, "hydra.run.dir"):
        pass
    assert names(tmp_path) == []


def test_a_run_in_a_folder_in_use_changes_nothing_there(cli, tmp_path):
    with another_command(tmp_path / "out"):
        before = names(tmp_path / "out")
        code, _, error = cli("strategy=none", "hydra.run.dir=out", *QUICK)
        assert code == 2, error
        said = " ".join(error.split())
        assert "Error in hydra.run.dir, out: expected a folder that no other command is working in" in said
        assert names(tmp_path / "out") == before
    code, _, error = cli("strategy=none", "hydra.run.dir=out", *QUICK)
    assert code == 0, error
    assert not [name for name in names(tmp_path / "out") if name.endswith(".lock")]


def test_a_multirun_in_a_folder_in_use_changes_nothing_there(cli, tmp_path):
    (tmp_path / "swept" / "0").mkdir(parents=True)
    (tmp_path / "swept" / "0" / "failure.json").write_text("the first's")
    with another_command(tmp_path / "swept"):
        before = names(tmp_path / "swept")
        code, _, error = cli("-m", "strategy=none", "hydra.sweep.dir=swept", *QUICK)
        assert code == 2, error
        assert "Error in hydra.sweep.dir, swept: expected a folder" in " ".join(error.split())
        assert names(tmp_path / "swept") == before
        assert (tmp_path / "swept" / "0" / "failure.json").read_text() == "the first's"
    code, _, error = cli("-m", "strategy=none", "hydra.sweep.dir=swept", *QUICK)
    assert code == 0, error
    assert (tmp_path / "swept" / "0" / "report.json").is_file()
    assert not [*(tmp_path / "swept").rglob("*.lock")]


def test_a_job_that_is_called_directly_is_refused(tmp_path):
    from compress.cli.compose import compose_config
    from compress.cli.job import run_job

    with another_command(tmp_path), pytest.raises(CompressError, match="no other command"):
        run_job(compose_config(["strategy=none", "tracking=none", *QUICK]), tmp_path, None)


def test_a_command_has_its_folder_before_it_writes_there(tmp_path):
    # Without TensorFlow yet: the second command comes while the first imports it.
    first, second = (
        [sys.executable, "-m", "compress.run", "strategy=none", "tracking=none", "hydra.run.dir=out", f"seed={seed}"]
        for seed in (1, 2)
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([*first, *QUICK], cwd=tmp_path, env=environment)
    while not (tmp_path / "out" / LOCK).exists():
        assert process.poll() is None
        time.sleep(0.01)
    refused = subprocess.run([*second, *QUICK], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2, refused.stderr
    assert process.wait() == 0
    assert "seed=1" in (tmp_path / "out" / ".hydra" / "overrides.yaml").read_text()
    assert LOCK not in names(tmp_path / "out")
