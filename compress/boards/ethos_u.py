"""Arm's Ethos-U accelerators, as far as their compiler Vela knows them: an estimate, and what memory a file takes.

Vela (``pip install 'compress[ethos-u]'``) compiles the ``.tflite`` file for an accelerator and counts cycles, SRAM and
flash. Nothing runs: its time is an estimate.
"""

from __future__ import annotations

import csv
import math
import re
import sys
import tempfile
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from compress.boards.board import Board
from compress.boards.command import Answer, BoardFailure, check_file, few_bits, run_program
from compress.candidate import Artifact, Measurement, OperatorTime
from compress.errors import CompressError

_MEMORIES = ("sram", "dram", "on_chip_flash", "off_chip_flash")
_LONGEST_FILE = 1 << 22
_KNOWN_TO_PROCESSORS = {"TFLite_Detection_PostProcess", "ethos-u"}
_COMPLAINT = re.compile(r"operator: (\w+), ofm: '[^\n]*'\nReason: ([^\n]*)")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class EthosU(Board):
    """Compiles the file with Vela and reads what it has counted.

    Attributes:
        accelerator: the accelerator and its multiply-adds per cycle.
        system: of Vela's configuration file: clock and memories; null: Vela's own for the accelerator.
        memory: the same for what lies where; null: Vela's own.
        config: a configuration file of your own for Vela; null: the one that it brings.
        optimise: what Vela aims at.
        timeout: seconds.
    """

    accelerator: Literal[
        "ethos-u55-32", "ethos-u55-64", "ethos-u55-128", "ethos-u55-256", "ethos-u65-256", "ethos-u65-512",
        "ethos-u85-128", "ethos-u85-256", "ethos-u85-512", "ethos-u85-1024", "ethos-u85-2048",
    ] = "ethos-u55-128"  # fmt: skip
    system: str | None = None
    memory: str | None = None
    config: str | None = None
    optimise: Literal["Performance", "Size"] = "Performance"
    timeout: Annotated[float, Gt(0), Le(1e6)] = 300.0
    channel_multiple: Annotated[int, Ge(1), Le(1024)] = 1

    name: ClassVar[str] = "ethos_u"

    def lacks(self, operators: Collection[str]) -> frozenset[str]:
        """Return what leaves the accelerator without weights: Vela compiles no kernels that are stored sparsely."""
        return frozenset(operators) & {"DENSIFY"}

    def unreachable(self) -> str | None:
        """Say that Vela is not installed, if it is not."""
        return "Vela is not installed; pip install 'compress[ethos-u]'" if find_spec("ethosu") is None else None

    def measure(self, artifact: Artifact) -> Measurement:
        """Return cycles, memory and the estimate; operators that the accelerator cannot run are notes."""
        try:
            if (missing := self.unreachable()) is not None:
                raise BoardFailure(missing)
            check_file(artifact.path)
            refuse_foreign(artifact.path)
            with tempfile.TemporaryDirectory(prefix="compress-vela-") as folder:
                answer = run_program(self._command(artifact.path, Path(folder)), self.timeout)
                return self._read(answer, Path(folder))
        except BoardFailure as failure:
            return Measurement(self.name, failure=str(failure))

    def _command(self, path: Path, folder: Path) -> list[str | Path]:
        command: list[str | Path] = [sys.executable, "-P", "-m", "ethosu.vela", path.resolve()]
        command += ["--output-dir", folder, f"--accelerator-config={self.accelerator}", f"--optimise={self.optimise}"]
        command += ["--verbose-performance", "--show-cpu-operations"]
        settings = {"system-config": self.system, "memory-mode": self.memory, "config": self.config}
        return command + [f"--{name}={value}" for name, value in settings.items() if value is not None]

    def _read(self, answer: Answer, folder: Path) -> Measurement:
        if answer.code != 0:
            raise BoardFailure(f"Vela ended with code {answer.code}: {answer.last_error}".rstrip(": "))
        summary = _rows(folder, "*_summary_*.csv")[-1]
        layers = _rows(folder, "*_per-layer.csv")
        unsupported = _unsupported(answer.output + answer.errors)
        on_npu = sum(row.get("Target") == "NPU" for row in layers)
        cycles = _number(summary, "cycles_total")
        if not cycles:
            reason = unsupported[0] if unsupported else "Vela gave no reason"
            raise BoardFailure(f"nothing of the file runs on {self.accelerator}: {reason}; quantize it to int8 first")
        clock = _number(summary, "core_clock")
        values = {"cycles": cycles, "npu_operators": float(on_npu), "cpu_operators": float(len(layers) - on_npu)}
        values |= {f"{name}_bytes": 1024 * _number(summary, f"{name}_memory_used") for name in _MEMORIES}
        return Measurement(
            self.name,
            estimate_ms=1e3 * _number(summary, "inference_time"),
            values={key: value for key, value in values.items() if value or key.endswith("operators")},
            operators=tuple(
                OperatorTime(str(row.get("Original Operator")), 1e3 * _number(row, "Op Cycles") / clock)
                for row in layers
            ),
            notes=(
                f"{self.accelerator}, {summary.get('system_config')}, {summary.get('memory_mode')}",
                *(f"runs on the processor, not counted: {text}" for text in unsupported[:3]),
            ),
        )


def refuse_foreign(path: Path) -> None:
    """Refuse what Vela cannot compile, or would leave, uncounted, to a processor that does not know it either.

    Raises:
        BoardFailure: naming the operators, or what is wrong with the file.
    """
    from compress.metrics.tflite_file import TFLiteFile

    try:
        file = TFLiteFile.read(path)
        names = set(file.foreign_operators) - _KNOWN_TO_PROCESSORS
    except CompressError as error:
        raise BoardFailure(str(error)) from error
    if "DENSIFY" in {op.name for op in file.operators}:
        raise BoardFailure(
            "the file stores zeros sparsely (DENSIFY), which Vela cannot compile; make it with board=ethos_u, which "
            "stores them as they are"
        )
    if file.packed_kernels:
        raise BoardFailure(few_bits(file.packed_kernels, "Vela cannot compile"))
    if names:
        raise BoardFailure(f"operators that nothing there runs: {', '.join(sorted(names))}; leave their layers out")


def _unsupported(printed: str) -> list[str]:
    """Return operators that Vela leaves to the processor, each with the reason."""
    found = [f"{operator} ({' '.join(reason.split())[:160]})" for operator, reason in _COMPLAINT.findall(printed)]
    return list(dict.fromkeys(found))


def _rows(folder: Path, pattern: str) -> list[dict[str, str]]:
    files = sorted(folder.glob(pattern))
    if len(files) != 1 or files[0].stat().st_size > _LONGEST_FILE:
        raise BoardFailure(f"Vela left no readable {pattern}")
    with files[0].open(newline="", errors="replace") as text:
        rows = list(csv.DictReader(text))
    if not rows:
        raise BoardFailure(f"Vela left an empty {pattern}")
    return rows


def _number(row: dict[str, str], key: str) -> float:
    """Return a number of Vela's; 0 where it says nan, as it does of a file of which it compiles nothing."""
    try:
        value = float(row[key])
    except (KeyError, TypeError, ValueError) as error:
        raise BoardFailure(f"Vela's answer has no number under {key}") from error
    if math.isnan(value):
        return 0.0
    if math.isinf(value) or value < 0:
        raise BoardFailure(f"Vela's answer has {value} under {key}")
    return value
