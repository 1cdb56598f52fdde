"""``hydra/launcher=submitit_*``: Hydra's submitit launchers, which go on where a job's process dies.

Hydra looks for plugins in the package ``hydra_plugins`` alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

_LOG = logging.getLogger("compress")


class SubmititLauncher(Launcher):
    """Runs jobs as Hydra's launcher of this name does; one that was ended from outside is told as crashed.

    :class:`compress.cli.sweep.SweepCallback` puts it in the place of Hydra's own, whose fields it has.
    """

    name: ClassVar[str]
    """The class of Hydra's launcher."""

    def __init__(self, **settings: Any) -> None:
        from hydra_plugins.hydra_submitit_launcher import submitit_launcher

        self._launcher = getattr(submitit_launcher, self.name)(**settings)
        self._config: DictConfig | None = None
        self._context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take the configuration and what a job does."""
        self._config, self._context = config, hydra_context
        self._launcher.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; return what each has returned: None, as of any job that failed, if its process died."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError

        from compress.cli.failures import crashed_job

        def crashed(number: int, death: Exception) -> JobReturn:
            assert self._context is not None
            assert self._config is not None
            return crashed_job(self._context, self._config, number, job_overrides[number - initial_job_idx], death)

        class Told:
            """A job whose end is a result, whatever it was."""

            def __init__(self, job: Any, number: int) -> None:
                self._job, self._number = job, number

            def results(self) -> list[JobReturn]:
                try:
                    return list(self._job.results())
                except FailedSubmissionError:
                    raise
                except (FailedJobError, UncompletedJobError) as death:
                    return [crashed(self._number, death)]

        with _jobs_of_executors(lambda jobs: [Told(job, initial_job_idx + index) for index, job in enumerate(jobs)]):
            return list(self._launcher.launch(job_overrides, initial_job_idx))


class LocalLauncher(SubmititLauncher):
    """Jobs in processes of this machine."""

    name = "LocalLauncher"


class SlurmLauncher(SubmititLauncher):
    """Jobs of a SLURM cluster."""

    name = "SlurmLauncher"


@contextmanager
def _jobs_of_executors(change: Any) -> Iterator[None]:
    """Let what Hydra's launcher is given as its jobs be something else: it makes the executor itself."""
    import submitit

    plain = submitit.AutoExecutor

    class Executor(plain):  # type: ignore[misc, valid-type]
        def map_array(self, *arguments: Any) -> Any:
            return change(super().map_array(*arguments))

    submitit.AutoExecutor = Executor
    try:
        yield
    finally:
        submitit.AutoExecutor = plain
