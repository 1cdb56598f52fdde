"""Progress of long work: a bar with an estimate on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_LOG = logging.getLogger("compress")


class Progress:
    """Shows how far a piece of work is. On a terminal a bar that renews itself; elsewhere log lines."""

    def __init__(self, title: str, *, every_seconds: float = 20.0) -> None:
        self._title = title
        self._every = every_seconds
        self._started = self._shown = time.monotonic()
        console = Console(stderr=True)
        self._bar: Bar | None = None
        if console.is_terminal:
            note = TextColumn("{task.fields[note]}")
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), note, TimeRemainingColumn())
            self._bar = Bar(*columns, console=console, transient=True)
            self._task = self._bar.add_task(title, total=None, note="")
            self._bar.start()

    def advance(self, done: int, total: int, note: str = "") -> None:
        """Say that ``done`` of ``total`` steps are made."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, note=note)
            return
        now = time.monotonic()
        if now - self._shown < self._every:
            return
        self._shown = now
        left = (now - self._started) / done * (total - done)
        _LOG.info("%s: %d/%d  %s  %.0f s left", self._title, done, total, note, left)

    def close(self) -> None:
        """Clear the bar on a terminal."""
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def progress(title: str) -> Iterator[Progress]:
    """Open a progress display and clear it at the end."""
    shown = Progress(title)
    try:
        yield shown
    finally:
        shown.close()
