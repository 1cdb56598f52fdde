"""``hydra/launcher=joblib``: Hydra's joblib launcher, which goes on where one of its processes dies.

Hydra looks for plugins in the package ``hydra_plugins`` alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, configure_log, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

_LOG = logging.getLogger("compress")


class JoblibLauncher(Launcher):
    """Runs jobs in processes, each in one of ``n_jobs``.

    A process that dies takes all of joblib's with it. The jobs that were at work then are run again, one at a time: so
    the one that died is known, and is told as crashed; the others are finished.

    :class:`compress.cli.sweep.SweepCallback` puts it in the place of Hydra's own; the fields are those of that one,
    which are those of ``joblib.Parallel``.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        from hydra_plugins.hydra_joblib_launcher import _core

        self._core = _core
        self._config: DictConfig | None = None
        self._context: HydraContext | None = None
        self._task: TaskFunction | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take the configuration and what a job does."""
        self._config, self._context, self._task = config, hydra_context, task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; return what each has returned: None, as of any job that failed, if its process died."""
        from compress.cli.failures import crashed_job

        assert self._config is not None
        assert self._context is not None
        setup_globals()
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
        Path(str(self._config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        jobs = {initial_job_idx + index: list(overrides) for index, overrides in enumerate(job_overrides)}
        for number, overrides in jobs.items():
            _LOG.info("\t#%d : %s", number, " ".join(filter_overrides(overrides)))
        done: dict[int, JobReturn] = {}
        while waiting := [number for number in jobs if number not in done]:
            if self._run(jobs, waiting, done) is None:
                continue
            # Jobs begin in this order: those that were at work are among the first that are not done.
            suspects = [number for number in waiting if number not in done][: self._workers()]
            _LOG.warning("a process of a job has died; again, one at a time: %s", ", ".join(f"#{n}" for n in suspects))
            for number in suspects:
                if (death := self._run(jobs, [number], done)) is not None:
                    done[number] = crashed_job(self._context, self._config, number, jobs[number], death)
        return [done[number] for number in jobs]

    def _workers(self) -> int:
        from joblib import effective_n_jobs

        return int(effective_n_jobs(self._settings.get("n_jobs") or 1))

    def _run(
        self, jobs: Mapping[int, list[str]], numbers: Sequence[int], done: dict[int, JobReturn]
    ) -> BrokenExecutor | None:
        """Run some of the jobs, put into ``done`` what they return; return the error if a process died."""
        from joblib import Parallel, delayed

        settings = {**self._settings, "backend": "loky", "return_as": "generator_unordered"}
        self._core.process_joblib_cfg(settings)
        state = Singleton.get_state()
        try:
            for number, result in Parallel(**settings)(
                delayed(_numbered)(
                    self._core.execute_job, number, jobs[number], self._context, self._config, self._task, state
                )
                for number in numbers
            ):
                done[number] = result
        except BrokenExecutor as death:
            return death
        return None


def _numbered(run: Any, number: int, *arguments: Any) -> tuple[int, JobReturn]:
    return number, run(number, *arguments)
