"""What a sweep gains by the stage cache and by two processes, and what it costs in memory.

    python benchmarks/sweep_speed.py                 all rows that results/sweep_speed.jsonl does not hold yet
    python benchmarks/sweep_speed.py digits joblib   only these; the others: resnet20, memory

digits     12 pipelines that share beginnings, one after the other, with the cache off and on
resnet20   8 of them on ResNet-20 / CIFAR-10, likewise
joblib     the 12, with the cache off: one after the other, and by two processes
memory     100 pipelines one after the other in one process: resident memory after each

Every sweep starts with an empty folder; seconds are those of the whole command.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finished_rows import FinishedRows, Row, made
from kill_and_resume import untimed

TWELVE = (
    *("lowrank", "lowrank+prune", "lowrank+share", "lowrank+quantize", "lowrank+prune+share", "lowrank+prune+quantize"),
    *("prune", "prune+share", "prune+quantize", "prune_channels", "prune_channels+share", "prune_channels+quantize"),
)
EIGHT = tuple(
    name for name in TWELVE if not name.startswith("prune+") and name not in ("prune", "prune_channels+share")
)
QUICK = ("board.runs=100", "board.warmup=1", "board.precision=null")
DIGITS = (f"strategy={','.join(TWELVE)}", "recovery.epochs=10", *QUICK)
RESNET20 = (f"strategy={','.join(EIGHT)}", "model=resnet20", "data=cifar10", "recovery.epochs=0.25", *QUICK)
HUNDRED = ("strategy=prune", f"seed={','.join(map(str, range(100)))}", "recovery.epochs=1", "cache=off")


def sweep(folder: Path, *overrides: str, watch: Callable[[int], None] = lambda process: None) -> tuple[float, Any]:
    """Run a sweep in ``folder``; return its seconds, and what its reports say that is not of time."""
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "compress.run", "-m", *overrides, "hydra.sweep.dir=sweep"]
    folder.mkdir(parents=True)
    started = time.monotonic()
    with (folder / "output.txt").open("wb") as output:
        running = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
        watch(running.pid)
        code = running.wait()
    seconds = time.monotonic() - started
    if code:
        raise SystemExit((folder / "output.txt").read_text(errors="replace")[-3000:])
    reports = sorted(folder.glob("sweep/*/report.json"), key=lambda file: int(file.parent.name))
    return seconds, [untimed(json.loads(file.read_text())) for file in reports]


def compare(row: str, first: tuple[str, ...], second: tuple[str, ...]) -> Row:
    """Run the same sweep in two ways, one after the other."""
    with tempfile.TemporaryDirectory(prefix="compress-") as work:
        before, expected = sweep(Path(work, "first"), *first)
        after, found = sweep(Path(work, "second"), *second)
    same = [one == other for one, other in zip(expected, found, strict=True)]
    return {"row": row, "pipelines": len(same), "first": before, "second": after, "same": sum(same), **_load()}


def memory() -> Row:
    """Return the resident megabytes after each pipeline of one process."""
    kept: dict[int, float] = {}

    def watch(process: int) -> None:
        status = Path(f"/proc/{process}/status")
        while True:
            try:
                text = status.read_text()
            except OSError:
                return
            found = re.search(r"VmRSS:\s+(\d+)", text)
            if found is None:
                return
            done = len(list(Path(work, "one", "sweep").glob("*/report.json")))
            kept[done] = int(found[1]) / 1024
            time.sleep(0.1)

    with tempfile.TemporaryDirectory(prefix="compress-") as work:
        seconds, reports = sweep(Path(work, "one"), *HUNDRED, *QUICK, watch=watch)
    count = len(reports)
    return {
        "row": "memory",
        "pipelines": count,
        "tenth": kept[10],
        "last": kept[count - 1],
        "first": seconds,
        **_load(),
    }


def _load() -> Row:
    return {"load": os.getloadavg()[0], "cores": len(os.sched_getaffinity(0))}


def measure(name: str) -> Row:
    """Return one row."""
    if name == "memory":
        return memory()
    if name == "joblib":
        two = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
        return compare(name, (*DIGITS, "cache=off"), (*DIGITS, "cache=off", *two))
    grid = DIGITS if name == "digits" else RESNET20
    return compare(name, (*grid, "cache=off"), grid)


def page(rows: list[Row]) -> str:
    """Return the table."""
    titles = {
        "digits": ("12 pipelines on digits", "cache off", "cache on", "at most 0.55"),
        "resnet20": ("8 pipelines on ResNet-20", "cache off", "cache on", "at most 0.55"),
        "joblib": ("12 pipelines on digits, cache off", "serial", "joblib, 2 processes", "at most 0.625 (1.6x)"),
    }
    lines = ["# What a sweep gains by the stage cache and by two processes, and what it costs in memory", ""]
    lines += ["| sweep | s | s | ratio | wanted | same numbers | load at the end |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        if row["row"] == "memory":
            continue
        what, first, second, wanted = titles[row["row"]]
        lines.append(
            f"| {what} | {first}: {row['first']:.0f} | {second}: {row['second']:.0f} | "
            f"{row['second'] / row['first']:.2f} | {wanted} | {_same(row)} | {row['load']:.1f} |"
        )
    for row in (row for row in rows if row["row"] == "memory"):
        lines += [
            "",
            f"Resident memory of one process that runs {row['pipelines']} pipelines on digits: {row['tenth']:.0f} MB "
            f"after the tenth, {row['last']:.0f} MB after the last but one: {row['last'] / row['tenth']:.2f}x "
            f"(wanted: at most 1.2x); {row['first']:.0f} s.",
        ]
    lines += [
        "",
        "Numbers are the same if all that the reports say is, but for times: accuracies to the last digit, bytes,",
        "parameters. They are not compared where processes have half of the threads each: sums are in another order",
        "then. Latencies are measured 100 times only.",
    ]
    lines += made("python benchmarks/sweep_speed.py", [0, "0 to 99 for the memory"], rows)
    return "\n".join(lines)


def _same(row: Row) -> str:
    # Each of two processes has half of the threads, and sums in another order.
    return "not compared" if row["row"] == "joblib" else f"{row['same']} of {row['pipelines']}"


def main() -> None:
    """Measure what is not there yet, or the rows that are named."""
    names = sys.argv[1:] or ["digits", "resnet20", "joblib", "memory"]
    rows = FinishedRows("sweep_speed", ["row"], page)
    for name in names:
        if (name,) not in rows:
            rows.add(measure(name))
    rows.write_page()


if __name__ == "__main__":
    main()
