"""One command at a time in an output folder, and nothing left of the lock."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from compress.errors import CompressError
from compress.pipeline.folder import alone_in, refuse_used
from tests.conftest import QUICK, REPOSITORY

HOLD = """
import sys, time
from pathlib import Path
from compress.pipeline.folder import alone_in
with alone_in(Path(sys.argv[1]), "hydra.run.dir"):
    print("held", flush=True)
    time.sleep(600)
"""


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_the_second_is_refused_and_nothing_stays(tmp_path):
    folder = tmp_path / "out"
    with alone_in(folder, "hydra.run.dir"):
        for take in (lambda: alone_in(folder, "hydra.run.dir").__enter__(), lambda: refuse_used(folder, "x")):
            with pytest.raises(CompressError, match="out: expected a folder that no other command is working in"):
                take()
        (folder / "report.json").write_text("{}")
    assert names(folder) == ["report.json"]
    refuse_used(folder, "hydra.run.dir")
    refuse_used(tmp_path / "nowhere", "hydra.run.dir")
    assert names(tmp_path) == ["out"]


def test_a_folder_that_was_made_for_nothing_goes(tmp_path):
    with alone_in(tmp_path / "out", "hydra.run.dir"):
        pass
    assert names(tmp_path) == []


def test_a_killed_command_does_not_block_the_folder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(CompressError):
        refuse_used(tmp_path, "hydra.run.dir")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with alone_in(tmp_path, "hydra.run.dir"):
        pass
    assert names(tmp_path) == []


def test_a_run_in_a_folder_in_use_changes_nothing_there(cli, tmp_path):
    with alone_in(tmp_path / "out", "hydra.run.dir"):
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
    with alone_in(tmp_path / "swept", "hydra.sweep.dir"):
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

    with alone_in(tmp_path, "hydra.run.dir"), pytest.raises(CompressError, match="no other command"):
        run_job(compose_config(["strategy=none", "tracking=none", *QUICK]), tmp_path, None)
