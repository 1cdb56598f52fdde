"""Times a ``.tflite`` file with LiteRT; a program of its own that imports nothing of this project.

    python -P host_worker.py MODEL.tflite THREADS RUNS WARMUP

Prints one JSON object: p50, p90, p99, mean (milliseconds for one sample), runs, threads.
"""

import contextlib
import json
import os
import sys
import time

import numpy as np
from ai_edge_litert.interpreter import Interpreter


def main() -> None:
    """Read the arguments, time, print."""
    model, threads, runs, warmup = sys.argv[1], *map(int, sys.argv[2:5])
    print(json.dumps(time_file(model, threads, runs, warmup)))


def time_file(model: str, threads: int, runs: int, warmup: int) -> dict:
    """Return the latency of one inference; the interpreter's threads are pinned to as many processors."""
    if hasattr(os, "sched_setaffinity"):
        # A container may forbid it; the timing is then only noisier.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    interpreter = Interpreter(model_path=model, num_threads=threads)
    interpreter.allocate_tensors()
    detail = interpreter.get_input_details()[0]
    # Below one: as a whole number it is zero, which every vocabulary has.
    values = np.random.default_rng(0).uniform(0, 1, detail["shape"]).astype(detail["dtype"])
    interpreter.set_tensor(detail["index"], values)
    for _ in range(warmup):
        interpreter.invoke()
    milliseconds = np.empty(runs)
    for run in range(runs):
        started = time.perf_counter_ns()
        interpreter.invoke()
        milliseconds[run] = (time.perf_counter_ns() - started) / 1e6
    p50, p90, p99 = np.percentile(milliseconds, [50, 90, 99])
    return {
        "p50": float(p50),
        "p90": float(p90),
        "p99": float(p99),
        "mean": float(milliseconds.mean()),
        "runs": runs,
        "threads": threads,
    }


if __name__ == "__main__":
    main()
