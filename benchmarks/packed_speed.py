"""How fast packed files are decoded, and how fast the weights of VGG-16 are clustered.

    python benchmarks/packed_speed.py

Decoding: whole packed files of float32 weights, one core, the median of several runs; 50 MB/s are required. Clustering:
kernels of VGG-16's shapes, 138 million weights, into 32 values each, in less than 60 s on two cores. Both run in one
thread and are judged by the processor's time, so that other work on the machine counts neither way; the time on the
clock stands beside it. Writes ``results/packed_speed.md``.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.candidate import Coder
from compress.cli.experiment import machine, provenance
from compress.deploy.packed import Packed, read_packed, write_packed
from compress.deploy.packing import CODER_CHOICES
from compress.strategies.sharing.kmeans import cluster

Shapes = list[tuple[int, ...]]
CODERS: tuple[Coder, ...] = ("none", "huffman", "ans")
FLOOR, LIMIT, RUNS, CLUSTERS = 50.0, 60.0, 7, 32
SHORT = 16_000_000
"""Bytes of weights: smaller networks are read several times, for the processor's clock is coarse."""

LARGE: Shapes = [(4096, 1024)]
RESNET20: Shapes = [
    (3, 3, 3, 16),
    *[(3, 3, 16, 16)] * 6,
    (3, 3, 16, 32),
    *[(3, 3, 32, 32)] * 5,
    (3, 3, 32, 64),
    *[(3, 3, 64, 64)] * 5,
    (64, 10),
]
VGG16: Shapes = [
    *[(3, 3, a, b) for a, b in ((3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256))],
    *[(3, 3, a, b) for a, b in ((256, 512), *[(512, 512)] * 5)],
    *((25088, 4096), (4096, 4096), (4096, 1000)),
]


def trained_like(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Return weights as training leaves them: most near zero, scaled by the number of inputs."""
    fan_in = int(np.prod(shape[:-1]))
    return (rng.standard_t(5, shape) * np.sqrt(1 / fan_in)).astype(np.float32)


def sparse(weights: np.ndarray) -> np.ndarray:
    """Return the weights with the smallest 90 % of them zero."""
    return np.where(np.abs(weights) > np.quantile(np.abs(weights), 0.9), weights, np.float32(0))


def shared(weights: np.ndarray) -> np.ndarray:
    """Return the weights, clustered into 32 values."""
    codebook, labels = cluster(weights, CLUSTERS)
    return codebook[labels]


def grid(weights: np.ndarray) -> np.ndarray:
    """Return the weights, rounded to 8 bits with a step for each channel."""
    steps = np.abs(weights).reshape(-1, weights.shape[-1]).max(0) / np.float32(127)
    return np.rint(weights / steps) * steps


KINDS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "dense": lambda weights: weights,
    "sparse, 90 % zeros": sparse,
    "shared, 32 values": shared,
    "sparse and shared": lambda weights: shared(sparse(weights)),
    "grid of 8 bits": grid,
}


def decoding() -> list[str]:
    """Return the table of decoding speeds, measured on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    lines = [
        "| weights | size | coder | bytes in the file | MB/s | lowest | highest | MB/s by the clock | at least 50 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, change in KINDS.items():
        for size, shapes in (("a matrix of 4.2 M", LARGE), ("ResNet-20, 0.27 M", RESNET20)):
            rng = np.random.default_rng(0)
            arrays = {f"w{i}": change(trained_like(shape, rng)) for i, shape in enumerate(shapes)}
            total = sum(array.nbytes for array in arrays.values())
            for coder in CODERS:
                content = write_packed(Packed("keras", arrays), CODER_CHOICES[coder])
                times = timed(lambda c=content: read_packed(c, "benchmark"), calls=max(1, SHORT // total))
                speeds = [total / 1e6 / time.processor for time in times]
                clock = statistics.median(total / 1e6 / time.clock for time in times)
                again = read_packed(content, "benchmark").arrays
                if any(again[name].tobytes() != array.tobytes() for name, array in arrays.items()):
                    raise AssertionError(f"{kind}, {size}, {coder}: other weights came back")
                median = statistics.median(speeds)
                lines.append(
                    f"| {kind} | {size} | {coder} | {len(content):,} | {median:.0f} | {min(speeds):.0f} "
                    f"| {max(speeds):.0f} | {clock:.0f} | {'yes' if median >= FLOOR else '**no**'} |"
                )
                print(lines[-1], flush=True)
    os.sched_setaffinity(0, cores)
    return lines


@dataclass(frozen=True)
class Seconds:
    """What something took: of the processor's time, and by the clock."""

    processor: float
    clock: float


def seconds_of(action: Callable[[], object], calls: int = 1) -> Seconds:
    """Return what a call takes, the mean of ``calls``."""
    processor, clock = time.process_time(), time.perf_counter()
    for _ in range(calls):
        action()
    return Seconds((time.process_time() - processor) / calls, (time.perf_counter() - clock) / calls)


def timed(action: Callable[[], object], calls: int) -> list[Seconds]:
    """Return what each of several runs takes, after one that does not count."""
    action()
    return [seconds_of(action, calls) for _ in range(RUNS)]


def clustering() -> list[str]:
    """Return the lines about the clustering of all weights of VGG-16."""
    rng = np.random.default_rng(0)
    weights = [trained_like(shape, rng) for shape in VGG16]
    together = np.concatenate([kernel.ravel() for kernel in weights])
    each = seconds_of(lambda: [cluster(kernel, CLUSTERS) for kernel in weights])
    one = seconds_of(lambda: cluster(together, CLUSTERS))
    return [
        f"1-D k-means of {together.size:,} weights in VGG-16's shapes into {CLUSTERS} values: all weights, no sample, "
        "until nothing changes or for 100 iterations.",
        "",
        "| codebooks | seconds | seconds by the clock | under 60 |",
        "|---|---|---|---|",
        *(
            f"| {name} | {took.processor:.1f} | {took.clock:.1f} | {'yes' if took.processor < LIMIT else '**no**'} |"
            for name, took in ((f"one for each of the {len(weights)} kernels", each), ("one for all weights", one))
        ),
    ]


def main() -> None:
    """Measure and write the page."""
    lines = [
        "# Speed of packed files and of clustering",
        "",
        "Everything here runs in one thread. Seconds are the processor's, so that other work on the machine counts "
        "neither way; by the clock it took as long as its share of the two cores let it (load average "
        f"{os.getloadavg()[0]:.1f} at the start).",
        "",
        "## Decoding",
        "",
        f"From the bytes of a whole `.cmp` file to its float32 arrays, checksums included, on one core; {RUNS} runs "
        f"each, the median. At least {FLOOR:g} MB of float32 weights a second are required.",
        "",
        *decoding(),
        "",
        "## Clustering",
        "",
        *clustering(),
        *provenance("python benchmarks/packed_speed.py", [0], machine()),
    ]
    target = Path("results/packed_speed.md")
    target.write_text("\n".join(lines))
    print(target.read_text())


if __name__ == "__main__":
    main()
