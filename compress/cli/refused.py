"""What a command leaves that is refused before it has made anything: nothing."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from compress.pipeline.folder import LOCK

_OF_HYDRA = (".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml")
_LOG = "run.log"
_OF_THIS_PROCESS = re.compile(r"\d\d-\d\d-\d\d-\d{6}")
"""A folder named after the microsecond in which the command began; another name may be that of a folder in use."""


class RefusedRunCallback(Callback):
    """Removes the folder that Hydra has made for a single run, if the run was refused and nothing else is in it."""

    _made: Path | None = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Take down which folder is going to be made."""
        folder = Path(config.hydra.run.dir).absolute()
        if _OF_THIS_PROCESS.fullmatch(folder.name) and not folder.exists():
            self._made = folder

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Remove it; a run that has ended well has an accuracy, one that crashed is looked into."""
        job_return: JobReturn = kwargs["job_return"]
        refused = job_return.status == JobStatus.COMPLETED and job_return.return_value is None
        if refused and self._made is not None:
            with contextlib.suppress(OSError):
                remove_if_bare(self._made)


def remove_if_bare(folder: Path) -> None:
    """Remove a folder that holds nothing but what Hydra writes before a run begins, an empty log and the lock."""
    own = {folder / name for name in (*_OF_HYDRA, _LOG, LOCK)}
    files = {path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    folders = {path for path in folder.rglob("*") if path not in files}
    log = folder / _LOG
    if not files <= own or not folders <= {folder / ".hydra"} or (log.exists() and log.stat().st_size):
        return
    for file in files:
        file.unlink()
    for inner in (*folders, folder):
        inner.rmdir()
