"""Keeps TensorFlow's start-up notes off the screen, and tracebacks of a pipe that nobody reads any more."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

READER_GONE = 141
"""Exit code of a command whose output nobody reads any more: what a shell says of one that SIGPIPE has ended."""


def import_tensorflow() -> None:
    """Import TensorFlow and Keras without the notes that their C++ code writes before it can be told not to."""
    with stderr_aside():
        import tensorflow as tf
        import tf_keras  # noqa: F401

        # Touches the device list, which writes its own notes about missing GPUs.
        tf.config.list_physical_devices()
    for noisy in ("absl", "tensorflow"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


@contextmanager
def stderr_aside(show_on_failure: bool = True) -> Iterator[None]:
    """Send file descriptor 2 to a file meanwhile; show what was written if the body raises, unless told not to."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as notes:
        saved = os.dup(2)
        os.dup2(notes.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            if failed and show_on_failure:
                notes.seek(0)
                os.write(2, notes.read())


@contextmanager
def ending_with_the_reader() -> Iterator[None]:
    """End the program quietly where standard output or error is a pipe whose reader leaves (``... | head -1``).

    A pipe to a program of ours that has died is another matter, and so the signal stays off.
    """
    if isinstance(sys.stdout, _ReadPipe):
        yield
        return
    saved = sys.stdout, sys.stderr
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # A file opened later would get its number, and what is said.
            os.open(os.devnull, os.O_RDWR)
    with ExitStack() as nowhere:
        # Python has None for a stream that was closed before it began.
        open_streams = [stream or nowhere.enter_context(Path(os.devnull).open("w")) for stream in saved]
        own = [_ReadPipe(stream) for stream in open_streams]
        sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in own)
        try:
            yield
        finally:
            try:
                for stream in own:
                    # Else what is left is written when Python ends, which complains by itself.
                    stream.flush()
            finally:
                sys.stdout, sys.stderr = saved


class _ReadPipe:
    """A stream that ends the program where its reader has left: logging lets a SystemExit through."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._end()

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._end()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _end(self) -> NoReturn:
        # What it still holds is written once more when Python ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        raise SystemExit(READER_GONE)
