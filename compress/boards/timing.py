"""How the boards that run LiteRT's Python package ask ``host_worker.py`` for times, and read its answer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from compress.candidate import Latency, Measurement

_TIMES = ("p50", "p90", "p99", "mean", "first")
_FIELDS = {*_TIMES, "interval", "runs", "threads", "load_ms", "cpu_ms", "memory_bytes"}
_MOST = 1e9
"""Milliseconds, runs and so on beyond it are no answer."""
_BUSY = 1.5
"""So many times the processor's own time is more than this program and the clock add."""
_ADVICE = re.compile(r"Make sure you apply/link the Flex delegate.*?(?=Node number|$)", re.S)
_NEXT_STEPS = {
    "valid Flatbuffer": "export the model again",
    "allocation is null/empty": "the file is empty, export the model again",
    "unresolved custom op": "LiteRT has no such operator: leave the layer out that made it, or register it",
    "Select TensorFlow op": "export without TensorFlow's own operators: LiteRT alone does not run them",
    "Didn't find op for builtin": "this LiteRT is older than the file: install a newer ai-edge-litert on the board",
    "Operation not permitted": "write board.real_time=false, or run with the right to such priorities (CAP_SYS_NICE)",
    "No module named": "pip install ai-edge-litert, on the board, for the Python that board.python names",
}


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Timing:
    """Fields of boards that take times.

    Attributes:
        threads: of the interpreter, pinned to as many processors.
        xnnpack: use LiteRT's fast kernels; without, its reference ones for every operator.
        runs: timed runs, at least so many.
        warmup: runs before them that are not counted.
        precision: go on until the 95 % confidence interval of the median is narrower than this share of it; with null
            a file gets its ``runs`` (and ten blocks of them) and no more.
        seconds: but for no longer than this after its ``runs``.
        real_time: run with real-time priority, so that other work does not interrupt; the system must allow it.
        timeout: seconds until the board is given up.
        channel_multiple: what channel pruning rounds to by default.
    """

    threads: Annotated[int, Ge(1), Le(1024)] = 1
    xnnpack: bool = True
    runs: Annotated[int, Ge(100), Le(1_000_000)] = 200
    warmup: Annotated[int, Ge(1), Le(1_000_000)] = 20
    precision: Annotated[float, Gt(0), Lt(1)] | None = 0.02
    seconds: Annotated[float, Ge(0), Le(3600)] = 1.0
    real_time: bool = False
    timeout: Annotated[float, Gt(0), Le(1e6)] = 600.0
    channel_multiple: Annotated[int, Ge(1), Le(1024)] = 1

    def worker_options(self) -> str:
        """Return the worker's first argument."""
        names = ("threads", "runs", "warmup", "precision", "seconds", "xnnpack", "real_time")
        return json.dumps({name: getattr(self, name) for name in names})


def read_times(board: str, printed: str, count: int) -> list[Measurement]:
    """Return what the worker's last line says of each of ``count`` files, every value checked."""
    try:
        answer = json.loads(printed.strip().splitlines()[-1])
        if set(answer) != {"files"} or len(answer["files"]) != count:
            raise ValueError("other files than asked for")
        return [_measurement(board, one) for one in answer["files"]]
    except (ValueError, IndexError, KeyError, TypeError, RecursionError):
        return [Measurement(board, None, f"unreadable answer {printed[:100]!r}")] * count


def with_next_step(reason: str) -> str:
    """Return the reason of a failure with what can be done about it, where that is known."""
    # LiteRT puts so much advice before the name of the operator that this would be cut off.
    reason = _ADVICE.sub("", reason)[:400]
    steps = [step for sign, step in _NEXT_STEPS.items() if sign.lower() in reason.lower()]
    return f"{reason.rstrip('.')}; {steps[0]}" if steps else reason


def _measurement(board: str, one: Mapping[str, Any]) -> Measurement:
    if set(one) == {"failure"} and isinstance(one["failure"], str):
        return Measurement(board, None, with_next_step(one["failure"][:600]) or "no reason given")
    if set(one) != _FIELDS:
        raise ValueError("other fields than expected")
    p50, p90, p99, mean, first = (_number(one[key], above=0) for key in _TIMES)
    if not p50 <= p90 <= p99:
        raise ValueError("percentiles that fall")
    runs, threads = (int(_number(one[key], above=0)) for key in ("runs", "threads"))
    width = None if one["interval"] is None else _number(one["interval"], above=-1)
    latency = Latency(p50, p90, p99, mean, runs=runs, threads=threads, first=first, interval=width)
    values = {"load_ms": _number(one["load_ms"], above=0), "cpu_ms": _number(one["cpu_ms"], above=-1)}
    if one["memory_bytes"] is not None:
        values["memory_bytes"] = _number(one["memory_bytes"], above=-1, most=1e15)
    notes: tuple[str, ...] = ()
    if threads == 1 and p50 > _BUSY * values["cpu_ms"] > 0:
        notes = (
            f"the processor was shared: half of the runs took {p50:.3f} ms, of which it ran {values['cpu_ms']:.3f} "
            "(real_time=true keeps others away)",
        )
    return Measurement(board, latency, values=values, notes=notes)


def _number(value: Any, *, above: float, most: float = _MOST) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("no number")
    if not (math.isfinite(value) and above < value <= most):
        raise ValueError("no number that can be meant")
    return float(value)
