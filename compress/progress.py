"""Progress of long work: a bar with an estimate on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_LOG = logging.getLogger("compress")


class Progress:
    """Shows how far a piece of work is. On a terminal one line that renews itself; elsewhere log lines."""

    def __init__(self, title: str, *, every_seconds: float = 20.0) -> None:
        self._title = title
        self._every = every_seconds
        self._started = self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def advance(self, done: int, total: int, note: str = "") -> None:
        """Say that ``done`` of ``total`` steps are made."""
        now = time.monotonic()
        if now - self._shown < (0.2 if self._terminal else self._every):
            return
        self._shown = now
        left = (now - self._started) / done * (total - done)
        text = f"{self._title}: {done}/{total}  {note}  {left:.0f} s left"
        if self._terminal:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        else:
            _LOG.info(text)

    def close(self) -> None:
        """Clear the line on a terminal."""
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def progress(title: str) -> Iterator[Progress]:
    """Open a progress display and clear it at the end."""
    shown = Progress(title)
    try:
        yield shown
    finally:
        shown.close()
