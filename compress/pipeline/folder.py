"""One command at a time in an output folder: a second one would remove what the first is at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from compress.errors import CompressError

LOCK = ".running.lock"
"""Name of the file that is held."""
_SECONDS = 0.2
"""Long enough to look again where another process has just removed the file."""


@contextmanager
def alone_in(folder: Path, key: str) -> Iterator[None]:
    """Keep other commands from working in a folder meanwhile; it is made if it is not there.

    The thread that has it may take it again. The system releases the lock of a process that is killed; the next
    command in the folder removes its file.

    Args:
        folder: where files are written.
        key: the configuration key that names the folder.

    Raises:
        CompressError: if another command is at work there.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK
    # One for each folder: as long as somebody has it, the next one gets the same.
    lock = FileLock(file.resolve(), is_singleton=True)
    if lock.is_locked:
        yield
        return
    try:
        lock.acquire(timeout=_SECONDS)
    except Timeout as error:
        raise CompressError(
            f"{key}, {folder}",
            expected="a folder that no other command is working in",
            received="one in which a command has not ended yet",
            fix=f"Wait for it, end it, or name another folder: {key}=<folder>.",
        ) from error
    try:
        yield
    finally:
        # Removed while it is held: whoever opens it meanwhile notices that it is gone, and makes a new one.
        with contextlib.suppress(OSError):
            file.unlink()
        lock.release()
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
