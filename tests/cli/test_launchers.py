"""Multiruns on several processes: nothing is made twice, what fails does not stop the rest, and is told at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from compress.cli.errors import guarded
from compress.cli.threads import worker_threads
from tests.conftest import REPOSITORY

TINY = ("recovery.epochs=1", "board.runs=100", "board.warmup=1", "board.precision=null", "model.train.epochs=2")
CRASHING = '''
import os
from pydantic.dataclasses import dataclass
from compress.candidate import Candidate
from compress.strategies.strategy import STRICT, Context, Strategy

@dataclass(frozen=True, config=STRICT)
class Crash(Strategy):
    """Ends as a defect of the program would."""

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        raise RuntimeError("a defect <of the program>")

@dataclass(frozen=True, config=STRICT)
class Die(Strategy):
    """Ends as a process that the operating system has killed."""

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        os._exit(9)
'''


def user_folder(folder: Path) -> None:
    (folder / "conf" / "strategy").mkdir(parents=True)
    (folder / "conf" / "strategy" / "crash.yaml").write_text("_target_: crashing.Crash\n")
    (folder / "conf" / "strategy" / "die.yaml").write_text("_target_: crashing.Die\n")
    (folder / "crashing.py").write_text(CRASHING)


@dataclass(frozen=True)
class Sweep:
    folder: Path
    code: int
    error: str

    def log(self, job: int) -> str:
        return (self.folder / "sweep" / str(job) / "run.log").read_text()

    def report(self, job: int) -> dict:
        return json.loads((self.folder / "sweep" / str(job) / "report.json").read_text())


def run_sweep(folder: Path, *arguments: str) -> Sweep:
    user_folder(folder)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(folder)])}
    command = [sys.executable, "-m", "compress.run", "-m", "--config-dir", "conf", *TINY, "hydra.sweep.dir=sweep"]
    done = subprocess.run(
        [*command, f"tracking.uri=sqlite:///{folder}/runs.db", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return Sweep(folder, done.returncode, done.stderr)


@pytest.fixture(scope="module")
def joblib_sweep(tmp_path_factory) -> Sweep:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    return run_sweep(
        tmp_path_factory.mktemp("joblib"),
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        "strategy=lowrank+crash,lowrank+prune,lowrank+share,lowrank",
    )


def test_the_rest_of_a_sweep_on_two_processes_goes_on_after_a_crash(joblib_sweep):
    assert joblib_sweep.code == 1, joblib_sweep.error
    assert [joblib_sweep.report(job)["strategy"] for job in (1, 2, 3)] == ["lowrank+prune", "lowrank+share", "lowrank"]
    assert not (joblib_sweep.folder / "sweep" / "0" / "report.json").exists()
    told = [line for line in joblib_sweep.error.splitlines() if line.startswith("#")]
    (line,) = told
    assert line.startswith("#0 ")
    assert "strategy=lowrank+crash" in line
    assert "RuntimeError: a defect <of the program>" in line
    assert "1 of the jobs failed" in joblib_sweep.error
    assert "Traceback" in joblib_sweep.log(0)


def test_two_processes_never_make_the_same_stage(joblib_sweep):
    logs = [joblib_sweep.log(job) for job in range(4)]
    for stage in ("baseline", "lowrank"):
        assert sum(log.count(f"{stage}: running") for log in logs) == 1
        assert sum(log.count(f"{stage}: taken from the cache") for log in logs) == 3
    assert len({json.dumps(joblib_sweep.report(job)["stages"][0]["accuracy"]) for job in (1, 2, 3)}) == 1


def test_the_runs_of_a_crashed_job_are_closed_as_failed(joblib_sweep):
    client = MlflowClient(f"sqlite:///{joblib_sweep.folder}/runs.db")
    runs = client.search_runs([client.get_experiment_by_name("compress").experiment_id])
    by_name = {run.info.run_name: run for run in runs}
    assert {name: run.info.status for name, run in by_name.items()} == {
        "multirun": "FAILED",
        "lowrank+crash": "FAILED",
        "lowrank+prune": "FINISHED",
        "lowrank+share": "FINISHED",
        "lowrank": "FINISHED",
    }
    parent = by_name["multirun"].info.run_id
    assert {run.data.tags.get("mlflow.parentRunId") for name, run in by_name.items() if name != "multirun"} == {parent}
    counts = by_name["multirun"].data.metrics
    # Finished runs alone count: the baseline and lowrank are made once, by one of them or by the one that crashed.
    assert counts["runs"] == 3
    assert counts["stages_made"] + counts["stages_cached"] == 8
    assert counts["stages_cached"] >= 4
    pids = {run.data.tags["process.id"] for run in runs}
    assert len(pids) >= 2, "the jobs ran in processes of their own"


def test_the_rest_of_a_serial_sweep_goes_on_after_a_crash(cli, tmp_path, monkeypatch):
    user_folder(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    code, _, error = cli(
        *("-m", "--config-dir", str(tmp_path / "conf"), "strategy=crash,prune"),
        *("recovery.epochs=1", f"hydra.sweep.dir={tmp_path}/sweep", f"tracking.uri=sqlite:///{tmp_path}/runs.db"),
    )
    assert code == 1, error
    assert (tmp_path / "sweep" / "1" / "report.json").is_file()
    (line,) = [line for line in error.splitlines() if line.startswith("#")]
    assert "#0 strategy=crash" in line
    assert "RuntimeError" in line
    client = MlflowClient(f"sqlite:///{tmp_path}/runs.db")
    runs = client.search_runs([client.get_experiment_by_name("compress").experiment_id])
    assert {run.info.run_name: run.info.status for run in runs} == {
        "multirun": "FAILED",
        "crash": "FAILED",
        "prune": "FINISHED",
    }


def test_the_rest_of_a_sweep_goes_on_after_a_process_has_died(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    sweep = run_sweep(
        tmp_path,
        *("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "strategy=die,none,quantize"),
        *("recovery=none", "model.train.epochs=1"),
    )
    assert sweep.code == 1, sweep.error
    assert [sweep.report(job)["strategy"] for job in (1, 2)] == ["none", "quantize"]
    (line,) = [line for line in sweep.error.splitlines() if line.startswith("#")]
    assert line.startswith("#0 ")
    assert "strategy=die" in line
    assert "crashed: TerminatedWorkerError" in line
    assert "EXIT(9)" in line
    assert "deprecated" not in sweep.error


@pytest.mark.parametrize(
    ("launcher", "threads"),
    [
        ({"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}, None),
        ({"_target_": "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher", "n_jobs": 4}, 2),
        ({"_target_": "x.JoblibLauncher", "n_jobs": 3}, 2),
        ({"_target_": "x.JoblibLauncher", "n_jobs": 16}, 1),
        ({"_target_": "x.JoblibLauncher", "n_jobs": -1}, 1),
        ({"_target_": "x.JoblibLauncher", "n_jobs": -7}, 4),
        ({"_target_": "x.JoblibLauncher", "n_jobs": 1}, 8),
        ({"_target_": "x.SlurmLauncher", "cpus_per_task": 5}, 5),
        ({"_target_": "x.LocalLauncher", "cpus_per_task": None}, None),
        ({"_target_": "x.RayLauncher", "ray": {"init": {}, "remote": {"num_cpus": 3}}}, 3),
        ({"_target_": "x.RayLauncher", "ray": {"init": {}, "remote": {}}}, 1),
    ],
    ids=lambda value: str(value)[-60:],
)
def test_cores_are_divided_between_the_jobs(launcher, threads):
    assert worker_threads(launcher, 8) == threads


@pytest.mark.parametrize(
    ("choice", "extra"),
    [("joblib", "joblib"), ("submitit_local", "submitit"), ("submitit_slurm", "submitit"), ("ray", "ray")],
)
def test_a_launcher_that_is_not_installed_names_the_extra(choice, extra, outside, tmp_path):
    # A package with the project's plugins alone hides those that are installed here.
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "__init__.py").write_text(f"__path__ = [{str(REPOSITORY / 'hydra_plugins')!r}]\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        f"from compress.run import main; main(['-m', 'hydra/launcher={choice}', 'strategy=none', 'tracking=none'])"
    )
    done = outside("-c", code)
    assert done.returncode == 2, done.stderr
    said = " ".join(done.stderr.split())
    assert said.startswith("Error in hydra/launcher: ")
    assert f"pip install 'compress[{extra}]'" in said
    assert "Traceback" not in said


def test_a_worker_that_was_killed_is_one_paragraph(capsys):
    def body() -> list:
        raise BrokenProcessPool("A worker was terminated")

    assert guarded(body, []) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("Error in hydra/launcher: ")
    assert "Run the same command again" in said


def test_a_job_of_a_cluster_is_one_of_the_sweep(tmp_path):
    """Submitit's local executor: a process of its own, as a node of a cluster would start it."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    launcher = ("hydra/launcher=submitit_local", "hydra.launcher.cpus_per_task=1")
    sweep = run_sweep(tmp_path, *launcher, "strategy=die,none,crash", "recovery=none", "model.train.epochs=1")
    assert sweep.code == 1, sweep.error
    assert sweep.report(1)["strategy"] == "none"
    died, crashed = [line for line in sweep.error.splitlines() if line.startswith("#")]
    assert died.startswith("#0 ")
    assert "strategy=die" in died
    assert "crashed: UncompletedJobError" in died
    assert crashed.startswith("#2 ")
    assert "RuntimeError" in crashed
    client = MlflowClient(f"sqlite:///{tmp_path}/runs.db")
    runs = client.search_runs([client.get_experiment_by_name("compress").experiment_id])
    assert {r.info.run_name: r.info.status for r in runs} == {
        "multirun": "FAILED",
        "none": "FINISHED",
        "crash": "FAILED",
        "die": "KILLED",
    }
