"""Fixtures: a home for each test run, the data folder, a command line in this process and one outside it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # As many processes as cores run already; threads of BLAS that wait for each other made some tests ten times slower.
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

import absl.logging
import pytest

import compress  # noqa: F401  (sets TF_USE_LEGACY_KERAS before anything imports TensorFlow)
from compress.quiet import import_tensorflow

import_tensorflow()
# absl's handler closes its stream when Hydra sets logging up anew; pytest's captured stream must not be that one.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with CIFAR-10, MNIST and the trained weights; the test is skipped where it is absent."""
    folder = os.environ.get("COMPRESS_DATA_DIR")
    if not folder or not (Path(folder) / "cifar10.npz").is_file():
        pytest.skip("COMPRESS_DATA_DIR names no folder with cifar10.npz")
    return Path(folder)


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage cache that all tests of this run share, whatever process they run in, so that a stage is made once."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def finished_run(session_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a finished run: the digits model as an int8 file. Not to be changed."""
    from compress.cli.compose import compose_config
    from compress.cli.job import run_job

    folder = tmp_path_factory.mktemp("run")
    overrides = ["strategy=quantize", "tracking=none", f"cache.dir={session_cache}", *QUICK]
    run_job(compose_config(overrides), folder, None)
    return folder


@pytest.fixture
def cli(tmp_path: Path, session_cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    """Run ``compress.run`` in this process, in a folder of its own: returns (exit code, stdout, stderr)."""
    from compress.run import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["run.py"])
        overrides = list(arguments)
        for key, value in {"tracking": "none", "cache.dir": str(session_cache)}.items():
            if (
                not any(a.lstrip("~+").startswith((f"{key}=", f"{key}.")) or a == f"~{key}" for a in overrides)
                and "--cfg" not in overrides
            ):
                overrides.append(f"{key}={value}")
        with pytest.raises(SystemExit) as stopped:
            main(overrides)
        shown = capfd.readouterr()
        return int(stopped.value.code or 0), shown.out, shown.err

    return run


@pytest.fixture
def outside(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run Python in a process of its own, with the project on its path and a folder of its own."""

    def run(*arguments: str, cwd: Path = tmp_path, **settings) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **settings.pop("env", {})}
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            **settings,
        )

    return run


@pytest.fixture
def pipeline(session_cache: Path):
    """Build the pipeline of a command line: ``pipeline("strategy=prune", ...)``."""
    from compress.cli.build import make_plan
    from compress.cli.compose import compose_config

    def build(*overrides: str, cache: bool = True):
        place = [f"cache.dir={session_cache}"] if cache else ["cache=off"]
        others = any(item.startswith("board=") and item != "board=host" for item in overrides)
        quick = [item for item in QUICK if not (item.startswith("board.") and others)]
        return make_plan(compose_config([*quick, *overrides, *place])).pipeline()

    return build


QUICK: Sequence[str] = ("recovery.epochs=4", "board.runs=100", "board.warmup=1", "board.precision=null")
"""Short recovery, few runs on the board; the digits model itself is trained as usual, once for all tests."""
