"""States of unfinished trainings, beside the stages that they belong to."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from compress.cache.upkeep import TRAININGS, remove_tree

_LOG = logging.getLogger("compress")
_SECONDS = 2.0


class TrainingState:
    """The state of one training, in a file; it is written under a temporary name and renamed."""

    seconds = _SECONDS

    def __init__(self, file: Path) -> None:
        self._file = file

    def load(self, identity: str) -> Mapping[str, np.ndarray] | None:
        """Return the arrays that were saved under ``identity``; None if there are none, or others."""
        try:
            with np.load(self._file, allow_pickle=False) as archive:
                if str(archive["identity"]) != identity:
                    return None
                arrays = {name: archive[name] for name in archive.files}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            _LOG.warning("the state of a training is damaged (%s): it starts anew", error)
            return None
        _LOG.info("a training that was stopped goes on after step %d", int(arrays["step"]))
        return arrays

    def save(self, identity: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep the arrays in the place of any before, all of them or none; a full disk is a warning."""
        partial = self._file.with_name(f".{self._file.name}.{uuid.uuid4().hex}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as handle:
                np.savez(handle, identity=np.array(identity), **arrays)  # type: ignore[arg-type]
                handle.flush()
                os.fsync(handle.fileno())
            partial.replace(self._file)
        except OSError as error:
            _LOG.warning("the state of the training is not kept, so it could not go on if it were stopped: %s", error)
        finally:
            remove_tree(partial)


class Trainings:
    """The trainings of one stage, numbered in the order in which it makes them; ``folder``: None keeps nothing."""

    def __init__(self, folder: Path | None, key: str) -> None:
        self._folder = None if folder is None else folder / TRAININGS / key
        self._count = 0

    def next(self) -> TrainingState | None:
        """Return where the stage's next training leaves its state."""
        if self._folder is None:
            return None
        self._count += 1
        return TrainingState(self._folder / f"{self._count}.npz")

    def forget(self) -> None:
        """Remove all of them: the stage is finished."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
