"""The machine that the pipeline runs on, through LiteRT."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from compress.boards.board import Board
from compress.boards.command import BoardFailure, run_program
from compress.boards.timing import Timing, read_times
from compress.candidate import Artifact, Measurement

_WORKER = Path(__file__).with_name("host_worker.py")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Host(Timing, Board):
    """Measures in child processes, so that a crash of the runtime cannot take the run along; fields as in Timing."""

    name: ClassVar[str] = "host"

    @property
    def place(self) -> str:
        """The processor: another one takes other times."""
        return ", ".join([*processor(), f"{os.cpu_count()} cores"])

    def lacks(self, operators: Collection[str]) -> frozenset[str]:
        """Return the operators of TensorFlow itself, which LiteRT has no kernels for."""
        return frozenset(name for name in operators if name.startswith("Flex"))

    def measure(self, artifact: Artifact) -> Measurement:
        """Return the latency of one sample."""
        return self.measure_all([artifact])[0]

    def measure_all(self, artifacts: Sequence[Artifact]) -> list[Measurement]:
        """Return the latency of one sample of each, taken in turns."""
        count = len(artifacts)
        command: list[str | Path] = [
            sys.executable,
            "-P",
            _WORKER,
            self.worker_options(),
            *(artifact.path for artifact in artifacts),
        ]
        try:
            answer = run_program(command, self.timeout * count)
        except BoardFailure as failure:
            return [Measurement(self.name, None, str(failure))] * count
        if answer.code != 0:
            reason = f"the runtime ended with code {answer.code}: {answer.last_error}".rstrip(": ")
            return [Measurement(self.name, None, reason)] * count
        return read_times(self.name, answer.output, count)


def processor() -> tuple[str, str]:
    """Return the name of this machine's processor, and a digest of what it can do."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = hashlib.sha256(" ".join(sorted(known.get("flags", "").split())).encode()).hexdigest()[:12]
    return known.get("model name") or platform.processor() or platform.machine(), flags
