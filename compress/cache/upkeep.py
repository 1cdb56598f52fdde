"""What lies in a stage cache, and how it is kept from growing: by file names and sizes alone, without TensorFlow."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

LOCKS = ".locks"
MEASURED = "measured"
PARTIAL = ".partial-"
TRAININGS = ".trainings"
_REMOVED = f"{PARTIAL}removed-"
_LOG = logging.getLogger("compress")
_MANIFEST = "manifest.json"
_ABANDONED_SECONDS = 24 * 3600
"""Age at which an entry that is being written is one that was never finished."""
_FORGOTTEN_SECONDS = 7 * 24 * 3600
"""Age at which nobody is expected to go on with an unfinished training."""


@dataclass(frozen=True)
class Kept:
    """A finished stage on disk."""

    folder: Path
    stages: tuple[str, ...]
    """Names of the stages that made it, in order; none: the baseline."""
    bytes: int
    used: float
    """When it was made or read last, in seconds since the epoch."""

    @property
    def when(self) -> str:
        """The time of the last use, for people."""
        return f"{datetime.fromtimestamp(self.used):%Y-%m-%d %H:%M}"


def entries(folder: Path) -> list[Kept]:
    """Return the finished stages, those used last first. One that vanishes meanwhile is left out."""
    found = []
    for manifest in folder.glob(f"[!.]*/{_MANIFEST}"):
        try:
            size = sum(file.stat().st_size for file in manifest.parent.iterdir())
            found.append(Kept(manifest.parent, _stages(manifest.parent), size, manifest.stat().st_mtime))
        except OSError:
            continue
    return sorted(found, key=lambda kept: -kept.used)


def mark_used(entry: Path) -> None:
    """Note that an entry was read now."""
    os.utime(entry / _MANIFEST)


def trim(folder: Path, most_bytes: float, keep: str = "") -> None:
    """Remove the entries that were not used for longest until the rest fits, and whatever was never finished.

    Args:
        folder: the cache.
        most_bytes: what all entries together may take.
        keep: name of an entry that stays in any case.
    """
    for removed in folder.glob(f"{_REMOVED}*"):
        remove_tree(removed)
    for partial in folder.glob(f"{PARTIAL}*"):
        # Another run may finish it, or remove it, at this very moment.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(partial, ignore_errors=True)
    for training in unfinished(folder):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - training.stat().st_mtime > _FORGOTTEN_SECONDS:
                shutil.rmtree(training, ignore_errors=True)
    if most_bytes == float("inf"):
        return
    kept = entries(folder)
    total = sum(entry.bytes for entry in kept) + sum(map(_size, unfinished(folder)))
    for entry in reversed(kept):
        if total <= most_bytes:
            return
        if entry.folder.name != keep:
            _LOG.info("cache: %s, last used %s, makes room", "+".join(entry.stages) or "a baseline", entry.when)
            remove([entry])
            total -= entry.bytes


def unfinished(folder: Path) -> list[Path]:
    """Return the folders with the states of unfinished trainings, one for each stage."""
    return sorted(folder.glob(f"{TRAININGS}/*"))


def _size(folder: Path) -> int:
    try:
        return sum(file.stat().st_size for file in folder.iterdir())
    except OSError:
        return 0


def remove(kept: Sequence[Kept]) -> None:
    """Remove entries. Each is renamed first, so that no reader finds half of one."""
    for entry in kept:
        gone = entry.folder.with_name(f"{_REMOVED}{entry.folder.name}")
        try:
            entry.folder.replace(gone)
        except OSError:
            continue
        shutil.rmtree(gone, ignore_errors=True)


def remove_idle(folder: Path) -> int:
    """Remove unfinished trainings, measurements and locks, but for those of stages that a run is at.

    Returns:
        how many of these there are.
    """
    parts = [*unfinished(folder), *(folder / MEASURED).glob("[!.]*.json"), *(folder / LOCKS).glob("*.lock")]
    busy = 0
    for key in sorted({part.stem for part in parts}):
        file = folder / LOCKS / f"{key}.lock"
        file.parent.mkdir(exist_ok=True)
        lock = FileLock(file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            busy += 1
            continue
        try:
            remove_tree(folder / TRAININGS / key)
            remove_tree(folder / MEASURED / f"{key}.json")
            # Whoever waits for the lock notices that its file is gone, and makes a new one.
            file.unlink(missing_ok=True)
        finally:
            lock.release()
    for part in (MEASURED, TRAININGS):
        with contextlib.suppress(OSError):
            (folder / part).rmdir()
    return busy


def remove_tree(path: Path) -> None:
    """Remove a file or a folder, which another process may be removing, too."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _stages(entry: Path) -> tuple[str, ...]:
    try:
        return tuple(json.loads((entry / "record.json").read_text())["lineage"])
    except (ValueError, KeyError):
        return ("damaged",)
