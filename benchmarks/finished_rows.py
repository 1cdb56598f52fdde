"""Rows of a results page that is made piece by piece: finished ones are kept, so that the same command continues."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compress.cli.experiment import machine, provenance
from compress.tracking.report import versions

Row = dict[str, Any]
_MARK = "ROW "


class FinishedRows:
    """The rows of ``results/<name>.jsonl``, told apart by the values under ``keys``; ``page`` renders them."""

    def __init__(self, name: str, keys: Sequence[str], page: Callable[[list[Row]], str]) -> None:
        self._file, self._page_file = Path("results", f"{name}.jsonl"), Path("results", f"{name}.md")
        self._keys, self._page = tuple(keys), page
        self._file.parent.mkdir(exist_ok=True)
        self._rows = [json.loads(line) for line in self._file.read_text().splitlines()] if self._file.is_file() else []

    def __contains__(self, key: tuple[str, ...]) -> bool:
        return any(tuple(row[name] for name in self._keys) == key for row in self._rows)

    def add(self, row: Row) -> None:
        """Keep the row and write the page anew."""
        self.add_all([row])

    def add_all(self, rows: Sequence[Row]) -> None:
        """Keep rows that belong together and write the page anew."""
        rows = [{"commit": versions()["commit"], **row} for row in rows]
        self._rows.extend(rows)
        with self._file.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        self.write_page()
        print(*rows, sep="\n", flush=True)

    def write_page(self) -> None:
        """Write ``results/<name>.md``."""
        self._page_file.write_text(self._page(self._rows))


def made(command: str, seeds: Sequence[int | str], rows: Sequence[Row]) -> list[str]:
    """Return the lines that say how a page was made, with the commits that its rows were made at.

    Versions and machine are those of the page: rows are made where it is.
    """
    commits = dict.fromkeys(str(row.get("commit", "not known")) for row in rows)
    lines = provenance(command, seeds, machine())
    return [f"- commit: {', '.join(commits)}" if line.startswith("- commit:") else line for line in lines]


def hand_over(row: Row) -> None:
    """Give a row to the process that :func:`run_apart` was called in."""
    print(_MARK + json.dumps(row), flush=True)


def run_apart(script: str, arguments: Sequence[str], minutes: float) -> Row | str:
    """Run the script in a process of its own; return the row that it hands over, or why there is none."""
    command = [sys.executable, script, *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=60 * minutes, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no result within {minutes:g} minutes"
    found = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if found:
        return json.loads(found[-1].removeprefix(_MARK))
    return f"no result (exit {done.returncode}): {' '.join(done.stderr.split())[-300:]}"
