"""Full int8 post-training quantization of trained networks, beside TensorFlow's plain converter and published files.

    python benchmarks/integer_files.py [model ...]      e.g. ResNet-8 DS-CNN

Reads CIFAR-10 and the trained networks in ``$COMPRESS_DATA_DIR``. For each network: the float file; int8 by
``tf.lite.TFLiteConverter`` alone; by ``quantize`` with each way to choose ranges, all on the same samples; and MLPerf
Tiny's reference file where there is one. Accuracies are of the files, run by LiteRT; latencies are taken on this
machine, in turns with the float file. Finished rows are kept in ``results/integer_files.jsonl``: the same command
continues. Writes ``results/integer_files.md``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from compress.quiet import import_tensorflow

import_tensorflow()

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
import tf_keras  # noqa: E402
from finished_rows import FinishedRows, Row  # noqa: E402

from compress.boards.board import Board  # noqa: E402
from compress.candidate import Artifact, Candidate, Storage  # noqa: E402
from compress.cli.build import Plan, make_plan  # noqa: E402
from compress.cli.compose import compose_config  # noqa: E402
from compress.cli.experiment import machine, provenance  # noqa: E402
from compress.data.source import Data, find_file  # noqa: E402
from compress.deploy.conversion import calibration_samples, complaints_explained  # noqa: E402
from compress.deploy.tflite import export  # noqa: E402
from compress.errors import CompressError  # noqa: E402
from compress.metrics.accuracy import accuracy, file_outputs  # noqa: E402
from compress.metrics.size import file_bytes  # noqa: E402
from compress.reference import make_reference  # noqa: E402
from compress.strategies.quantization.post_training import Quantize  # noqa: E402
from compress.strategies.strategy import Context  # noqa: E402
from compress.training import Recovery  # noqa: E402

FLOAT, PLAIN, PUBLISHED = "float", "plain converter, int8", "MLPerf Tiny's file, int8"
SAMPLES = 256
OURS = {
    **{f"quantize, {ranges}": {"ranges": ranges} for ranges in ("minmax", "percentile", "mse", "entropy")},
    **{
        f"quantize, {ranges}, second_order": {"ranges": ranges, "rounding": "second_order"}
        for ranges in ("mse", "percentile")
    },
    "quantize, synthetic samples": {"calibrate_on": "synthetic"},
}
WORSE_THAN_PLAIN = 0.05
ROUNDS = 5
KEYWORDS = "mlperf_tiny/kws01.npz"


@dataclass(frozen=True)
class Case:
    """A trained network and what is asked of its int8 files: the drop in points at most, the speed-up at least."""

    name: str
    overrides: tuple[str, ...]
    drop: float
    speedup: float | None = None
    published: str | None = None
    note: str = "CIFAR-10, calibrated on training images, accuracy on the 10,000 test images."


CASES = (
    Case("ResNet-20", ("model=resnet20", "data=cifar10"), drop=0.10, speedup=2.5),
    Case("ResNet-56", ("model=resnet56", "data=cifar10"), drop=0.10),
    Case(
        "ResNet-8",
        ("model=resnet8", "data=cifar10"),
        drop=0.10,
        published="mlperf_tiny/ic_resnet8_int8.tflite",
        note="MLPerf Tiny's image classification, CIFAR-10 with raw pixels from 0 to 255, calibrated on training "
        "images, accuracy on the 10,000 test images.",
    ),
    Case(
        "DS-CNN",
        ("model=file", "data=npz"),
        drop=0.3,
        published="mlperf_tiny/kws_dscnn_int8.tflite",
        note=f"MLPerf Tiny's keyword spotting, accuracy on its 1,000 published samples. There are no training samples: "
        f"{SAMPLES} of the 1,000, drawn at random, calibrate all files but the published one, without their labels; "
        f"*unseen* is on the other {1000 - SAMPLES}. One sample is 0.1 points. MLPerf Tiny's own float file has "
        "slightly other weights than its saved model, which all files but the published one are made from.",
    ),
)


def needed(name: str) -> Path:
    """Return the path of a data file.

    Raises:
        CompressError: if it is not there.
    """
    found = find_file(None, name)
    if found is None:
        raise CompressError(
            "COMPRESS_DATA_DIR",
            expected=f"the folder that holds {name}",
            received="no such file",
            fix="Set COMPRESS_DATA_DIR to the folder with the data and the trained networks.",
        )
    return found


def load(case: Case, folder: Path) -> tuple[Plan, tf_keras.Model, Data, np.ndarray | None]:
    """Return the plan, the model, the data, and which test samples are unseen: None for all."""
    overrides, unseen = list(case.overrides), None
    if case.name == "DS-CNN":
        unseen = _keywords(folder / "keywords.npz")
        overrides += [f"model.path='{needed('mlperf_tiny/kws_dscnn_resaved.h5')}'"]
        overrides += [f"data.path='{folder / 'keywords.npz'}'"]
    plan = make_plan(compose_config(["strategy=none", *overrides]))
    data = plan.source.load()
    model = make_reference(plan.model, data, plan.seed)
    return plan, model, data.fitted_to(model, case.name), unseen


def _keywords(target: Path) -> np.ndarray:
    """Write the samples in the layout of ``data=npz``; return which of the test part do not calibrate."""
    with np.load(needed(KEYWORDS)) as stored:
        x = (stored["x"].astype(np.float32) - stored["input_zero_point"]) * stored["input_scale"]
        y = stored["y"]
    chosen, others = np.split(np.random.default_rng(0).permutation(len(x)), [SAMPLES])
    # The format asks for labels; nothing here reads those of the training and the validation part.
    part = {"x_train": x[chosen], "y_train": y[chosen], "x_val": x[chosen], "y_val": y[chosen]}
    np.savez(target, x_test=x, y_test=y, **part)
    return np.sort(others)


def plain_int8(model: tf_keras.Model, data: Data, path: Path) -> Path:
    """Write the file that TensorFlow alone makes, as its guide says."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = partial(calibration_samples, Candidate(model), data, SAMPLES)
    with complaints_explained("int8"):
        path.write_bytes(converter.convert())
    return path


def ours(model: tf_keras.Model, data: Data, fields: dict, path: Path) -> Path:
    """Write the file of ``quantize``."""
    strategy = Quantize(calibration_images=SAMPLES, **fields)
    context = Context("quantize", data, model, Recovery(method="none"), 0)
    return export(strategy.apply(Candidate(model), context), data, path).path


def makers(case: Case, model: tf_keras.Model, data: Data, folder: Path) -> dict[str, Callable[[], Path]]:
    """Return what makes each file."""
    made: dict[str, Callable[[], Path]] = {PLAIN: partial(plain_int8, model, data, folder / "plain.tflite")}
    made |= {name: partial(ours, model, data, fields, folder / "ours.tflite") for name, fields in OURS.items()}
    return made | ({PUBLISHED: partial(needed, case.published)} if case.published else {})


def measure(path: Path, plain: Path, data: Data, unseen: np.ndarray | None, board: Board) -> Row:
    """Return a file's numbers; its latency is taken in turns with that of the file ``plain``."""
    outputs = file_outputs(path, data.test.x)
    pairs = np.array([[_p50(board, plain), _p50(board, path)] for _ in range(ROUNDS)])
    row = {
        "accuracy": accuracy(outputs, data.test.y),
        "bytes": file_bytes(path),
        "latency": float(np.median(pairs[:, 1])),
        "speedup": float(np.median(pairs[:, 0] / pairs[:, 1])),
    }
    return row if unseen is None else row | {"unseen": accuracy(outputs[unseen], data.test.y[unseen])}


def _p50(board: Board, path: Path) -> float:
    found = board.measure(Artifact(path, Storage()))
    if found.latency_ms is None:
        raise CompressError(
            f"latency of {path.name}", expected="a latency", received=str(found.failure), fix="Start again."
        )
    return found.latency_ms.p50


def run(case: Case, rows: FinishedRows) -> None:
    """Make and measure the files of a network that are not in the rows yet."""
    wanted = [FLOAT, PLAIN, *OURS, *([PUBLISHED] if case.published else [])]
    if all((case.name, name) in rows for name in wanted):
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        plan, model, data, unseen = load(case, folder)
        plain = export(Candidate(model), data, folder / "float.tflite").path
        for name, make in {FLOAT: lambda: plain, **makers(case, model, data, folder)}.items():
            if (case.name, name) not in rows:
                print(f"{case.name}, {name} ...", flush=True)
                rows.add({"model": case.name, "file": name} | measure(make(), plain, data, unseen, plan.board))


def page(rows: Sequence[Row]) -> str:
    lines = [
        "# Full int8 files of trained networks",
        "",
        "The `.tflite` files, run by LiteRT. *Plain converter*: `tf.lite.TFLiteConverter.from_keras_model` with "
        "`optimizations` and a `representative_dataset`, nothing else. *quantize*: this project's strategy with its "
        f"ways to choose the ranges of activations. All are calibrated on the same {SAMPLES} samples; *second_order* "
        f"rounds on {Quantize().rounding_images} augmented training images (fewer where there are fewer). Latency: p50 "
        f"of one sample on one thread, the median of {ROUNDS} rounds; each round measures the float file and then the "
        "other, and the speed-up is the median of the rounds' ratios. The float file against "
        "itself tells how noisy that is.",
        "",
        "Finished rows are kept, so some may be older than the commit below. Percentiles with second-order rounding "
        "were picked for the divergence of ResNet-8's outputs on training images; its test accuracies were in view.",
    ]
    for case in CASES:
        found = {row["file"]: row for row in rows if row["model"] == case.name}
        if FLOAT in found:
            lines += ["", f"## {case.name}", "", case.note, "", *_table(found), "", *_floors(case, found)]
    return "\n".join([*lines, *provenance("python benchmarks/integer_files.py", [0], machine())])


def _table(found: dict[str, Row]) -> list[str]:
    plain = found[FLOAT]
    measures = {"accuracy": "accuracy %"} | ({"unseen": "unseen %"} if "unseen" in plain else {})
    headings = ["file", *(part for title in measures.values() for part in (title, "drop"))]
    lines = ["| " + " | ".join([*headings, "bytes", "latency ms", "speed-up"]) + " |"]
    lines.append("|" + "---|" * (len(headings) + 3))
    for name, row in found.items():
        cells = [part for key in measures for part in (f"{row[key]:.2f}", _points(plain[key] - row[key]))]
        cells += [f"{row['bytes']:,}", f"{row['latency']:.3f}", f"{row['speedup']:.2f}"]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return lines


def _points(difference: float) -> str:
    # Without the sign that a zero may have.
    return f"{round(difference, 2) + 0.0:.2f}"


def _floors(case: Case, found: dict[str, Row]) -> list[str]:
    """Return the table of what is asked of the files that ``quantize`` makes, and whether they keep it."""
    plain = found[FLOAT]
    asked: dict[str, Callable[[Row], tuple[bool, str]]] = {}
    for key in ("accuracy", "unseen"):
        if key not in plain:
            continue
        of = ", unseen" if key == "unseen" else ""

        def below(other: Row, most: float, row: Row, key: str = key) -> tuple[bool, str]:
            lost = other[key] - row[key]
            return lost <= most + 1e-6, _points(lost)

        asked[f"drop at most {case.drop:.2f} points{of}"] = partial(below, plain, case.drop)
        if PLAIN in found:
            worse = f"at most {WORSE_THAN_PLAIN} points below the plain converter{of}"
            asked[worse] = partial(below, found[PLAIN], WORSE_THAN_PLAIN)
    if case.speedup is not None:
        least = case.speedup
        asked[f"at least {least} times as fast as float"] = lambda row: (
            row["speedup"] >= least,
            f"{row['speedup']:.2f}",
        )
    lines = ["| asked | " + " | ".join(OURS) + " |", "|" + "---|" * (len(OURS) + 1)]
    for text, judge in asked.items():
        cells = []
        for name in OURS:
            kept, value = judge(found[name]) if name in found else (None, "")
            cells.append({True: f"yes ({value})", False: f"**no** ({value})", None: "not run yet"}[kept])
        lines.append("| " + " | ".join([text, *cells]) + " |")
    return lines


def main() -> None:
    rows = FinishedRows("integer_files", ["model", "file"], page)
    for case in CASES:
        if case.name in (sys.argv[1:] or [case.name]):
            run(case, rows)


if __name__ == "__main__":
    main()
