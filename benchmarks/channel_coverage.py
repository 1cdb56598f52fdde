"""Which architectures channel pruning, its export and TFMOT's own wrappers can take.

    python benchmarks/channel_coverage.py [architecture ...]

For each architecture of ``tf_keras.applications``, with random weights and a small input: ``prune_channels`` to half of
the multiply-adds, the difference of the rebuilt model from the masked original, the export and a run of the exported
file in float32 and int8; and whether TFMOT's ``quantize_model`` and ``prune_low_magnitude`` accept the same model.
Every architecture runs in a process of its own. Finished rows are kept in ``results/channel_coverage.jsonl``: the same
command continues. Writes ``results/channel_coverage.md``.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from compress.quiet import import_tensorflow

import_tensorflow()

import numpy as np  # noqa: E402
import tf_keras  # noqa: E402
from architectures import ARCHITECTURES, accepts, build, random_data, randomise  # noqa: E402
from finished_rows import FinishedRows, hand_over, run_apart  # noqa: E402

from compress.candidate import Calibration, Candidate, Storage  # noqa: E402
from compress.cli.experiment import machine, provenance  # noqa: E402
from compress.deploy.tflite import export  # noqa: E402
from compress.errors import CompressError  # noqa: E402
from compress.graph.rewrite import rewrite  # noqa: E402
from compress.metrics.accuracy import file_outputs  # noqa: E402
from compress.metrics.counts import count_macs, count_params  # noqa: E402
from compress.strategies.pruning.channels import PruneChannels  # noqa: E402
from compress.strategies.strategy import Context  # noqa: E402
from compress.training import Recovery  # noqa: E402

KEEP = 0.5
MINUTES = 30


def row(name: str) -> dict:
    import tensorflow_model_optimization as tfmot

    tf_keras.utils.set_random_seed(0)
    model = build(name)
    randomise(model)
    data = random_data(model)
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
                stored = cut.evolve(storage=Storage(scheme, Calibration(4)))
                file = export(stored, data, Path(folder, f"{scheme}.tflite")).path
                outputs = file_outputs(file, data.test.x[:2])
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
        "Where random batch-norm statistics make a network magnify rounding errors more than a thousand times "
        "(EfficientNetV2S, EfficientNetV2L), it has those of random images instead. "
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
        hand_over(row(sys.argv[2]))
        return
    rows = FinishedRows("channel_coverage", ["architecture"], page)
    for name in sys.argv[1:] or ARCHITECTURES:
        if (name,) in rows:
            continue
        print(f"{name} ...", flush=True)
        found = run_apart(__file__, ["--one", name], MINUTES)
        if isinstance(found, str):
            print(f"{name}: {found}; the same command tries again", flush=True)
        else:
            rows.add(found)


if __name__ == "__main__":
    main()
