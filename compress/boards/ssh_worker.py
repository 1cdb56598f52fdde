"""The remote half of the ``ssh`` board; a program of its own, sent over the connection, that runs on any Python 3.8.

Reads from standard input one line of JSON: folder (null: the system's for temporary files), options, and the sizes of
the timing program and of the files; then these, one after the other. Prints a line with the folder that it made, and
then what the timing program prints, or a line with the error. The folder is gone afterwards, also if the connection is:
standard input stays open as long as somebody waits for the answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from pathlib import Path
from typing import Any, BinaryIO

CHUNK = 1 << 20


def main() -> None:
    """Receive, run, answer, clean up."""
    source = sys.stdin.buffer
    header = json.loads(source.readline())
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    folder = Path(header["folder"] or tempfile.gettempdir(), f"compress-{uuid.uuid4().hex}")
    try:
        folder.mkdir(mode=0o700)
        print(json.dumps({"folder": str(folder)}), flush=True)
        program = folder / "timing.py"
        receive(source, program, header["program"])
        files = [folder / f"{number}.tflite" for number in range(len(header["files"]))]
        for file, size in zip(files, header["files"]):  # noqa: B905  # Python 3.8 has no strict
            receive(source, file, size)
        command = [sys.executable, str(program), json.dumps(header["options"]), *map(str, files)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        try:
            threading.Thread(target=end_with_connection, args=(source, process), daemon=True).start()
            sys.exit(process.wait())
        finally:
            end(process)
    except OSError as error:
        print(json.dumps({"error": f"{error.strerror or error}: {error.filename or folder}"}), flush=True)
        sys.exit(1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def leave(number: int, frame: Any) -> None:
    """End by way of the clean-up."""
    sys.exit(128 + number)


def receive(source: BinaryIO, target: Path, size: int) -> None:
    """Write the next ``size`` bytes to a file."""
    with target.open("wb") as file:
        while size:
            part = source.read(min(size, CHUNK))
            if not part:
                raise OSError("the connection ended in the middle of a file")
            file.write(part)
            size -= len(part)


def end_with_connection(source: BinaryIO, process: subprocess.Popen) -> None:
    """End the process when nobody waits for it any more."""
    # Not through the buffer: its lock would be missed when the interpreter ends before this thread.
    while os.read(source.fileno(), CHUNK):
        pass
    end(process)


def end(process: subprocess.Popen) -> None:
    """Kill the process and its children."""
    # They may have ended already.
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
