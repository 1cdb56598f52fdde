"""TensorFlow Lite for Microcontrollers (TFLM), run on this machine: does it run the file, and in how much memory.

Its interpreter comes from ``pip install 'compress[microcontroller]'``. Times on this machine say nothing of a
microcontroller, so none are given.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from compress.boards.board import Board
from compress.boards.command import Answer, BoardFailure, check_file, few_bits, run_program
from compress.boards.micro_kernels import MICRO_KERNELS
from compress.boards.timing import with_next_step
from compress.candidate import Artifact, Measurement
from compress.errors import CompressError
from compress.metrics.tflite_file import TFLiteFile

_WORKER = Path(__file__).with_name("microcontroller_worker.py")
_ARENA = {
    "arena_bytes": re.compile(r"Arena allocation total (\d+) bytes"),
    "arena_head_bytes": re.compile(r"Arena allocation head (\d+) bytes"),
    "arena_tail_bytes": re.compile(r"Arena allocation tail (\d+) bytes"),
}
_TOO_SMALL = re.compile(r"(?:Failed to resize buffer|Failed to allocate)[^\n]*")
_REASONS = re.compile(
    r"^(?!\s|Traceback|RuntimeError)[^\n]*(?:not supported|Didn't find op|Failed|failed)[^\n]*$", re.M
)

_NO_KERNEL = "the file stores zeros sparsely; make it with board=microcontroller, which stores them as they are"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Microcontroller(Board):
    """Runs the file in TFLM's interpreter, and its outputs are compared with LiteRT's.

    Attributes:
        arena_bytes: memory that the interpreter may use for activations and its own tables.
        flash_bytes: a larger file is a failure; null: there is no such limit.
        tolerance: outputs may differ by this share of what their integers can hold, or of the largest float.
        timeout: seconds.
    """

    arena_bytes: Annotated[int, Ge(1024), Le(2**30)] = 2**24
    flash_bytes: Annotated[int, Ge(1)] | None = None
    tolerance: Annotated[float, Ge(0), Le(1)] = 0.02
    timeout: Annotated[float, Gt(0), Le(1e6)] = 300.0
    channel_multiple: Annotated[int, Ge(1), Le(1024)] = 1

    name: ClassVar[str] = "microcontroller"

    def lacks(self, operators: Collection[str]) -> frozenset[str]:
        """Return the operators that TFLM has no kernels for."""
        return frozenset(name for name in operators if name not in MICRO_KERNELS)

    def unreachable(self) -> str | None:
        """Say that TFLM is not installed, if it is not."""
        missing = find_spec("tflite_micro") is None
        return "TFLM is not installed; pip install 'compress[microcontroller]'" if missing else None

    def measure(self, artifact: Artifact) -> Measurement:
        """Return what of the arena is used, the file's size, and how far the outputs are from LiteRT's."""
        try:
            if (missing := self.unreachable()) is not None:
                raise BoardFailure(missing)
            check_file(artifact.path)
            flash = artifact.path.stat().st_size
            if self.flash_bytes is not None and flash > self.flash_bytes:
                raise BoardFailure(f"the file has {flash:,} bytes, the flash {self.flash_bytes:,}; make it smaller")
            try:
                file = TFLiteFile.read(artifact.path)
            except CompressError as error:
                raise BoardFailure(str(error)) from error
            spans = json.dumps(_spans(file))
            arguments: list[str | Path] = [_WORKER, artifact.path.resolve(), str(self.arena_bytes), spans]
            return self._read(run_program([sys.executable, "-P", *arguments], self.timeout), file, flash)
        except BoardFailure as failure:
            return Measurement(self.name, failure=str(failure))

    def _read(self, answer: Answer, file: TFLiteFile, flash: int) -> Measurement:
        if answer.code != 0:
            raise BoardFailure(self._reason(answer, file.packed_kernels))
        try:
            said = json.loads(answer.output.strip().splitlines()[-1])
            difference, compared = float(said["difference"]), int(said["compared"])
            arena = {name: float(found.search(answer.errors)[1]) for name, found in _ARENA.items()}  # type: ignore[index]
        except (ValueError, IndexError, KeyError, TypeError) as error:
            raise BoardFailure(f"unreadable answer {answer.output[:100]!r}") from error
        if not math.isfinite(difference) or compared < 1 or difference > self.tolerance:
            raise BoardFailure(
                f"outputs differ from LiteRT's by {difference:.2%} of their range, more than "
                f"board.tolerance={self.tolerance:g}"
            )
        return Measurement(self.name, values={**arena, "flash_bytes": float(flash), "max_difference": difference})

    def _reason(self, answer: Answer, packed: Sequence[str]) -> str:
        small = _TOO_SMALL.search(answer.errors)
        if small is not None:
            said = small[0].strip()
            return f"the arena of {self.arena_bytes:,} bytes is too small ({said}); give board.arena_bytes more"
        reasons = "; ".join(dict.fromkeys(line.strip() for line in _REASONS.findall(answer.errors)))[:300]
        reason = f"TFLM ended with code {answer.code}: {reasons or answer.last_error}".rstrip(": ")
        if packed:
            return f"{reason}; {few_bits(packed, 'TFLM does not read each kernel of')}"
        return f"{reason}; {_NO_KERNEL}" if "DENSIFY" in reason else with_next_step(reason)


def _spans(file: TFLiteFile) -> list[float | None]:
    """Return, for each output that the file turns from integers into floats, how far apart those can be; else None."""
    integers = (file.integers_of(index) for index in file.outputs)
    return [
        float(tensor.scales[0]) * (2**tensor.bits - 1) if tensor is not None and len(tensor.scales) == 1 else None
        for tensor in integers
    ]
