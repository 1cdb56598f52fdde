"""Keeps TensorFlow's start-up notes off the screen."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


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
