"""The same file measured twice on the host board: how far apart are the medians, in turns and one after the other?

    python benchmarks/same_file_twice.py

Twenty tries for each file and each way, the two ways alternating. Writes ``results/same_file_twice.md``.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from compress.quiet import import_tensorflow

import_tensorflow()

import numpy as np  # noqa: E402
import timed_files  # noqa: E402

from compress.boards.host import Host  # noqa: E402
from compress.candidate import Artifact, Measurement, Storage  # noqa: E402
from compress.cli.experiment import machine, provenance  # noqa: E402
from compress.errors import CompressError  # noqa: E402

FILES = (("DS-CNN", "float32"), ("DS-CNN", "int8"), ("ResNet-8", "float32"), ("ResNet-20", "float32"))
TRIES, ALLOWED, LIMIT = 20, 1, 0.03
IN_TURNS, APART = "in turns", "one after the other"


def p50(one: Measurement) -> float:
    if one.latency_ms is None:
        raise CompressError("host", expected="a latency", received=str(one.failure), fix="Start again.")
    return one.latency_ms.p50


def difference(board: Host, artifact: Artifact, way: str) -> float:
    """Return how much larger one of the two medians is, as a share of the other."""
    pair = board.measure_all([artifact] * 2) if way == IN_TURNS else [board.measure(artifact) for _ in range(2)]
    low, high = sorted(map(p50, pair))
    return high / low - 1


def main() -> None:
    board, load = Host(), os.getloadavg()[0]
    lines = [
        "# The same file measured twice",
        "",
        f"{TRIES} tries for each row; each measures one file twice with `board=host` as it is by default. *In turns*: "
        "blocks of runs of the two alternate, as the pipeline measures every stage beside its baseline and "
        "`compress.measure` several files. *One after the other*: two measurements, a second or so apart. The "
        f"difference of the two medians should be below {LIMIT:.0%} in {TRIES - ALLOWED} of {TRIES} tries; *second "
        "largest* is the number that must be.",
        "",
        f"| file | measured | below {LIMIT:.0%} | median difference | second largest | largest | kept |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in FILES:
            artifact = Artifact(timed_files.write(name, kind, Path(folder)), Storage())
            found = {IN_TURNS: [], APART: []}
            for number in range(TRIES):
                for way in (IN_TURNS, APART) if number % 2 else (APART, IN_TURNS):
                    found[way].append(difference(board, artifact, way))
            for way, values in found.items():
                ordered = sorted(values)
                below = int(np.sum(np.array(values) < LIMIT))
                kept = "yes" if below >= TRIES - ALLOWED else "**no**"
                lines.append(
                    f"| {name}, {kind} | {way} | {below} of {TRIES} | {np.median(values):.2%} | {ordered[-2]:.2%} | "
                    f"{ordered[-1]:.2%} | {kept} |"
                )
                print(lines[-1], flush=True)
    lines += [
        "",
        f"Other work was running meanwhile: {load:.1f} processes wanted one of {os.cpu_count()} processors when it "
        f"began, {os.getloadavg()[0]:.1f} when it ended.",
        *provenance("python benchmarks/same_file_twice.py", [0], machine()),
    ]
    Path("results/same_file_twice.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
