"""What MLflow is told of one run, kept in a file until the store has taken it.

Every entry is written down before it is sent, and the file is put away when the store has taken the last of them. So
nothing is lost if the store, or this process, goes away in the middle; and as sending an entry again changes nothing,
nothing is doubled where the store took one and its answer did not arrive.
"""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from compress.errors import CompressError
from compress.tracking.entries import Entry, RunEnded, entries_adapter
from compress.tracking.store import Store, as_mistake, is_refusal, now

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

SUFFIX = ".jsonl"
_RECORD_TAG = "record"
PARENT_TAG = "mlflow.parentRunId"
_VERSION = 1
_LOG = logging.getLogger("compress")


@dataclass(frozen=True)
class Start:
    """The first line of the file: which run it is about."""

    version: int
    store: str
    """The URI without a password."""
    experiment: str
    record: str
    """What the run is found by in MLflow if its id is not known."""
    name: str
    tags: dict[str, str]
    time: int
    """Milliseconds since 1970."""
    sweep: bool = False
    """Whether it is about the end of a multirun, which is told after all of its runs."""


class Journal:
    """The file of one run; made by :meth:`begin` or :meth:`take_over`."""

    def __init__(self, file: Path, lock: FileLock, store: Store, start: Start) -> None:
        self.file = file
        self.start = start
        self._lock = lock
        self._store = store
        self._adapter = entries_adapter()
        self._entries: list[Entry] = []
        self._sent = 0
        self.run: str | None = None
        """Its id in MLflow, once that is known."""
        self._may_be_there = False
        """Whether MLflow may have made the run without our knowing."""
        self._refused: CompressError | None = None

    @classmethod
    def begin(
        cls,
        folder: Path,
        store: Store,
        name: str,
        tags: Mapping[str, str],
        run: str | None = None,
        *,
        sweep: bool = False,
    ) -> Journal:
        """Return the journal of a new run, or of one that MLflow has already (``run``).

        ``sweep``: it is about the end of a multirun.
        """
        record = uuid.uuid4().hex
        start = Start(_VERSION, store.name, store.experiment, record, name, dict(tags), now(), sweep)
        file = folder.expanduser().absolute() / f"{record}{SUFFIX}"
        journal = cls(file, _locked(file), store, start)
        journal._write(journal._start_line())
        if run is not None:
            journal.run = run
            journal._write({"run": run})
        return journal

    @classmethod
    def take_over(cls, file: Path, store: Store) -> Journal | None:
        """Return the journal that another process has left; None if one is still at it.

        A run whose process was killed before it had ended gets its end: KILLED.

        Raises:
            CompressError: if the file is damaged.
        """
        lock = FileLock(f"{file}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return None
        try:
            if not file.exists():
                Path(lock.lock_file).unlink(missing_ok=True)
                lock.release()
                return None
            lines, whole = _lines(file)
            if not whole:
                # Its process was killed while it wrote the last line: without it, the next can be added.
                _write_lines(file, lines)
            journal = cls(file, lock, store, _start_of(file, lines))
            journal._read(lines[1:])
            if not journal.ended:
                journal.write(RunEnded("KILLED", now()))
        except BaseException:
            lock.release()
            raise
        return journal

    def _read(self, lines: Sequence[Mapping[str, Any]]) -> None:
        try:
            for line in lines:
                if "entry" in line:
                    self._entries.append(self._adapter.validate_python(line["entry"]))
                elif "run" in line:
                    self.run = str(line["run"])
                else:
                    self._sent = int(line["sent"])
        except (ValidationError, KeyError, TypeError, ValueError) as error:
            raise _damaged(self.file, error) from error
        if not 0 <= self._sent <= len(self._entries):
            raise _damaged(self.file, f"{self._sent} entries sent of {len(self._entries)}")
        self._may_be_there = True

    @property
    def ended(self) -> bool:
        """Whether the last entry is there."""
        return bool(self._entries) and self._entries[-1].ends_run

    def add(self, *entries: Entry) -> None:
        """Write entries down and send all that is left, unless the store was away a moment ago."""
        self.write(*entries)
        self.send()

    def write(self, *entries: Entry) -> None:
        """Write entries down, to be sent later."""
        for entry in entries:
            self._write({"entry": self._adapter.dump_python(entry, mode="json")})
            self._entries.append(entry)

    def send(self, *, at_once: bool = False) -> bool:
        """Send what the store has not taken yet, in order; say whether it now has taken all.

        Args:
            at_once: try it even if the store was away a moment ago.

        An entry that the store refuses for good is left out, which :meth:`close` tells.
        """
        return self._store.try_to(self._send, at_once=at_once)

    def _send(self, client: MlflowClient, experiment: str) -> None:
        if self.run is None:
            self.run = self._find(client, experiment) if self._may_be_there else None
            self._may_be_there = True
            self.run = self.run or self._make(client, experiment)
            self._write({"run": self.run})
        while self._sent < len(self._entries):
            try:
                self._entries[self._sent].send(client, self.run)
            except Exception as error:
                if not is_refusal(error):
                    raise
                self._refused = self._refused or as_mistake(error, self._store.uri)
            self._sent += 1
            self._write({"sent": self._sent})

    def _find(self, client: MlflowClient, experiment: str) -> str | None:
        found = client.search_runs([experiment], f"tags.`{_RECORD_TAG}` = '{self.start.record}'", max_results=1)
        return str(found[0].info.run_id) if found else None

    def _make(self, client: MlflowClient, experiment: str) -> str:
        tags = {**self.start.tags, _RECORD_TAG: self.start.record}
        run = client.create_run(experiment, start_time=self.start.time, run_name=self.start.name, tags=tags)
        return str(run.info.run_id)

    def close(self) -> bool:
        """Send what is left and put the file away; say whether the store has taken all.

        If not, it is kept.

        Raises:
            CompressError: if the store has refused an entry for good; it has been sent the others.
        """
        done = False
        try:
            done = self.send(at_once=True)
        finally:
            if done:
                self.forget()
            else:
                self.keep()
        if done and self._refused is not None:
            raise self._refused
        return done

    def forget(self) -> None:
        """Put the file away, and the copies of the files that it names."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self.file.unlink(missing_ok=True)
        self.leave()

    def keep(self) -> None:
        """Leave the file, and the files that it names, to be sent later."""
        self._keep_files()
        self.leave()
        _LOG.warning(
            "what the run %r reports to MLflow is kept in %s; the next run sends it, or python -m compress.deliver",
            self.start.name,
            self.file,
        )

    def leave(self) -> None:
        """Let other processes have it."""
        self._lock.release()
        if not self.file.exists():
            Path(self._lock.lock_file).unlink(missing_ok=True)
            _remove_empty(self.file.parent)

    @property
    def _folder(self) -> Path:
        return self.file.with_suffix("")

    def _keep_files(self) -> None:
        """Copy the files that are still to be sent: the run's folder may be written anew, or deleted."""
        moved: dict[Path, Path] = {}
        for number, path in enumerate(dict.fromkeys(p for entry in self._entries[self._sent :] for p in entry.files)):
            if path.is_file() and self._folder not in path.parents:
                moved[path] = (self._folder / str(number) / path.name).absolute()
                moved[path].parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, moved[path])
        self._entries = [entry.with_files(moved) for entry in self._entries]
        lines = [self._start_line(), *({"run": run} for run in [self.run] if run)]
        lines += [{"entry": self._adapter.dump_python(entry, mode="json")} for entry in self._entries]
        _write_lines(self.file, [*lines, {"sent": self._sent}])

    def _start_line(self) -> dict[str, Any]:
        return {"start": TypeAdapter(Start).dump_python(self.start, mode="json")}

    def _write(self, line: Mapping[str, Any]) -> None:
        with self.file.open("a") as target:
            target.write(json.dumps(line) + "\n")


def require_folder(folder: Path) -> None:
    """Refuse a folder in which nothing can be kept.

    Raises:
        CompressError: naming the setting.
    """
    probe = folder.expanduser().absolute() / f".{uuid.uuid4().hex}.partial"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CompressError(
            "tracking.unsent",
            expected="a folder that can be written",
            received=f"{folder} ({error.strerror or error})",
            fix="Name another one: tracking.unsent=<folder>.",
        ) from error
    _remove_empty(probe.parent)


def remove_litter(folder: Path) -> None:
    """Remove what processes have left that were killed before the first line, after the last, or while they wrote."""
    for lock_file in folder.glob(f"*{SUFFIX}.lock"):
        file = lock_file.with_suffix("")
        lock = FileLock(lock_file)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            continue
        if file.is_file() and not file.stat().st_size:
            file.unlink()
        _partial(file).unlink(missing_ok=True)
        if not file.exists():
            shutil.rmtree(file.with_suffix(""), ignore_errors=True)
            lock_file.unlink(missing_ok=True)
        lock.release()
    _remove_empty(folder)


def read_start(file: Path) -> Start:
    """Return what a file is about.

    Raises:
        CompressError: if the file is damaged.
    """
    return _start_of(file, _lines(file)[0])


def _lines(file: Path) -> tuple[list[dict[str, Any]], bool]:
    """Return the lines that were written to their end, and whether they are all."""
    content = file.read_text(errors="replace")
    try:
        lines = [json.loads(line) for line in content[: content.rfind("\n") + 1].splitlines()]
    except ValueError as error:
        raise _damaged(file, error) from error
    if not all(isinstance(line, dict) for line in lines):
        raise _damaged(file, "a line that is no object")
    return lines, content.endswith("\n")


def _write_lines(file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    partial = _partial(file)
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    partial.replace(file)


def _partial(file: Path) -> Path:
    return file.with_name(f".{file.name}.partial")


def _locked(file: Path) -> FileLock:
    """Return the lock of a new file, held; another process may remove the empty folder meanwhile."""
    lock = FileLock(f"{file}.lock")
    for last in (False, False, True):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except FileNotFoundError:
            if last:
                raise
        else:
            break
    return lock


def _start_of(file: Path, lines: Sequence[Mapping[str, Any]]) -> Start:
    try:
        start: Start = TypeAdapter(Start).validate_python(lines[0]["start"])
    except (ValidationError, IndexError, KeyError) as error:
        raise _damaged(file, error) from error
    if start.version != _VERSION:
        raise _damaged(file, f"version {start.version}")
    return start


def _damaged(file: Path, reason: object) -> CompressError:
    return CompressError(
        str(file),
        expected="what was kept for MLflow, as compress wrote it",
        received=" ".join(str(reason).split())[:160],
        fix="Delete the file to go without what it holds; report.json of the run has the numbers.",
    )


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return
