"""Kill a sweep at random moments, run it again, and compare with one that was left alone.

python benchmarks/kill_and_resume.py --kills 20 -o results/kill_and_resume.md

Each kill is a SIGKILL to the whole process group at a moment drawn evenly over the time that the sweep takes alone. The
same command then continues. A sweep that comes to its end is compared with the undisturbed one (numbers, bytes of the
files), checked for partial files and for MLflow runs left RUNNING, and another one is begun, until there were enough
kills. Exit code 1: something differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.cli.experiment import machine, provenance

SWEEP = (
    "strategy=lowrank,lowrank+prune,lowrank+prune+quantize,prune+share",
    "recovery.epochs=20",
    "board.runs=100",
    "board.warmup=1",
    "board.precision=null",
)
TIMED = ("latency_ms", "latency_failure", "on_board", "speedup", "estimate_ms", "seconds", "cached", "versions")
"""What a report says of time, and of the program itself: it differs from run to run."""
LEFT_BEHIND = (
    "cache/.partial-*",
    "cache/*/.partial-*",
    "cache/.trainings/*",
    "sweep/*/.stages-*",
    "sweep/.running.lock",
    "sweep/*/.running.lock",
    ".compress_unsent/*",
)
"""Files that are there while a sweep is at work, and not after it."""


@dataclass
class Place:
    """The folder of a sweep: its results, its cache, its MLflow store."""

    folder: Path
    overrides: tuple[str, ...]
    findings: list[str] = field(default_factory=list)

    def start(self) -> subprocess.Popen[bytes]:
        """Start the sweep in a process group of its own."""
        command = [sys.executable, "-m", "compress.run", "-m", *self.overrides, "hydra.sweep.dir=sweep"]
        store = f"tracking.uri=sqlite:///{self.folder}/mlflow.db"
        self.folder.mkdir(parents=True, exist_ok=True)
        root = str(Path(__file__).resolve().parent.parent)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
        with (self.folder / "output.txt").open("ab") as output:
            return subprocess.Popen(
                [*command, store, "cache.dir=cache"],
                cwd=self.folder,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def clear(self) -> None:
        """Begin anew."""
        shutil.rmtree(self.folder)

    def results(self) -> dict[str, Any]:
        """Return, by job, what must not depend on kills."""
        found: dict[str, Any] = {}
        for report in sorted(self.folder.glob("sweep/*/report.json")):
            found[report.parent.name] = {
                "numbers": untimed(json.loads(report.read_text())),
                "tflite": (report.parent / "model.tflite").read_bytes(),
            }
        return found

    def check(self, calm: dict[str, Any], name: str) -> None:
        """Compare a finished sweep with the undisturbed one."""
        mine = self.results()
        if mine != calm:
            jobs = [job for job in calm if mine.get(job) != calm[job]]
            self.findings.append(f"{name}: other numbers or bytes in jobs {', '.join(jobs)}")
        for pattern in LEFT_BEHIND:
            self.findings += [f"{name}: left behind {file}" for file in self.folder.glob(pattern)]
        self.findings += [f"{name}: MLflow run {run} is left {status}" for run, status in self.unfinished()]

    def unfinished(self) -> list[tuple[str, str]]:
        """Return the runs in MLflow that nobody has closed."""
        from mlflow.tracking import MlflowClient

        client = MlflowClient(f"sqlite:///{self.folder}/mlflow.db")
        experiment = client.get_experiment_by_name("compress")
        runs = [] if experiment is None else client.search_runs([experiment.experiment_id], max_results=5000)
        return [(run.info.run_id, run.info.status) for run in runs if run.info.status in ("RUNNING", "SCHEDULED")]


def untimed(value: Any) -> Any:
    """Return a report without what it says of time, and of this run alone."""
    if isinstance(value, dict):
        return {key: untimed(item) for key, item in value.items() if key not in (*TIMED, "notes", "ratios")}
    return [untimed(item) for item in value] if isinstance(value, list) else value


def main() -> int:
    """Run it; print a line for each kill."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", default=list(SWEEP), help="the sweep (default: four digits pipelines)")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, default=Path("outputs/kill_and_resume"))
    parser.add_argument("-o", "--output", type=Path, help="also write the table to this Markdown file")
    given = parser.parse_args()
    folder = given.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    calm = Place(folder / "calm", tuple(given.overrides))
    started = time.monotonic()
    if calm.start().wait():
        print((calm.folder / "output.txt").read_text()[-3000:], file=sys.stderr)
        return 1
    alone = time.monotonic() - started
    expected = calm.results()
    print(f"undisturbed: {len(expected)} pipelines in {alone:.0f} s", flush=True)

    moments, sweeps = random.Random(given.seed), 0
    killed = Place(folder / "killed", tuple(given.overrides))
    rows: list[str] = []
    while True:
        running = killed.start()
        enough = len(rows) >= given.kills
        moment = moments.uniform(0.0, alone)
        try:
            code = running.wait(timeout=None if enough else moment)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
            last = (killed.folder / "output.txt").read_text(errors="replace").strip().rpartition("\n")[2]
            rows.append(f"| {len(rows) + 1} | {moment:.1f} | {last.partition(' - ')[2][:60].replace('|', ' ')} |")
            print(rows[-1], flush=True)
            continue
        sweeps += 1
        if code:
            killed.findings.append(f"sweep {sweeps}: exit code {code}")
        killed.check(expected, f"sweep {sweeps}")
        if enough or killed.findings:
            break
        killed.clear()
    verdict = (
        "; ".join(killed.findings) or "all numbers, and all bytes of the files, are those of the undisturbed sweep"
    )
    command = f"python benchmarks/kill_and_resume.py --kills {given.kills} --seed {given.seed}"
    lines = [
        "# Killed and run again",
        "",
        f"{len(rows)} times SIGKILL at a random moment of a sweep of {len(expected)} pipelines, {sweeps} sweeps "
        f"brought to their end by the same command: {verdict}.",
        "",
        "| kill | s after the start | what it was at |",
        "|---|---|---|",
        *rows,
        "",
        f"The sweep: `{' '.join(given.overrides)}`, {alone:.0f} s undisturbed.",
        *provenance(command, [given.seed], machine()),
    ]
    if given.output is not None:
        given.output.write_text("\n".join(lines))
    print(verdict)
    return 1 if killed.findings else 0


if __name__ == "__main__":
    sys.exit(main())
