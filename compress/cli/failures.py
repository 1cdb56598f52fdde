"""Jobs of a multirun that fail: each leaves a file in its folder, whatever process it ran in; the end tells all."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import USER_ERROR, CompressError

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from hydra.types import HydraContext
    from omegaconf import DictConfig

_LOG = logging.getLogger("compress")

_FILE = "failure.json"
CRASHED = 1
"""Exit code when a job ended by an error that is no mistake of the user's."""


@dataclass(frozen=True)
class Failure:
    """A job that failed, and why; ``mistake``: the user can mend it."""

    job: str
    overrides: str
    reason: str
    mistake: bool


def record_failure(folder: Path, job: str, overrides: Sequence[str], error: Exception) -> None:
    """Leave the failure in the job's folder."""
    mistake = isinstance(error, CompressError)
    reason = str(error) if mistake else f"{type(error).__name__}: {error}"
    failure = Failure(job, " ".join(overrides), " ".join(reason.split()), mistake)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _FILE).write_text(json.dumps(asdict(failure)))


def crashed_job(
    context: HydraContext, config: DictConfig, number: int, overrides: Sequence[str], death: Exception
) -> JobReturn:
    """Leave in a job's folder that its process has died; return what a launcher returns of a job that failed.

    Args:
        context: Hydra's, of the multirun.
        config: the multirun's configuration.
        number: of the job.
        overrides: the job's own.
        death: what the launcher knows of it.
    """
    from hydra.core.utils import JobReturn, JobStatus
    from omegaconf import OmegaConf, open_dict

    own = context.config_loader.load_sweep_config(config, list(overrides))
    with open_dict(own):
        own.hydra.job.id = f"{own.hydra.job.name}_{number}"
        own.hydra.job.num = number
        folder = Path(str(own.hydra.sweep.dir)) / str(own.hydra.sweep.subdir)
        own.hydra.runtime.output_dir = str(folder.absolute())
    task = list(OmegaConf.select(own, "hydra.overrides.task"))
    record_failure(folder, str(number), task, death)
    _LOG.error("job %d: its process has died", number)
    result = JobReturn(
        overrides=task, cfg=own, hydra_cfg=OmegaConf.masked_copy(own, "hydra"), task_name=str(own.hydra.job.name)
    )
    result.status, result.return_value = JobStatus.COMPLETED, None
    return result


def clear_failures(sweep: Path) -> None:
    """Forget what failed in this folder before."""
    for file in sweep.rglob(_FILE):
        file.unlink(missing_ok=True)


def read_failures(sweep: Path) -> list[Failure]:
    """Return the failures of a multirun, in the order of its jobs."""
    found = [Failure(**json.loads(file.read_text())) for file in sweep.rglob(_FILE)]
    return sorted(found, key=lambda failure: (len(failure.job), failure.job))


def print_failures(failures: Sequence[Failure]) -> None:
    """Print a line for each failed job."""
    if failures:
        print(f"{len(failures)} of the jobs failed; the others are finished:", file=sys.stderr)
    for failure in failures:
        kind = "Error in" if failure.mistake else "crashed:"
        print(f"#{failure.job} {failure.overrides}: {kind} {failure.reason}", file=sys.stderr)


def exit_code(failures: Sequence[Failure]) -> int:
    """Return the exit code: 0; 1 if a job crashed; 2 if there were the user's mistakes alone."""
    if not failures:
        return 0
    return USER_ERROR if all(failure.mistake for failure in failures) else CRASHED
