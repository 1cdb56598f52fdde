"""Finished runs of an experiment, beside its table: what the table shows of each, so that another machine can go on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from compress.errors import CompressError
from compress.tracking.report import versions

_ALWAYS = ("trained", "board")
"""Keys of a report that a table needs whatever its columns are."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FinishedRun:
    """One run: its row, what it was run with, and the part of its report that the table reads."""

    row: str
    seed: int
    overrides: list[str]
    commit: str
    report: dict[str, Any]


class FinishedRuns:
    """The runs in ``file``, one JSON object a line. ``paths``: what of their reports is kept."""

    def __init__(self, file: Path, paths: Iterable[str], *, kept: bool) -> None:
        self._file, self._paths = file, [path.split(".") for path in paths]
        self.runs = read(file) if kept else []
        self._commit = versions()["commit"]

    def find(self, row: str, seed: int, overrides: Sequence[str]) -> Mapping[str, Any] | None:
        """Return the report of a run with the same overrides; None if there is none."""
        for run in self.runs:
            if (run.row, run.seed, run.overrides) == (row, seed, list(overrides)):
                return run.report
        return None

    def add(self, row: str, seed: int, overrides: Sequence[str], report: Mapping[str, Any]) -> None:
        """Keep what the table reads of a report, instead of that of an earlier run of the row and seed."""
        part = {key: report[key] for key in _ALWAYS if key in report}
        for path in self._paths:
            _merge(part, _part(report, path) or {})
        self.runs = [run for run in self.runs if (run.row, run.seed) != (row, seed)]
        self.runs.append(FinishedRun(row, seed, list(overrides), self._commit, part))
        partial = self._file.with_name(f".{self._file.name}.partial")
        partial.write_text("".join(json.dumps(asdict(run)) + "\n" for run in self.runs))
        partial.replace(self._file)

    def other_commits(self) -> dict[str, int]:
        """Return the commits, other than this one, that runs were made at, and how many."""
        commits = [run.commit for run in self.runs if run.commit != self._commit]
        return {commit: commits.count(commit) for commit in dict.fromkeys(commits)}


def read(file: Path) -> list[FinishedRun]:
    """Return the runs in a file; none if there is no such file.

    Raises:
        CompressError: if a line is no finished run.
    """
    if not file.is_file():
        return []
    found = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            found.append(TypeAdapter(FinishedRun).validate_json(line))
        except ValidationError as error:
            raise CompressError(
                f"{file}, line {number}",
                expected="a finished run, as this command writes it",
                received=line[:80],
                fix="Delete the line; that run is then made again.",
            ) from error
    return found


def _part(value: Any, path: Sequence[str]) -> Any:
    """Return what lies at a path with patterns, in the shape of the whole; lists become mappings by number."""
    if not path:
        return value
    if isinstance(value, list):
        value = dict(zip(map(str, range(len(value))), value, strict=True))
    if not isinstance(value, Mapping):
        return None
    patterns = path[0].split("|")
    keys = [path[0]] if path[0] in value else [k for k in value if any(fnmatchcase(k, p) for p in patterns)]
    parts = {key: _part(value[key], path[1:]) for key in keys}
    return {key: part for key, part in parts.items() if part is not None}


def _merge(target: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = dict(value) if isinstance(value, Mapping) else value
