"""Which architectures post-training quantization, quantization-aware training and TFMOT's wrapper can take.

    python benchmarks/quantization_coverage.py [architecture ...]

For each architecture of ``tf_keras.applications``, with random weights and a small input: the full int8 file of
``quantize`` and of ``qat`` after one training step, both run by LiteRT; what of them computes with floats; and whether
TFMOT's ``quantize_model`` accepts the same model. Each of the three runs in a process of its own, so that a crash is a
row, too. Finished rows are kept in ``results/quantization_coverage.jsonl``: the same command continues (a row that is
deleted there is made again). Writes ``results/quantization_coverage.md``.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from compress.quiet import import_tensorflow

import_tensorflow()

import numpy as np  # noqa: E402
import tf_keras  # noqa: E402
from architectures import ARCHITECTURES, accepts, build, random_data, randomise, settle  # noqa: E402
from finished_rows import FinishedRows, Row, hand_over, run_apart  # noqa: E402

from compress.candidate import Candidate  # noqa: E402
from compress.cli.experiment import machine, provenance  # noqa: E402
from compress.data.source import Data  # noqa: E402
from compress.deploy.conversion import complaints_explained, make_converter  # noqa: E402
from compress.deploy.points import find_points  # noqa: E402
from compress.deploy.tflite import export  # noqa: E402
from compress.deploy.verification import float_operators  # noqa: E402
from compress.errors import CompressError  # noqa: E402
from compress.graph.rewrite import rewrite  # noqa: E402
from compress.metrics.accuracy import file_outputs, keras_outputs  # noqa: E402
from compress.metrics.tflite_file import TFLiteFile  # noqa: E402
from compress.strategies.quantization.aware import QuantizeAware  # noqa: E402
from compress.strategies.quantization.fake_quantization import with_fake_quantization  # noqa: E402
from compress.strategies.quantization.post_training import Quantize  # noqa: E402
from compress.strategies.strategy import Context, Strategy  # noqa: E402
from compress.training import Recovery  # noqa: E402

STRATEGIES: dict[str, Strategy] = {"quantize": Quantize(), "qat": QuantizeAware()}
TFMOT = "quantize_model"
ONE_STEP = Recovery(epochs=8 / 32, batch_size=8, learning_rate=1e-5)
RUN_IMAGES = 8
MINUTES = 60


def measure(name: str, part: str) -> Row:
    """Return the row of one architecture and one part of the work."""
    row = {"architecture": name, "part": part}
    if part == TFMOT:
        import tensorflow_model_optimization as tfmot

        return row | {"accepts": accepts(lambda: tfmot.quantization.keras.quantize_model(build(name)))}
    tf_keras.utils.set_random_seed(0)
    model = build(name)
    randomise(model)
    data = random_data(model)
    settle(model, data.train.x)
    flat = rewrite(model)
    context = Context(part, data, flat, ONE_STEP, 0)
    started = time.perf_counter()
    try:
        quantized = STRATEGIES[part].apply(Candidate(flat), context)
        with tempfile.TemporaryDirectory() as folder:
            artifact = export(quantized, data, Path(folder, f"{part}.tflite"))
            row["seconds"] = round(time.perf_counter() - started, 1)
            outputs = file_outputs(artifact.path, data.test.x[:RUN_IMAGES])
            row["floats"] = float_operators(TFLiteFile.read(artifact.path))
        row["finite"] = bool(np.isfinite(outputs).all())
        row["skipped"] = Counter(item.reason for item in quantized.skipped if not item.by_choice)
        simulated = fake_quantized(quantized, data) if part == "qat" else quantized.model
        expected = keras_outputs(simulated, data.test.x[:RUN_IMAGES], batch=RUN_IMAGES)
        row["difference"] = float(np.abs(outputs - expected).max() / np.abs(expected).max())
    except CompressError as error:
        row["failure"] = str(error)[:300]
    return row


def fake_quantized(candidate: Candidate, data: Data) -> tf_keras.Model:
    """Return the network that was trained: rounded weights, and activations rounded in the ranges of the file."""
    converter = make_converter(candidate.model)
    with complaints_explained("float32"):
        content = bytes(converter.convert())
    points = find_points(content, candidate.model, data.train.x[:1])
    return with_fake_quantization(candidate.model, candidate.storage.ranges, points.tied)


def page(rows: Sequence[Row]) -> str:
    parts = {(row["architecture"], row["part"]): row for row in rows}
    names = [name for name in ARCHITECTURES if any(key[0] == name for key in parts)]
    works = {part: sum(bool(parts.get((name, part), {}).get("finite")) for name in names) for part in STRATEGIES}
    accepted = sum(parts.get((name, TFMOT), {}).get("accepts") == "yes" for name in names)
    lines = [
        "# Quantization of tf_keras.applications",
        "",
        "Random weights, inputs of 64 x 64 (96 x 96 where more is needed), 32 random images for ranges and training. "
        f"The int8 files of `quantize` and of `qat` (one training step of {ONE_STEP.batch_size} images) are run by "
        f"LiteRT on {RUN_IMAGES} images. *Difference*: the largest one of the outputs, relative to the largest output; "
        "of `quantize` from the float model, of `qat` from the network that was trained, its weights and activations "
        "rounded. Random networks may blow up what rounding does: it shows gross mistakes only, and no accuracy. "
        "*Float operators* of a file compute with floats between the integer ones. The last column says whether "
        "TFMOT 0.8.1 accepts the same model.",
        "",
        f"Files that run and give finite outputs, of {len(names)}: `quantize` {works['quantize']}, `qat` "
        f"{works['qat']}. `quantize_model` accepts {accepted}.",
        "",
        "| architecture | quantize | difference | float operators | s | qat | difference | float operators | s | "
        "quantize_model |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        cells = [cell for part in STRATEGIES for cell in _cells(parts.get((name, part)))]
        tfmot = parts.get((name, TFMOT), {})
        cells.append(tfmot.get("accepts") or tfmot.get("failure") or "not run yet")
        lines.append("| " + " | ".join([name, *(cell.replace("|", "/") for cell in cells)]) + " |")
    lines += ["", "Layers that the strategies skipped:", ""]
    lines += [
        f"- {name}, `{part}`: " + "; ".join(f"{reason} ({count})" for reason, count in found["skipped"].items())
        for (name, part), found in parts.items()
        if found.get("skipped")
    ] or ["- none"]
    return "\n".join([*lines, *provenance("python benchmarks/quantization_coverage.py", [0], machine())])


def _cells(row: Row | None) -> list[str]:
    if row is None:
        return ["not run yet", "", "", ""]
    seconds = str(row.get("seconds", ""))
    if "failure" in row:
        return [row["failure"], "", "", seconds]
    floats = ", ".join(f"{count} {operator}" for operator, count in sorted(row["floats"].items()))
    return ["runs" if row["finite"] else "**gives NaN**", f"{row['difference']:.1e}", floats or "none", seconds]


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        hand_over(measure(sys.argv[2], sys.argv[3]))
        return
    rows = FinishedRows("quantization_coverage", ["architecture", "part"], page)
    for name in sys.argv[1:] or ARCHITECTURES:
        for part in (*STRATEGIES, TFMOT):
            if (name, part) in rows:
                continue
            print(f"{name}, {part} ...", flush=True)
            found = run_apart(__file__, ["--one", name, part], MINUTES)
            rows.add({"architecture": name, "part": part, "failure": found} if isinstance(found, str) else found)


if __name__ == "__main__":
    main()
