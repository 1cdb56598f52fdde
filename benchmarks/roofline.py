"""How well does ``board=roofline`` estimate networks that its profile was not fitted to?

    python benchmarks/roofline.py [folder]

Twelve networks as float and as int8 files are measured on the host, in turns. Each network is then estimated by the
profile that is fitted to the other eleven. Measured rows are kept in ``results/roofline.jsonl``: remove it to measure
anew. ``folder`` keeps the files for the next time. Writes ``results/roofline.md``.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from compress.quiet import import_tensorflow

import_tensorflow()

import numpy as np  # noqa: E402
import timed_files  # noqa: E402
from finished_rows import FinishedRows, Row  # noqa: E402
from scipy.stats import kendalltau  # noqa: E402

from compress.boards.host import Host  # noqa: E402
from compress.boards.roofline import Work, work_of  # noqa: E402
from compress.boards.roofline_fit import fit_profile  # noqa: E402
from compress.candidate import Artifact, Storage  # noqa: E402
from compress.cli.experiment import machine, provenance  # noqa: E402
from compress.errors import CompressError  # noqa: E402
from compress.metrics.tflite_file import TFLiteFile  # noqa: E402

ASKED = 0.8


def measured(files: dict[tuple[str, str], Path]) -> list[Row]:
    """Return a row for each file, all of them measured in turns."""
    board = Host(real_time=os.geteuid() == 0)
    found = board.measure_all([Artifact(path, Storage()) for path in files.values()])
    rows = []
    for (name, kind), one in zip(files, found, strict=True):
        if one.latency_ms is None:
            raise CompressError(name, expected="a latency", received=str(one.failure), fix="Start again.")
        row = {"model": name, "type": kind, "p50": one.latency_ms.p50, "interval": one.latency_ms.interval}
        rows.append(row | {"cpu": one.values["cpu_ms"], "real_time": board.real_time})
    return rows


def page(rows: Sequence[Row], works: dict[tuple[str, str], Work]) -> str:
    def of(chosen: Sequence[Row]) -> tuple[list[Work], list[float]]:
        return [works[row["model"], row["type"]] for row in chosen], [row["p50"] for row in chosen]

    profiles = {
        name: fit_profile(*of([other for other in rows if other["model"] != name]))
        for name in dict.fromkeys(row["model"] for row in rows)
    }
    estimates = [float(profiles[row["model"]].times(works[row["model"], row["type"]]).sum()) for row in rows]
    p50 = np.array([row["p50"] for row in rows])
    estimate, macs = np.array(estimates), np.array([works[row["model"], row["type"]].macs.sum() for row in rows])
    kinds = np.array([row["type"] for row in rows])
    factor = np.exp(np.abs(np.log(estimate / p50)))
    whole = fit_profile(*of(rows), f"board=host, {machine()}")
    all_real_time = all(row["real_time"] for row in rows)
    lines = [
        "# The roofline's estimates of networks that it has not seen",
        "",
        "The estimate of each network comes from a profile fitted to the measured latencies of the other eleven, both "
        "their files. Latency: p50 of one sample on one thread of the host, all files measured in turns. Kendall's tau "
        f"is 1 if the estimates rank the files as the latencies do, 0 if they say nothing; {ASKED} is asked for. "
        "Counting multiply-adds alone is shown beside it.",
        "",
        "| files | Kendall's tau, estimate | asked | tau, multiply-adds alone | median error | largest error |",
        "|---|---|---|---|---|---|",
    ]
    for label, chosen in (("all", kinds != ""), *((kind, kinds == kind) for kind in timed_files.TYPES)):
        tau, plain = (float(kendalltau(v[chosen], p50[chosen]).statistic) for v in (estimate, macs))
        kept = "yes" if tau >= ASKED else "**no**"
        error = factor[chosen]
        lines.append(
            f"| {label} ({chosen.sum()}) | {tau:.3f} | {kept} | {plain:.3f} | {np.median(error) - 1:.0%} | "
            f"{error.max() - 1:.0%} |"
        )
    lines += [
        "",
        "An error of 20 % means a factor of 1.2, up or down. *Sure to*: the width of the 95 % confidence interval of "
        "the median latency. "
        + (
            "Measured with real-time priority: other work did not interrupt."
            if all_real_time
            else "On a machine with other work, long runs may be interrupted."
        ),
        "",
        "| network | type | multiply-adds | operators | latency ms | sure to | estimate ms | estimate / latency |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, value, count in zip(rows, estimate, macs, strict=True):
        operators, sure = len(works[row["model"], row["type"]].names), f"{row['interval']:.1%}"
        lines.append(
            f"| {row['model']} | {row['type']} | {count:,.0f} | {operators} | {row['p50']:.4f} | {sure} | "
            f"{value:.4f} | "
            f"{value / row['p50']:.2f} |"
        )
    lines += ["", "The profile fitted to all of them:", "", "```yaml", whole.to_yaml().strip(), "```"]
    return "\n".join([*lines, *provenance("python benchmarks/roofline.py", [0], machine())])


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        folder.mkdir(parents=True, exist_ok=True)
        wanted = [(name, kind) for name in timed_files.MODELS for kind in timed_files.TYPES]
        files = {key: timed_files.write(*key, folder) for key in wanted}
        works = {key: work_of(TFLiteFile.read(path)) for key, path in files.items()}
        rows = FinishedRows("roofline", ["model", "type"], lambda found: page(found, works))
        if not all(key in rows for key in wanted):
            rows.add_all(measured(files))
        rows.write_page()
    print(Path("results/roofline.md").read_text())


if __name__ == "__main__":
    main()
