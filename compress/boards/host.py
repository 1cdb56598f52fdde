"""The machine that the pipeline runs on, through LiteRT."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from compress.boards.board import Board
from compress.candidate import Artifact, Latency, Measurement

_FIELDS = {"p50", "p90", "p99", "mean", "runs", "threads"}
_WORKER = Path(__file__).with_name("host_worker.py")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Host(Board):
    """Measures in a child process, so that a crash of the runtime cannot take the run along.

    ``threads``: of the interpreter, pinned to as many processors. ``warmup`` runs are not counted.
    ``channel_multiple``: what channel pruning rounds to by default.
    """

    threads: Annotated[int, Ge(1), Le(1024)] = 1
    runs: Annotated[int, Ge(100), Le(1_000_000)] = 200
    warmup: Annotated[int, Ge(1), Le(1_000_000)] = 20
    timeout: Annotated[float, Gt(0), Le(1e6)] = 600.0
    channel_multiple: Annotated[int, Ge(1), Le(1024)] = 1

    name: ClassVar[str] = "host"

    def lacks(self, operators: Collection[str]) -> frozenset[str]:
        """Return the operators of TensorFlow itself, which LiteRT has no kernels for."""
        return frozenset(name for name in operators if name.startswith("Flex"))

    def measure(self, artifact: Artifact) -> Measurement:
        """Return the latency of one sample over ``runs`` runs."""
        command = [sys.executable, "-P", str(_WORKER), str(artifact.path)]
        command += [str(self.threads), str(self.runs), str(self.warmup)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=self.timeout, check=False
            )
        except subprocess.TimeoutExpired:
            return Measurement(self.name, None, f"no answer within {self.timeout:g} s")
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines()
            last = lines[-1][:300] if lines else ""
            return Measurement(self.name, None, f"the runtime ended with code {done.returncode}: {last}".rstrip(": "))
        try:
            answer = json.loads(done.stdout.strip().splitlines()[-1])
            if set(answer) != _FIELDS:
                raise ValueError("other fields than expected")
            times = [float(answer[key]) for key in ("p50", "p90", "p99", "mean")]
            if not all(math.isfinite(time) and time > 0 for time in times):
                raise ValueError("no positive times")
            p50, p90, p99, mean = times
            latency = Latency(p50, p90, p99, mean, runs=int(answer["runs"]), threads=int(answer["threads"]))
            return Measurement(self.name, latency)
        except (ValueError, IndexError, KeyError, TypeError):
            return Measurement(self.name, None, f"unreadable answer {done.stdout[:100]!r}")
