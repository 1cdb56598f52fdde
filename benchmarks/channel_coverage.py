"""Which architectures channel pruning, its export and TFMOT's own wrappers can take.

    python benchmarks/channel_coverage.py [architecture ...]

For each architecture of ``tf_keras.applications``, with random weights and a small input: ``prune_channels`` to half of
the multiply-adds, the difference of the rebuilt model from the masked original, the export and a run of the exported
file in float32 and int8; and whether TFMOT's ``quantize_model`` and ``prune_low_magnitude`` accept the same model.
Every architecture runs in a process of its own. Finished rows are kept in ``results/channel_coverage.jsonl``: the same
command continues. Writes ``results/channel_coverage.md``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from compress.quiet import import_tensorflow

import_tensorflow()

import numpy as np  # noqa: E402
import tf_keras  # noqa: E402

from compress.candidate import Candidate, Storage  # noqa: E402
from compress.cli.experiment import machine, provenance  # noqa: E402
from compress.data.source import Augmentation, Data, Split  # noqa: E402
from compress.deploy.tflite import export  # noqa: E402
from compress.errors import CompressError  # noqa: E402
from compress.graph.rewrite import rewrite  # noqa: E402
from compress.metrics.accuracy import file_outputs  # noqa: E402
from compress.metrics.counts import count_macs, count_params  # noqa: E402
from compress.strategies.pruning.channels import PruneChannels  # noqa: E402
from compress.strategies.strategy import Context  # noqa: E402
from compress.training import Recovery  # noqa: E402

ARCHITECTURES = (
    *("VGG16", "VGG19", "MobileNet", "MobileNetV2", "MobileNetV3Small", "MobileNetV3Large", "Xception"),
    *("ResNet50", "ResNet101", "ResNet152", "ResNet50V2", "ResNet101V2", "ResNet152V2", "ResNetRS50", "ResNetRS101"),
    *("DenseNet121", "DenseNet169", "DenseNet201", "InceptionV3", "InceptionResNetV2", "NASNetMobile", "NASNetLarge"),
    *("EfficientNetB0", "EfficientNetB3", "EfficientNetB7", "EfficientNetV2B0", "EfficientNetV2S", "EfficientNetV2L"),
    *("RegNetX002", "RegNetX032", "RegNetX320", "RegNetY002", "RegNetY032", "RegNetY320"),
    *("ConvNeXtTiny", "ConvNeXtBase", "ConvNeXtXLarge"),
)
SIZES = {"InceptionV3": 96, "InceptionResNetV2": 96, "Xception": 96, "NASNetMobile": 96, "NASNetLarge": 96}
KEEP = 0.5
FILE = Path("results/channel_coverage.jsonl")
MINUTES = 30


def build(name: str) -> tf_keras.Model:
    size = SIZES.get(name, 64)
    make = getattr(tf_keras.applications, name)
    return make(weights=None, input_shape=(size, size, 3), classes=10, classifier_activation=None)


def randomise(model: tf_keras.Model) -> None:
    """Give normalisations scales, shifts and statistics of their own: fresh ones would hide mistakes."""
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if any(part in weight.name for part in ("gamma", "variance")):
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
        elif any(part in weight.name for part in ("beta", "moving_mean")):
            weight.assign(rng.normal(size=weight.shape) * 0.2)


def accepts(action) -> str:
    try:
        action()
    except Exception as error:  # TFMOT raises what it likes; any of it is a refusal.
        return f"no: {' '.join(str(error).split())[:90]}"
    return "yes"


def row(name: str) -> dict:
    import tensorflow_model_optimization as tfmot

    tf_keras.utils.set_random_seed(0)
    model = build(name)
    randomise(model)
    rng = np.random.default_rng(0)
    split = Split(rng.uniform(0, 255, (32, *model.input_shape[1:])).astype(np.float32), np.arange(32) % 10)
    data = Data("random", split, split, split, 10, Augmentation(), "")
    started = time.perf_counter()
    flat = rewrite(model)
    context = Context("prune_channels", data, flat, Recovery(method="none"), 0)
    result: dict = {"architecture": name, "layers": len(flat.layers)}
    try:
        cut = PruneChannels(macs=KEEP).apply(Candidate(flat), context)
        result["seconds"] = round(time.perf_counter() - started, 1)
        result["macs"] = count_macs(cut.model) / count_macs(flat)
        result["params"] = count_params(cut.model) / count_params(flat)
        result["oracle"] = cut.measured["oracle_difference"]
        result["skipped"] = [f"{item.layer}: {item.reason}" for item in cut.skipped if not item.by_choice]
        with tempfile.TemporaryDirectory() as folder:
            for scheme in ("float32", "int8"):
                stored = cut.evolve(storage=Storage(scheme, 4))
                file = export(stored, data, Path(folder, f"{scheme}.tflite")).path
                outputs = file_outputs(file, split.x[:2])
                result[scheme] = "runs" if np.isfinite(outputs).all() else "gives NaN"
    except CompressError as error:
        result["failure"] = str(error)[:300]
    result["quantize_model"] = accepts(lambda: tfmot.quantization.keras.quantize_model(build(name)))
    result["prune_low_magnitude"] = accepts(lambda: tfmot.sparsity.keras.prune_low_magnitude(build(name)))
    return result


def page(rows: list[dict]) -> str:
    good = [
        r
        for r in rows
        if abs(r.get("macs", 9) - KEEP) <= 0.03 * KEEP
        and r["oracle"] <= 1e-4
        and r.get("float32") == r.get("int8") == "runs"
    ]
    lines = [
        "# Channel pruning of tf_keras.applications",
        "",
        f"`prune_channels` to `macs: {KEEP}`, random weights, inputs of 64 x 64 (96 x 96 where more is needed). "
        "`oracle` is the largest difference from the masked original, relative to the largest output. "
        "The last two columns say whether TFMOT 0.8.1 accepts the same model.",
        "",
        f"All of it holds (MACs within 3 %, oracle at most 1e-4, both files run) for {len(good)} of {len(rows)}; "
        f"`quantize_model` accepts {sum(r['quantize_model'] == 'yes' for r in rows)}, "
        f"`prune_low_magnitude` {sum(r['prune_low_magnitude'] == 'yes' for r in rows)}.",
        "",
        "| architecture | layers | MACs kept | params kept | oracle | float32 | int8 | surgery s | quantize_model | "
        "prune_low_magnitude |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "failure" in r:
            lines.append(f"| {r['architecture']} | {r['layers']} | {r['failure']} | | | | | | | |")
            continue
        lines.append(
            f"| {r['architecture']} | {r['layers']} | {r['macs']:.3f} | {r['params']:.3f} | {r['oracle']:.1e} | "
            f"{r['float32']} | {r['int8']} | {r['seconds']} | {r['quantize_model']} | {r['prune_low_magnitude']} |"
        )
    return "\n".join([*lines, *provenance("python benchmarks/channel_coverage.py", [0], machine())])


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print("ROW " + json.dumps(row(sys.argv[2])))
        return
    rows = [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.is_file() else []
    FILE.parent.mkdir(exist_ok=True)
    for name in sys.argv[1:] or ARCHITECTURES:
        if any(r["architecture"] == name for r in rows):
            continue
        print(f"{name} ...", flush=True)
        command = [sys.executable, __file__, "--one", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES, check=False)
        except subprocess.TimeoutExpired:
            print(f"{name}: no result within {MINUTES} minutes; the same command tries again", flush=True)
            continue
        found = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
        if not found:
            print(f"{name}: no result (exit {done.returncode}): {done.stderr[-400:]}", flush=True)
            continue
        rows.append(json.loads(found[0].removeprefix("ROW ")))
        with FILE.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        Path("results/channel_coverage.md").write_text(page(rows))
        print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
