"""Settings of ``experiments/deep_compression``, compared on validation data: no test image is looked at.

    python benchmarks/deep_compression_settings.py [lenet_300_100 | lenet5]

Every candidate is a pipeline, run with seed 0 and measured on the validation part that the data source holds out. The
rules that choose are fixed beforehand: ``compressed`` is the candidate with the lowest error among those that reach the
paper's factor, ``further`` the smallest file among those whose error is below the floor by a margin for chance. Writes
``results/deep_compression/settings.md``; a killed command run again continues.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from compress.quiet import import_tensorflow

import_tensorflow()

import tf_keras  # noqa: E402
from finished_rows import FinishedRows, Row  # noqa: E402

from compress.cli.build import make_plan  # noqa: E402
from compress.cli.compose import compose_config  # noqa: E402
from compress.cli.construct import to_plain  # noqa: E402
from compress.cli.experiment import machine, provenance  # noqa: E402
from compress.data.source import Data  # noqa: E402
from compress.errors import CompressError  # noqa: E402
from compress.tracking.report import make_report  # noqa: E402

MARGIN = 0.2
"""Points: about one standard deviation of an error of 1.7 % on 6,000 images."""


@dataclass(frozen=True)
class Floor:
    """What the paper, or the project's issue, asks of a row: error in percent at most, times smaller at least."""

    error: float
    rate: float


@dataclass(frozen=True)
class Network:
    """A network with its floors, the overrides of all its candidates, and the candidates."""

    compressed: Floor
    further: Floor
    common: tuple[str, ...]
    candidates: Mapping[str, Mapping[str, tuple[str, ...]]]


def _prune(sparsity: float, epochs: int, rate: float, ramp: float) -> tuple[str, ...]:
    return (
        f"strategy.prune.sparsity={sparsity}",
        "strategy.prune.ranking=global",
        f"strategy.prune.ramp={ramp}",
        f"strategy.prune.recovery.epochs={epochs}",
        f"strategy.prune.recovery.learning_rate={rate}",
    )


def _deep_compression(
    sparsity: float, clusters: int, epochs: tuple[int, int], rate: float, ramp: float = 0.25, coder: str = "huffman"
) -> tuple[str, ...]:
    return (
        "strategy=prune+share+pack",
        *_prune(sparsity, epochs[0], rate, ramp),
        f"strategy.share.clusters={clusters}",
        f"strategy.share.recovery.epochs={epochs[1]}",
        f"strategy.pack.coder={coder}",
    )


def _rate_distortion(sparsity: float, size: float, epochs: tuple[int, int], rate: float) -> tuple[str, ...]:
    return (
        "strategy=prune+rate_distortion",
        *_prune(sparsity, epochs[0], rate, 0.5),
        f"strategy.rate_distortion.bytes={size}",
        f"strategy.rate_distortion.recovery.epochs={epochs[1]}",
    )


def _cut_first(
    params: float, sparsity: float, end: tuple[str, ...], epochs: tuple[int, int], rate: float
) -> tuple[str, ...]:
    name = end[0].partition(".")[2].partition(".")[0]
    return (
        f"strategy=prune_channels+prune+{name}",
        f"strategy.prune_channels.params={params}",
        f"strategy.prune_channels.recovery.epochs={epochs[0]}",
        f"strategy.prune_channels.recovery.learning_rate={rate}",
        *_prune(sparsity, epochs[0], rate, 0.5),
        *end,
        f"strategy.{name}.recovery.epochs={epochs[1]}",
    )


NETWORKS: dict[str, Network] = {
    "lenet_300_100": Network(
        Floor(1.58, 40),
        Floor(1.70, 80),
        ("data=mnist", "data.shift=1", "model=lenet_300_100", "model.train.epochs=20", "model.train.learning_rate=0.1"),
        {
            "compressed": {
                f"sparsity {sparsity}, {clusters} values": _deep_compression(sparsity, clusters, (10, 4), 0.05)
                for sparsity, clusters in ((0.91, 16), (0.92, 16), (0.93, 16))
            },
            "further": {
                **{
                    f"sparsity {sparsity}, {clusters} values": _deep_compression(
                        sparsity, clusters, (20, 4), 0.05, 0.5, "smallest"
                    )
                    for sparsity, clusters in ((0.96, 8), (0.97, 8))
                },
                **{
                    f"sparsity {sparsity}, then values that cost few bits, {size} of the bytes": _rate_distortion(
                        sparsity, size, (20, 4), 0.05
                    )
                    for sparsity, size in ((0.96, 0.01), (0.97, 0.008))
                },
            },
        },
    ),
    "lenet5": Network(
        Floor(0.74, 39),
        Floor(0.90, 200),
        (
            *("data=mnist", "data.shift=1", "model=lenet5", "model.train.epochs=10", "model.train.learning_rate=0.05"),
            "model.train.weight_decay=0.0005",
        ),
        {
            "compressed": {
                f"sparsity {sparsity}, {clusters} values": _deep_compression(sparsity, clusters, (6, 2), 0.02)
                for sparsity, clusters in ((0.92, 16), (0.95, 16))
            },
            "further": {
                "sparsity 0.99, 8 values": _deep_compression(0.99, 8, (8, 2), 0.02, 0.5, "smallest"),
                "sparsity 0.99, then values that cost few bits, 0.004 of the bytes": _rate_distortion(
                    0.99, 0.004, (8, 2), 0.02
                ),
                "sparsity 0.989, 8 values, 24 epochs": _deep_compression(0.989, 8, (20, 4), 0.02, 0.5, "smallest"),
                "channels cut to 0.1 of the parameters, sparsity 0.9, 8 values": _cut_first(
                    0.1, 0.9, ("strategy.share.clusters=8",), (8, 3), 0.005
                ),
                "channels cut to 0.15 of the parameters, sparsity 0.9, 8 values, 28 epochs": _cut_first(
                    0.15, 0.9, ("strategy.share.clusters=8",), (12, 4), 0.005
                ),
            },
        },
    ),
}


def measure(overrides: tuple[str, ...]) -> Row:
    """Return errors on the validation part in percent, and times smaller than 4 bytes a parameter; or why not."""
    tf_keras.backend.clear_session()
    config = compose_config([*overrides, "tracking=none", "seed=0"])
    pipeline = make_plan(config).pipeline()
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = replace(pipeline, data=_without_test(pipeline.data)).run(Path(folder))
        except CompressError as error:
            return {"failed": " ".join(str(error).split())}
        report = make_report(result, to_plain(config), seconds=0.0)
    return {
        "reference": 100 - report["baseline"]["accuracy"],
        "error": 100 - report["final"]["accuracy"],
        "rate": report["ratios"]["compression_rate"],
    }


def _without_test(data: Data) -> Data:
    return replace(data, test=data.validation, identity=f"{data.identity}, measured on the validation part")


def page(rows: list[Row]) -> str:
    """Return the Markdown page."""
    lines = [
        "# Settings of Deep Compression, chosen on validation data",
        "",
        "Errors are those of the 6,000 training images that the data source holds out, with seed 0. Rules, fixed "
        "before the comparison: of the candidates for the paper's row, the lowest error that reaches the paper's "
        "factor (of equal ones the smaller file); of those for the row `further`, the smallest file with an error at "
        f"least {MARGIN} points below the floor; if there is none, the lowest error that reaches the factor. The "
        "last three candidates of LeNet-5 were added after the others had failed on these images.",
        "",
        "| network | row | candidate | reference error % | error % | times smaller | chosen |",
        "|---|---|---|---|---|---|---|",
    ]
    for network, settings in NETWORKS.items():
        for role in settings.candidates:
            own = [row for row in rows if (row["network"], row["role"]) == (network, role)]
            best = choose(own, role, getattr(settings, role))
            for row in own:
                numbers = f"{row['reference']:.2f} | {row['error']:.2f} | {row['rate']:.1f}" if "rate" in row else ""
                numbers = numbers or f"{row['failed']} | |"
                lines.append(f"| {network} | {role} | {row['candidate']} | {numbers} | {'**yes**' * (row is best)} |")
    command = "python benchmarks/deep_compression_settings.py"
    return "\n".join([*lines, *provenance(command, [0], machine())])


def choose(rows: list[Row], role: str, floor: Floor) -> Row | None:
    """Return the row that the rules choose; None if no candidate reaches the factor."""
    small = [row for row in rows if row.get("rate", 0) >= floor.rate]
    good = [row for row in small if row["error"] <= floor.error - MARGIN]
    if role == "further" and good:
        return max(good, key=lambda row: row["rate"])
    return min(small, key=lambda row: (round(row["error"], 4), -row["rate"]), default=None)


def main() -> None:
    """Run the candidates that are left."""
    finished = FinishedRows("deep_compression/settings", ("network", "role", "candidate"), page)
    for network in sys.argv[1:] or NETWORKS:
        settings = NETWORKS[network]
        for role, candidates in settings.candidates.items():
            for name, own in candidates.items():
                if (network, role, name) not in finished:
                    row = measure((*settings.common, *own))
                    finished.add({"network": network, "role": role, "candidate": name, **row})
    finished.write_page()


if __name__ == "__main__":
    main()
