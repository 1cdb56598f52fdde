"""A board on paper: each operator takes as long as its multiply-adds or its bytes, whichever is longer.

The roofline model (Williams, Waterman and Patterson, Communications of the ACM 52(4), 2009), and a fixed time for
every operator. It runs nothing: what it gives is an estimate, and is called one everywhere.
"""

from __future__ import annotations

from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Gt, Le, MinLen
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from compress.boards.board import Board
from compress.boards.command import BoardFailure
from compress.candidate import Artifact, Measurement, OperatorTime
from compress.errors import CompressError
from compress.metrics.tflite_file import TFLiteFile

Positive = Annotated[float, Gt(0), Le(1e18)]


@plain_dataclass(frozen=True)
class Work:
    """What each operator of a file has to do [operators]."""

    names: tuple[str, ...]
    types: np.ndarray
    """Of what it computes with: the name of the type of its first input."""
    macs: np.ndarray
    depthwise: np.ndarray
    """Whether its multiply-adds are those of a depthwise convolution."""
    bytes: np.ndarray
    """Read and written, weights included."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Roofline(Board):
    """Estimates the time of one sample from a profile of a processor.

    Attributes:
        peaks: multiply-adds per second, by type.
        depthwise: share of the peak that depthwise convolutions reach.
        bandwidth: bytes per second.
        overhead_us: microseconds that every operator takes besides.
        sram_bytes: a file whose activations need more is said not to fit; null: there is no such limit.
        fitted_to: what the numbers were fitted to.
    """

    peaks: Annotated[dict[str, Positive], MinLen(1)]
    depthwise: Annotated[float, Gt(0), Le(1)]
    bandwidth: Positive
    overhead_us: Annotated[float, Ge(0), Le(1e9)]
    sram_bytes: Annotated[int, Ge(1)] | None = None
    fitted_to: str = ""
    channel_multiple: Annotated[int, Ge(1), Le(1024)] = 1

    name: ClassVar[str] = "roofline"

    def measure(self, artifact: Artifact) -> Measurement:
        """Return the estimate, in whole and by operator."""
        try:
            file = TFLiteFile.read(artifact.path)
            work = work_of(file)
            times = self.times(work)
        except (CompressError, BoardFailure, OSError) as failure:
            return Measurement(self.name, failure=str(failure))
        memory = file.peak_memory_bytes()
        notes: tuple[str, ...] = (f"fitted to {self.fitted_to}",) if self.fitted_to else ()
        if self.sram_bytes is not None and memory > self.sram_bytes:
            notes += (f"does not fit: activations need {memory:,} bytes, there are {self.sram_bytes:,}",)
        return Measurement(
            self.name,
            estimate_ms=float(times.sum()),
            values={"macs": float(work.macs.sum()), "activation_bytes": float(memory)},
            operators=tuple(OperatorTime(name, float(ms)) for name, ms in zip(work.names, times, strict=True)),
            notes=notes,
        )

    def times(self, work: Work) -> np.ndarray:
        """Return the milliseconds of each operator.

        Raises:
            BoardFailure: if there is no peak for a type that a multiplying operator computes with.
        """
        for kind in np.unique(work.types[work.macs > 0]):
            if kind not in self.peaks:
                raise BoardFailure(
                    f"the profile has no peak for {kind}; add board.peaks.{kind} (it has {', '.join(self.peaks)})"
                )
        peak = np.array([self.peaks.get(kind, 1.0) for kind in work.types])
        rate = peak * np.where(work.depthwise, self.depthwise, 1.0)
        seconds = np.maximum(work.macs / rate, work.bytes / self.bandwidth)
        return seconds * 1e3 + self.overhead_us / 1e3

    def to_yaml(self) -> str:
        """Return the board as a choice of ``board=``."""
        import yaml

        values = {"_target_": f"{type(self).__module__}.{type(self).__qualname__}", **asdict(self)}  # type: ignore[call-overload]
        return str(yaml.safe_dump(values, sort_keys=False))


def work_of(file: TFLiteFile) -> Work:
    """Return what the operators of a file have to do.

    Raises:
        BoardFailure: if there is an operator that nobody knows the work of.
    """
    if file.foreign_operators:
        names = ", ".join(file.foreign_operators)
        raise BoardFailure(f"operators whose work is not known: {names}; measure the file where they run instead")
    macs = {id(op): file.macs_of(op, weight) for op, weight in file.weighted}
    # Constants that are stored in another form are expanded once, when the file is loaded.
    run = [op for op in file.operators if not all(file.stored(i).data is not None for i in op.outputs)]
    return Work(
        names=tuple(op.name for op in run),
        types=np.array([str(file.tensors[op.inputs[0]].dtype) if op.inputs else "none" for op in run], dtype=object),
        macs=np.array([macs.get(id(op), 0) for op in run], np.float64),
        depthwise=np.array([op.name == "DEPTHWISE_CONV_2D" for op in run], bool),
        bytes=np.array([sum(_bytes(file, i) for i in (*op.inputs, *op.outputs) if i >= 0) for op in run], np.float64),
    )


def _bytes(file: TFLiteFile, index: int) -> int:
    tensor = file.stored(index)
    return tensor.bytes if tensor.bits >= 8 else tensor.bytes * tensor.bits // 8
