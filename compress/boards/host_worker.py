"""Times ``.tflite`` files with LiteRT, in turns; a program of its own that imports nothing of this project.

    python -P host_worker.py OPTIONS MODEL.tflite ...
    python -P host_worker.py --outputs MODEL.tflite OPTIONS

OPTIONS is a JSON object with threads, runs, warmup, precision (or null), seconds, xnnpack and real_time. Each file is
run by a process of its own: a crash leaves the others alone, and its memory can be told. The files take turns, a
block of runs each and in the opposite order every other round, so that what slows the machine down for a while slows
all of them. It goes on until every file has its runs and the confidence interval of its median is narrower than
``precision`` of it, but for no more than ``seconds`` for each file beyond its runs. With ``attached`` it ends when its
standard input does.

Prints one JSON object, ``{"files": [...]}``: p50, p90, p99, mean, first (milliseconds), interval (or null), runs,
threads, load_ms, cpu_ms (processor time of a run), memory_bytes (or null) of each file; or failure.

With ``--outputs`` nothing is timed: ``samples`` inputs made from a seed are run, and what comes out is written to the
file ``outputs`` (.npz, both in OPTIONS). Prints one JSON object: machine, litert (its version), and inputs, a checksum.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from typing import Any

BLOCK_MS = 10.0
BLOCK_RUNS = 5
BLOCKS = 10
"""A turn lasts so many milliseconds and is at least so many runs; each file gets at least so many turns."""
NORMAL = 1.96


def main() -> None:
    """Time the files, or be one of the processes that run them, or say what comes out."""
    if sys.argv[1] == "--run":
        run(sys.argv[2], json.loads(sys.argv[3]))
    elif sys.argv[1] == "--outputs":
        write_outputs(sys.argv[2], json.loads(sys.argv[3]))
    else:
        options = json.loads(sys.argv[1])
        if options.get("attached"):
            threading.Thread(target=end_with_input, daemon=True).start()
        print(json.dumps({"files": time_files(sys.argv[2:], options)}))


def end_with_input() -> None:
    """End this process when standard input does; those that run files end with it."""
    while os.read(0, 4096):
        pass
    os._exit(1)


def time_files(models: list, options: dict) -> list:
    """Return what is known of each file."""
    children = [Child(model, options) for model in models]
    try:
        for child in children:
            child.get_ready()
        started, turn = time.monotonic(), 0
        while not all(child.is_done(options) for child in children):
            alive = [child for child in children if child.failure is None]
            enough = all(child.has_runs(options) for child in alive)
            if enough and time.monotonic() - started > options["seconds"] * len(models):
                break
            # What another file has left in the caches is not this one's: its first run is not counted.
            for child in alive if turn % 2 == 0 else reversed(alive):
                child.block(settle=1 if len(alive) > 1 else 0)
            turn += 1
            if not enough:
                started = time.monotonic()
        return [child.answer(options) for child in children]
    finally:
        for child in children:
            child.close()


class Child:
    """A process that runs one file."""

    def __init__(self, model: str, options: dict) -> None:
        self.failure: str | None = None
        self._blocks: list = []
        self._cpu: list = []
        self._facts: dict[str, float] = {}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process
        safe = ["-P"] if getattr(sys.flags, "safe_path", False) else []
        self._process = subprocess.Popen(
            [sys.executable, *safe, os.path.abspath(__file__), "--run", model, json.dumps(options)],  # noqa: PTH100
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("no pipes")
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

    def get_ready(self) -> None:
        """Wait until the file is loaded and warm."""
        self._facts = self._read() or {}

    def block(self, settle: int) -> None:
        """Run the file for a while."""
        answer = self._ask(f"{self._block_runs()} {settle}")
        if answer:
            self._blocks.append(answer["times"])
            self._cpu.append(answer["cpu_ms"])

    def _block_runs(self) -> int:
        shortest = self._facts["warm_ms"] if not self._blocks else percentile(sorted(self._blocks[-1]), 50)
        return min(max(BLOCK_RUNS, math.ceil(BLOCK_MS / max(shortest, 1e-3))), 10_000)

    def has_runs(self, options: dict) -> bool:
        """Say whether it has run as often as it must."""
        return len(self._blocks) >= BLOCKS and sum(map(len, self._blocks)) >= options["runs"]

    def is_done(self, options: dict) -> bool:
        """Say whether it needs no more runs."""
        if self.failure is not None:
            return True
        width = interval([percentile(sorted(block), 50) for block in self._blocks])
        precise = options["precision"] is None or (width is not None and width <= options["precision"])
        return precise and self.has_runs(options)

    def answer(self, options: dict) -> dict:
        """Return what is known of the file."""
        memory = self._ask("memory") if self.failure is None else None
        if self.failure is not None:
            return {"failure": self.failure}
        times = sorted(milliseconds for block in self._blocks for milliseconds in block)
        return {
            **{f"p{share}": percentile(times, share) for share in (50, 90, 99)},
            "mean": math.fsum(times) / len(times),
            "first": self._facts["first"],
            "interval": interval([percentile(sorted(block), 50) for block in self._blocks]),
            "runs": len(times),
            "threads": options["threads"],
            "load_ms": self._facts["load_ms"],
            "cpu_ms": percentile(sorted(self._cpu), 50),
            "memory_bytes": memory,
        }

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._stdin, self._stdout, self._errors):
            # A pipe to a process that is gone may still hold a question.
            with contextlib.suppress(OSError):
                stream.close()

    def _ask(self, question: str) -> Any:
        try:
            self._stdin.write(question.encode() + b"\n")
            self._stdin.flush()
        except OSError:
            pass  # It has ended; reading says how.
        return self._read()

    def _read(self) -> Any:
        """Return the next thing that it says; if it has ended, keep the reason."""
        line = self._stdout.readline()
        try:
            return json.loads(line)
        except ValueError:
            code = self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read()[-10_000:].decode(errors="replace").strip().splitlines()
            self.failure = f"the runtime ended with code {code}: {lines[-1][:500] if lines else ''}".rstrip(": ")
            return None


def percentile(ordered: list, share: float) -> float:
    """Return a percentile of sorted values, between two of them on a straight line."""
    place = (len(ordered) - 1) * share / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def interval(medians: list) -> float | None:
    """Return how wide the 95 % confidence interval of the median is, as a share of the median; None: too few values.

    The interval lies between two of the values, whatever their distribution (Conover, Practical Nonparametric
    Statistics, 1999, section 3.2). The values are medians of blocks: neighbouring runs are too much alike to count as
    independent.
    """
    count = len(medians)
    low = math.floor((count - NORMAL * math.sqrt(count)) / 2)
    if low < 1:
        return None
    ordered = sorted(medians)
    high = min(1 + math.ceil((count + NORMAL * math.sqrt(count)) / 2), count)
    return (ordered[high - 1] - ordered[low - 1]) / percentile(ordered, 50)


def run(model: str, options: dict) -> None:
    """Load the file and run it as standard input asks for; the threads are pinned to as many processors."""
    import numpy as np

    if hasattr(os, "sched_setaffinity"):
        # A container may forbid it; the timing is then only noisier.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options["threads"] :])
    if options["real_time"]:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    kind, kernels = interpreter_of(options)
    before = memory_at_most(reset=True)
    started = time.perf_counter_ns()
    interpreter = kind(model_path=model, **kernels)
    interpreter.allocate_tensors()
    load_ms = (time.perf_counter_ns() - started) / 1e6
    generator = np.random.default_rng(0)
    for detail in interpreter.get_input_details():
        # Below one: as a whole number it is zero, which every vocabulary has.
        interpreter.set_tensor(detail["index"], generator.uniform(0, 1, detail["shape"]).astype(detail["dtype"]))

    def times(count: int) -> list:
        taken = []
        for _ in range(count):
            begun = time.perf_counter_ns()
            interpreter.invoke()
            taken.append((time.perf_counter_ns() - begun) / 1e6)
        return taken

    first = times(1)[0]
    warm = sorted(times(options["warmup"]))
    print(json.dumps({"first": first, "load_ms": load_ms, "warm_ms": percentile(warm, 50)}), flush=True)
    for line in sys.stdin:
        answer: Any
        if line.strip() == "memory":
            after = memory_at_most(reset=False)
            answer = None if before is None or after is None else max(after - before, 0)
        else:
            count, settle = map(int, line.split())
            times(settle)
            begun = time.process_time_ns()
            answer = {"times": times(count)}
            answer["cpu_ms"] = (time.process_time_ns() - begun) / 1e6 / count
        print(json.dumps(answer), flush=True)


def interpreter_of(options: dict) -> tuple:
    """Return LiteRT's interpreter and the arguments that it is to be made with."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kernels = OpResolverType.AUTO if options["xnnpack"] else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    return Interpreter, {"num_threads": options["threads"], "experimental_op_resolver_type": kernels}


def write_outputs(model: str, options: dict) -> None:
    """Run the file on inputs made from a seed and write what comes out."""
    from importlib.metadata import version

    import numpy as np

    kind, kernels = interpreter_of(options)
    interpreter = kind(model_path=model, **kernels)
    interpreter.allocate_tensors()
    generator = np.random.default_rng(0)
    found, checksum = {}, 0
    for sample in range(options["samples"]):
        interpreter.reset_all_variables()
        for detail in interpreter.get_input_details():
            # Some models read pixels, others numbers below one.
            values = random_input(generator, detail["shape"], np.dtype(detail["dtype"]), 255 if sample % 2 else 1)
            checksum = zlib.crc32(values.tobytes(), checksum)
            interpreter.set_tensor(detail["index"], values)
        interpreter.invoke()
        for number, detail in enumerate(interpreter.get_output_details()):
            found[f"{number}_{sample}"] = interpreter.get_tensor(detail["index"])
    np.savez(options["outputs"], **found)
    print(json.dumps({"machine": platform.machine(), "litert": version("ai-edge-litert"), "inputs": checksum}))


def random_input(generator: Any, shape: Any, dtype: Any, largest: int) -> Any:
    """Return floats up to ``largest``, all that a small integer can be, or zeros of larger ones (indices)."""
    if dtype.kind == "f":
        return generator.uniform(0, largest, shape).astype(dtype)
    if dtype.kind in "iu" and dtype.itemsize == 1:
        return generator.integers(*((-128, 128) if dtype.kind == "i" else (0, 256)), shape).astype(dtype)
    return generator.integers(0, 1, shape).astype(dtype)


def memory_at_most(*, reset: bool) -> int | None:
    """Return the most bytes of memory that this process has held; with ``reset``, those that it holds now.

    None where the system does not tell.
    """
    try:
        if reset:
            with open("/proc/self/clear_refs", "w") as switch:
                switch.write("5")
        with open("/proc/self/status") as status:
            lines = dict(line.split(":", 1) for line in status)
        return 1024 * int(lines["VmHWM"].split()[0])
    except (OSError, KeyError, ValueError):
        return None


if __name__ == "__main__":
    main()
