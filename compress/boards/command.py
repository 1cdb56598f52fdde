"""What boards share that run a program: it gets a time, its answer gets a length, and it never outlives them."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.candidate import Artifact, Measurement

LONGEST_ANSWER = 1 << 20


class BoardFailure(Exception):
    """Why a board gives no measurement; boards catch it and return it as the failure."""


@dataclass(frozen=True)
class Answer:
    """What a program has printed, and its exit code."""

    code: int
    output: str
    errors: str

    @property
    def last_error(self) -> str:
        """The last line of what it complained of, cut to a readable length."""
        lines = [line for line in (self.errors.strip() or self.output.strip()).splitlines() if line.strip()]
        return lines[-1].strip()[:500] if lines else ""


def check_file(path: Path) -> None:
    """Look at the first bytes of an artifact, before a tool is asked that may only crash on it.

    Raises:
        BoardFailure: if it cannot be read or is no TFLite file.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise BoardFailure(f"{path} cannot be read: {error.strerror}; correct the path") from error
    if start[4:8] != b"TFL3":
        raise BoardFailure(f"{path.name} is no TFLite file (it begins with {start!r}); export the model again")


def few_bits(kernels: Sequence[str], who: str) -> str:
    """Say which kernels are stored in 4 bits, ``who`` does not read them, and what to write."""
    listed = ", ".join(kernels[:3]) + (f" and {len(kernels) - 3} more" if len(kernels) > 3 else "")
    return (
        f"{who} 4 bits, in which the weights of {listed} are stored; give them a byte each: packed=false of the stage "
        "that rounds them (the .cmp is as small)"
    )


def measure_readable(
    board: str, artifacts: Sequence[Artifact], measure: Callable[[Sequence[Artifact]], Sequence[Measurement]]
) -> list[Measurement]:
    """Return what ``measure`` says of the artifacts that can be read, and of the others why they cannot.

    If it raises a BoardFailure, that is what is said of all that can be read.
    """
    found: dict[int, Measurement] = {}
    for number, artifact in enumerate(artifacts):
        try:
            check_file(artifact.path)
        except BoardFailure as failure:
            found[number] = Measurement(board, failure=str(failure))
    readable = [number for number in range(len(artifacts)) if number not in found]
    if readable:
        try:
            said = measure([artifacts[number] for number in readable])
        except BoardFailure as failure:
            said = [Measurement(board, failure=str(failure))] * len(readable)
        found |= dict(zip(readable, said, strict=True))
    return [found[number] for number in range(len(artifacts))]


def run_program(
    command: Sequence[str | Path], timeout: float, *, folder: Path | None = None, env: Mapping[str, str] | None = None
) -> Answer:
    """Run a program without a shell and return what it has printed; it and its children are gone afterwards.

    Raises:
        BoardFailure: if it cannot be started, takes longer than ``timeout`` seconds, or prints without end.
    """
    try:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=None if env is None else {**os.environ, **env},
            # A group of its own, which can be ended with all its children.
            start_new_session=True,
        )
    except OSError as error:
        raise BoardFailure(f"{command[0]} cannot be started: {error.strerror or error}") from error
    with process:
        try:
            output, errors = _read(process, time.monotonic() + timeout, timeout)
            code = process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
    return Answer(code, output, errors)


def _read(process: subprocess.Popen[bytes], deadline: float, timeout: float) -> tuple[str, str]:
    streams = (process.stdout, process.stderr)
    read = {stream: bytearray() for stream in streams}
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream, selectors.EVENT_READ)  # type: ignore[arg-type]
        while selector.get_map():
            ready = selector.select(max(deadline - time.monotonic(), 0))
            if not ready:
                raise BoardFailure(f"no answer within {timeout:g} s")
            for key, _ in ready:
                part = os.read(key.fd, 1 << 16)
                if not part:
                    selector.unregister(key.fileobj)
                read[key.fileobj] += part  # type: ignore[index]
                if len(read[key.fileobj]) > LONGEST_ANSWER:  # type: ignore[index]
                    raise BoardFailure(f"an answer of more than {LONGEST_ANSWER:,} bytes")
    output, errors = (bytes(read[stream]).decode(errors="replace") for stream in streams)
    return output, errors
