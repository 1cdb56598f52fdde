"""The stage cache: every finished stage on disk, under a digest of all that made it.

An entry is a folder: the model as Keras saves it, the guarantees as JSON and arrays, the exported file, the packed one,
the stage's record, and a manifest with the digest of each file. It is written under a temporary name and renamed, so it
is either whole or absent. Nothing in it is code: loading an entry runs none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tf_keras
from filelock import FileLock, Timeout

from compress.cache.trainings import Trainings
from compress.cache.upkeep import LOCKS, MEASURED, PARTIAL, mark_used, remove_tree, trim
from compress.candidate import Candidate, Guarantee, Skipped, Storage
from compress.errors import CompressError
from compress.graph.saved_graph import SavedGraph

_LOG = logging.getLogger("compress")
_FORMAT = 2
_ARRAYS = "arrays.npz"


@dataclass(frozen=True)
class Entry:
    """A finished stage: the candidate, the stage's record, the bytes of the exported file and of the packed one."""

    candidate: Candidate
    result: dict[str, Any]
    tflite: bytes
    packed: bytes


@dataclass(frozen=True)
class StageCache:
    """Finished stages in ``folder``; None keeps nothing.

    Where they take more than ``most_bytes``, those that were not used for longest go.
    """

    folder: Path | None
    most_bytes: float = float("inf")

    def open(self) -> None:
        """Make the folder.

        Raises:
            CompressError: if nothing can be written there.
        """
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise CompressError(
                f"cache.dir {self.folder}",
                expected="a folder that can be written",
                received=str(error.strerror or error),
                fix="Name another one, cache.dir=<folder>, or write cache=off.",
            ) from error

    def load(self, key: str) -> Entry | None:
        """Return the entry, or None if there is none. A damaged one is said so, removed, and made anew."""
        if self.folder is None:
            return None
        entry = self.folder / key
        if not entry.is_dir():
            return None
        try:
            found = _read(entry)
            with suppress(FileNotFoundError):
                mark_used(entry)
            return found
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            if entry.is_dir():
                _LOG.warning("cache entry %s is damaged (%s): made anew", key[:12], error)
                shutil.rmtree(entry, ignore_errors=True)
            # Else another run has made room meanwhile.
            return None

    @contextmanager
    def alone(self, key: str) -> Iterator[None]:
        """Keep other processes from making the same thing meanwhile; wait for one that does."""
        if self.folder is None:
            yield
            return
        locks = self.folder / LOCKS
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _LOG.info("another run is at the same stage: waiting for it")
            lock.acquire(poll_interval=0.5)
        try:
            # Whoever was at it before is no longer: what it has not finished is nobody's.
            for partial in (*self.folder.glob(f"{PARTIAL}{key}-*"), *self.folder.glob(f"{MEASURED}/{PARTIAL}{key}-*")):
                remove_tree(partial)
            yield
        finally:
            lock.release()

    def store(self, key: str, entry: Entry) -> None:
        """Write an entry; one that appeared meanwhile is left as it is. A full disk is a warning."""
        if self.folder is None:
            return
        if any(isinstance(layer, tf_keras.layers.Lambda) for layer in entry.candidate.model.layers):
            _LOG.info("not kept in the cache: the model carries code, which reading an entry must not run")
            return
        self._place(key, lambda folder: _write(folder, entry))

    def _place(self, key: str, write: Callable[[Path], None]) -> None:
        """Have an entry's folder written under a name of its own, rename it, and make room.

        What was made is not lost because it could not be kept: a full disk is a warning.
        """
        if self.folder is None:
            return
        partial = self.folder / f"{PARTIAL}{key}-{uuid.uuid4().hex}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(partial)
            target = self.folder / key
            if not target.exists():
                try:
                    partial.replace(target)
                except OSError:
                    # Another process has finished the same stage since; its entry is as good.
                    if not target.exists():
                        raise
        except OSError as error:
            _LOG.warning("not kept in the cache, so another run makes it anew: %s", error)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        trim(self.folder, self.most_bytes, keep=key)

    def trainings(self, key: str) -> Trainings:
        """Return where the trainings of the stage ``key`` leave their states."""
        return Trainings(self.folder, key)

    def arrays(self, key: str, what: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Return the arrays that ``make`` returns; what it returned the last time if that is known.

        They are an entry like a finished stage: counted, and removed when others need the room. A damaged one is said
        so and made anew.

        Args:
            key: a digest of all that decides the arrays.
            what: what they are, for people.
            make: makes them.
        """
        if self.folder is None:
            return make()
        entry = self.folder / key
        with self.alone(key):
            if entry.is_dir():
                try:
                    _manifest(entry)
                    with np.load(entry / _ARRAYS, allow_pickle=False) as archive:
                        found = {name[1:]: archive[name] for name in archive.files}
                    mark_used(entry)
                    return found
                except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
                    _LOG.warning("cache entry %s is damaged (%s): made anew", key[:12], error)
                    shutil.rmtree(entry, ignore_errors=True)
            made = make()
            self._place(key, lambda folder: _write_arrays(folder, what, made))
            return made

    def remembered(self, key: str, make: Callable[[], Any]) -> Any:
        """Return what ``make`` returns, in JSON's types; what it returned the last time if that is known."""
        if self.folder is None:
            return make()
        file = self.folder / MEASURED / f"{key}.json"
        with self.alone(key):
            try:
                return _checked(json.loads(file.read_text()))
            except FileNotFoundError:
                pass
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                _LOG.warning("cache file %s is damaged (%s): made anew", file.name[:12], error)
            found = make()
            partial = file.with_name(f"{PARTIAL}{key}-{uuid.uuid4().hex}")
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps(found)
                partial.write_text(json.dumps({"digest": _text_digest(text), "value": text}))
                partial.replace(file)
            except OSError as error:
                _LOG.warning("not kept in the cache, so another run measures it anew: %s", error)
            finally:
                remove_tree(partial)
            return found


def _checked(kept: Mapping[str, str]) -> Any:
    """Return the value that was kept.

    Raises:
        ValueError: if it is another than was written.
    """
    if _text_digest(kept["value"]) != kept["digest"]:
        raise ValueError("its digest is that of other content")
    return json.loads(kept["value"])


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write(folder: Path, entry: Entry) -> None:
    folder.mkdir()
    entry.candidate.model.save(str(folder / "model.keras"))
    arrays: dict[str, np.ndarray] = {}
    guarantees = [_guarantee_to_json(g, index, arrays) for index, g in enumerate(entry.candidate.guarantees)]
    if entry.candidate.samples is not None:
        arrays["samples"] = entry.candidate.samples
    np.savez(folder / "guarantees.npz", **arrays)  # type: ignore[arg-type]
    (folder / "model.tflite").write_bytes(entry.tflite)
    (folder / "model.cmp").write_bytes(entry.packed)
    candidate = entry.candidate
    record = {
        "guarantees": guarantees,
        "storage": dataclasses.asdict(candidate.storage),
        "coder": candidate.coder,
        "lineage": candidate.lineage,
        "released": candidate.released,
        "result": entry.result,
    }
    (folder / "record.json").write_text(json.dumps(record))
    _seal(folder)


def _write_arrays(folder: Path, what: str, arrays: Mapping[str, np.ndarray]) -> None:
    folder.mkdir()
    # A name in an archive must not be empty.
    np.savez(folder / _ARRAYS, **{f"_{name}": array for name, array in arrays.items()})  # type: ignore[arg-type]
    (folder / "record.json").write_text(json.dumps({"lineage": [what]}))
    _seal(folder)


def _seal(folder: Path) -> None:
    """Write the manifest, and all files to the disk."""
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps({"format": _FORMAT, "sha256": sums}))
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _manifest(folder: Path) -> None:
    """Check an entry against its manifest.

    Raises:
        ValueError: if a file has changed, or another version wrote it.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest["format"] != _FORMAT:
        raise ValueError(f"format {manifest['format']}, this version reads {_FORMAT}")
    for name, wanted in manifest["sha256"].items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != wanted:
            raise ValueError(f"{name} has changed")


def _read(folder: Path) -> Entry:
    _manifest(folder)
    record = json.loads((folder / "record.json").read_text())
    with np.load(folder / "guarantees.npz", allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    candidate = Candidate(
        model=tf_keras.models.load_model(
            str(folder / "model.keras"), compile=False, safe_mode=True, custom_objects={"SavedGraph": SavedGraph}
        ),
        guarantees=tuple(_guarantee_from_json(value, arrays) for value in record["guarantees"]),
        storage=Storage.from_json(record["storage"]),
        coder=record["coder"],
        samples=arrays.get("samples"),
        lineage=tuple(record["lineage"]),
        skipped=tuple(Skipped(**item) for item in record["result"]["skipped"]),
        released=tuple(record["released"]),
    )
    files = ((folder / name).read_bytes() for name in ("model.tflite", "model.cmp"))
    return Entry(candidate, record["result"], *files)


def _guarantee_to_json(guarantee: Guarantee, index: int, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for item in dataclasses.fields(guarantee):
        value = getattr(guarantee, item.name)
        if isinstance(value, Mapping) and all(isinstance(v, np.ndarray) for v in value.values()):
            for number, (name, array) in enumerate(value.items()):
                arrays[f"{index}.{item.name}.{number}"] = array
                fields.setdefault(item.name, {"arrays": []})["arrays"].append(name)
        else:
            fields[item.name] = {"value": dict(value) if isinstance(value, Mapping) else value}
    kind = type(guarantee)
    return {"index": index, "module": kind.__module__, "name": kind.__qualname__, "fields": fields}


def _guarantee_from_json(value: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Guarantee:
    # Only what this run has imported already: a forged entry must not choose a module to import.
    kind = getattr(sys.modules.get(value["module"]), value["name"], None)
    if not (isinstance(kind, type) and issubclass(kind, Guarantee)):
        raise ValueError(f"{value['module']}.{value['name']} is not a guarantee")
    fields: dict[str, Any] = {}
    for name, stored in value["fields"].items():
        if "arrays" in stored:
            fields[name] = {
                weight: arrays[f"{value['index']}.{name}.{number}"] for number, weight in enumerate(stored["arrays"])
            }
        else:
            fields[name] = stored["value"]
    guarantee: Guarantee = kind(**fields)
    return guarantee
