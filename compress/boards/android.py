"""An Android phone or board over adb, with TensorFlow Lite's ``benchmark_model``.

``benchmark_model`` is a command-line program that is published for Android with TensorFlow Lite. It and the files are
copied into a folder on the device, which is removed in the end.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import statistics
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from compress.boards.board import Board
from compress.boards.command import Answer, BoardFailure, measure_readable, run_program
from compress.boards.timing import with_next_step
from compress.candidate import Artifact, Latency, Measurement, OperatorTime

_STEP_SECONDS = 60.0
_TEMPORARY = "/data/local/tmp"
_NUMBER = r"([0-9.]+(?:e[+-]?[0-9]+)?)"
_COUNT = re.compile(r"\bcount=\d+ [^\n]*\bavg=[^\n]*")
_TIMINGS = re.compile(rf"Inference timings in us: Init: {_NUMBER}, First inference: {_NUMBER}")
_MEMORY = re.compile(rf"\(MB\): init={_NUMBER} overall={_NUMBER}")
_PROFILE = "Operator-wise Profiling Info"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Android(Board):
    """Runs ``benchmark_model`` on a device, the files in turns.

    Attributes:
        benchmark: path, on this machine, of the ``benchmark_model`` for the device.
        adb: Android's debug bridge: a name in PATH, or a path.
        serial: of the device, as ``adb devices`` shows it; null: the only one.
        threads: of the interpreter.
        xnnpack: use the fast kernels.
        runs: timed runs of each round, at least.
        warmup: runs before them.
        rounds: every file is measured so often; the median of the rounds' medians counts.
        operators: measure once more with the profiler, for the times by operator.
        timeout: seconds for one round.
    """

    benchmark: Annotated[str, MinLen(1)] | None = None
    adb: Annotated[str, MinLen(1)] = "adb"
    serial: Annotated[str, Field(pattern=r"^[\w.:][\w.:-]*$")] | None = None
    threads: Annotated[int, Ge(1), Le(1024)] = 1
    xnnpack: bool = True
    runs: Annotated[int, Ge(100), Le(1_000_000)] = 100
    warmup: Annotated[int, Ge(1), Le(1_000_000)] = 20
    rounds: Annotated[int, Ge(1), Le(1000)] = 5
    operators: bool = True
    timeout: Annotated[float, Gt(0), Le(1e6)] = 300.0
    channel_multiple: Annotated[int, Ge(1), Le(1024)] = 1

    name: ClassVar[str] = "android"

    def unreachable(self) -> str | None:
        """Say what of the device and the programs for it is not there, if anything is not."""
        try:
            self._program()
            self._check_device()
        except BoardFailure as failure:
            return str(failure)
        return None

    def measure(self, artifact: Artifact) -> Measurement:
        """Return the latency of one sample on the device."""
        return self.measure_all([artifact])[0]

    def measure_all(self, artifacts: Sequence[Artifact]) -> list[Measurement]:
        """Return the latency of one sample of each, taken in turns on the device."""
        return measure_readable(self.name, artifacts, self._measure_readable)

    def _measure_readable(self, artifacts: Sequence[Artifact]) -> list[Measurement]:
        folder = f"{_TEMPORARY}/compress-{uuid.uuid4().hex}"
        program = self._program()
        self._check_device()
        try:
            self._shell(["mkdir", folder])
            self._push(program, f"{folder}/benchmark_model")
            self._shell(["chmod", "755", f"{folder}/benchmark_model"])
            places = [f"{folder}/{number}.tflite" for number in range(len(artifacts))]
            for artifact, place in zip(artifacts, places, strict=True):
                self._push(artifact.path, place)
            return self._measure_there(f"{folder}/benchmark_model", places)
        finally:
            self._remove(folder)

    def _program(self) -> Path:
        if shutil.which(self.adb) is None:
            raise BoardFailure(f"{self.adb} is not there; install Android's platform tools, or name it: board.adb")
        if self.benchmark is None:
            raise BoardFailure("board.benchmark is not set; name the benchmark_model that is built for the device")
        program = Path(self.benchmark).expanduser()
        if not program.is_file():
            raise BoardFailure(f"{program} is not there; board.benchmark names benchmark_model on this machine")
        return program

    def _check_device(self) -> None:
        """Make sure that there is one device to talk to."""
        lines = [line.split() for line in self._adb("devices").output.splitlines()[1:]]
        found = {line[0]: line[1] for line in lines if len(line) >= 2}
        wanted = {self.serial: found.get(self.serial)} if self.serial else found
        shown = ", ".join(f"{serial} ({state})" for serial, state in found.items()) or "none"
        if not self.serial and len(found) > 1:
            raise BoardFailure(f"several devices: {shown}; name one: board.serial")
        state = next(iter(wanted.values()), None)
        if state is None:
            raise BoardFailure(f"adb sees no such device (it sees {shown}); connect it and switch on USB debugging")
        if state != "device":
            raise BoardFailure(f"the device is {state} ({shown}); unlock it and allow debugging")

    def _measure_there(self, program: str, places: Sequence[str]) -> list[Measurement]:
        rounds: dict[str, list[str]] = {place: [] for place in places}
        failures: dict[str, str] = {}
        for number in range(self.rounds):
            for place in places if number % 2 == 0 else reversed(places):
                if place not in failures:
                    try:
                        rounds[place].append(self._round(program, place, "--enable_op_profiling=false"))
                    except BoardFailure as failure:
                        failures[place] = str(failure)
        found = []
        for place in places:
            try:
                if place in failures:
                    raise BoardFailure(failures[place])
                found.append(self._measurement(program, place, rounds[place]))
            except BoardFailure as failure:
                found.append(Measurement(self.name, failure=str(failure)))
        return found

    def _measurement(self, program: str, place: str, printed: Sequence[str]) -> Measurement:
        stats = [_statistics(one) for one in printed]
        counts = [int(one["count"]) for one in stats]
        mean = sum(one["avg"] * count for one, count in zip(stats, counts, strict=True)) / sum(counts)
        timings = _TIMINGS.search(printed[0])
        memory = _MEMORY.search(printed[0])
        values = {"p95_ms": statistics.median(one["p95"] for one in stats) / 1e3} if "p95" in stats[0] else {}
        values |= {"load_ms": float(timings[1]) / 1e3} if timings else {}
        values |= {"memory_bytes": float(memory[2]) * 1e6} if memory else {}
        latency = Latency(
            p50=statistics.median(one["median"] for one in stats) / 1e3,
            p90=None,
            p99=None,
            mean=mean / 1e3,
            runs=sum(counts),
            threads=self.threads,
            first=float(timings[2]) / 1e3 if timings else None,
        )
        operators: tuple[OperatorTime, ...] = ()
        if self.operators:
            operators = _operators(self._round(program, place, "--enable_op_profiling=true"))
        return Measurement(self.name, latency, values=values, operators=operators)

    def _round(self, program: str, place: str, profiling: str) -> str:
        """Run ``benchmark_model`` once and return what it prints."""
        options = [f"--graph={place}", f"--num_threads={self.threads}", f"--num_runs={self.runs}"]
        options += [f"--warmup_runs={self.warmup}", f"--use_xnnpack={str(self.xnnpack).lower()}", profiling]
        answer = self._adb("shell", shlex.join([program, *options]), timeout=self.timeout, check=False)
        if answer.code != 0:
            lines = [line.strip() for line in f"{answer.output}\n{answer.errors}".splitlines()]
            told = [line for line in lines if "error" in line.lower()] or [line for line in lines if line]
            reason = "; ".join(told[:3])[:300]
            raise BoardFailure(with_next_step(f"benchmark_model ended with code {answer.code}: {reason}".rstrip(": ")))
        return f"{answer.output}\n{answer.errors}"

    def _push(self, source: Path, target: str) -> None:
        self._adb("push", str(source.resolve()), target, timeout=self.timeout)

    def _shell(self, words: Sequence[str]) -> Answer:
        # The device has a shell of its own that takes the words apart again.
        return self._adb("shell", shlex.join(words))

    def _remove(self, folder: str) -> None:
        """Remove the folder on the device; one that is gone, or out of reach, is not to hide what happened before."""
        with contextlib.suppress(BoardFailure):
            self._shell(["rm", "-rf", folder])

    def _adb(self, *words: str, timeout: float = _STEP_SECONDS, check: bool = True) -> Answer:
        device = ["-s", self.serial] if self.serial and words[0] != "devices" else []
        answer = run_program([self.adb, *device, *words], timeout)
        if check and answer.code != 0:
            raise BoardFailure(f"adb {words[0]} ended with code {answer.code}: {answer.last_error}".rstrip(": "))
        return answer


def _statistics(printed: str) -> dict[str, float]:
    """Return the numbers of the timed runs: the last line of those that count, the one before is the warm-up's."""
    lines = _COUNT.findall(printed)
    found: dict[str, float] = {}
    if lines:
        try:
            found = {key: float(value) for key, value in re.findall(r"(\w+)=([0-9.e+]+)", lines[-1])}
        except ValueError:
            found = {}
    if not {"count", "avg"} <= set(found):
        raise BoardFailure(f"unreadable answer of benchmark_model: {printed.strip()[:100]!r}")
    if "median" not in found:
        raise BoardFailure("this benchmark_model tells no median; take that of a newer TensorFlow Lite")
    if not (0 < found["median"] < 1e12 and 0 < found["avg"] < 1e12 and 0 < found["count"] < 1e9):
        raise BoardFailure(f"benchmark_model says what cannot be: {lines[-1][:100]!r}")
    return found


def _operators(printed: str) -> tuple[OperatorTime, ...]:
    """Return the times by operator from the first table of the profile of the timed runs, in the order of running."""
    table = printed.partition(_PROFILE)[2].partition("Run Order")[2].partition("=====\n")[2].partition("\n\n")[0]
    found = []
    for line in table.splitlines()[1:]:
        cells = [cell.strip() for cell in line.strip().split("\t")]
        # The column before the first percentage is the average; older versions have one more before it.
        share = next((place for place, cell in enumerate(cells) if cell.endswith("%")), 0)
        with contextlib.suppress(ValueError):
            found.append(OperatorTime(cells[0][:100], float(cells[share - 1])))
    return tuple(found)
