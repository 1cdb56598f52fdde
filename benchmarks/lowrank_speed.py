"""How long factorization takes: the whole of VGG-16, its largest layer beside LAPACK, ResNet-101 through pipelines.

    python benchmarks/lowrank_speed.py              writes results/lowrank_speed.md
    python benchmarks/lowrank_speed.py vgg16        only the rows that are named (vgg16, layer, resnet101); others stay

Weights are random: the work is the same.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS = Path("results/lowrank_speed.jsonl")
PAGE = Path("results/lowrank_speed.md")
NAMES = ("vgg16", "layer", "resnet101")
PIPELINES = ("lowrank+prune", "lowrank+prune_channels+quantize")


def vgg16() -> dict[str, object]:
    import compress  # noqa: F401
    from compress.quiet import import_tensorflow

    import_tensorflow()
    import numpy as np
    import tf_keras
    from threadpoolctl import threadpool_info

    from compress.candidate import Candidate
    from compress.data.source import Split, make_data
    from compress.metrics.counts import count_params
    from compress.strategies.lowrank.factorize import LowRank
    from compress.strategies.strategy import Context
    from compress.training import Recovery

    tf_keras.utils.set_random_seed(0)
    model = tf_keras.applications.VGG16(weights=None)
    part = Split(np.zeros((2, 224, 224, 3), np.float32), np.zeros(2, int))
    context = Context("lowrank", make_data("none", part, part), model, Recovery(method="none"), 0)
    before = time.perf_counter(), time.process_time()
    result = LowRank(params=0.25).apply(Candidate(model), context)
    seconds, processor = time.perf_counter() - before[0], time.process_time() - before[1]
    return {
        "row": "vgg16",
        "threads": max(pool["num_threads"] for pool in threadpool_info()),
        "load": os.getloadavg()[0],
        "params": count_params(result.model) / count_params(model),
        "seconds": seconds,
        "processor": processor,
    }


def layer() -> dict[str, object]:
    """Factorize VGG-16's largest matrix at the rank that keeps a quarter of its weights, and let LAPACK do it."""
    import compress  # noqa: F401
    from compress.quiet import import_tensorflow

    import_tensorflow()
    import numpy as np

    from compress.strategies.lowrank.matrices import product

    kernel = np.random.default_rng(0).normal(size=(25088, 4096)).astype(np.float32)
    rank = int(0.25 * kernel.size / sum(kernel.shape))
    times = {"ours": 0.0, "lapack": 0.0}
    errors = dict(times)
    start = time.process_time()
    found = product(kernel, rank)
    times["ours"] = time.process_time() - start
    errors["ours"] = float(np.linalg.norm(kernel - found.left @ found.right) / np.linalg.norm(kernel))
    start = time.process_time()
    values = np.linalg.svd(kernel, full_matrices=False)[1].astype(np.float64)
    times["lapack"] = time.process_time() - start
    errors["lapack"] = float(np.sqrt(np.sum(values[rank:] ** 2) / np.sum(values**2)))
    return {"row": "layer", "rank": rank, "layer": times, "errors": errors}


def resnet101(strategy: str) -> dict[str, object]:
    """Run the pipeline in a process of its own, on images of noise; return its time and its peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        make = (
            "import compress, numpy as np, tf_keras; tf_keras.utils.set_random_seed(0); "
            "tf_keras.applications.ResNet101(weights=None).save('model.keras'); rng = np.random.default_rng(0); "
            "x = rng.integers(0, 256, (32, 224, 224, 3)).astype('uint8'); y = np.arange(32) % 1000; "
            "np.savez('data.npz', x_train=x, y_train=y, x_test=x[:8], y_test=y[:8])"
        )
        environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
        subprocess.run([sys.executable, "-c", make], cwd=folder, env=environment, check=True)
        command = [sys.executable, "-m", "compress.run", "model=file", "model.path=model.keras", "data=npz"]
        command += ["data.path=data.npz", f"strategy={strategy}", "recovery=none", "tracking=none", "cache=off"]
        command += ["board.runs=100", "board.warmup=1", "hydra.run.dir=out"]
        start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, cwd=folder, env=environment, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        report = json.loads(Path(folder, "out", "report.json").read_text())
    return {
        "row": f"resnet101 {strategy}",
        "seconds": time.perf_counter() - start,
        "processor": after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime,
        "memory": after.ru_maxrss * 1024,
        "params": report["final"]["params"] / report["baseline"]["params"],
        "macs": report["final"]["macs"] / report["baseline"]["macs"],
        "latency": [report[key]["latency_ms"]["p50"] for key in ("baseline", "final")],
    }


def main(names: list[str]) -> None:
    if len(names) != 1:
        # Each in a process of its own: what a process starts is charged with the memory that it has itself.
        for name in names or NAMES:
            subprocess.run([sys.executable, __file__, name], check=True)
        return
    rows = {}
    if ROWS.is_file():
        rows = {row["row"]: row for row in map(json.loads, ROWS.read_text().splitlines())}
    match names[0]:
        case "vgg16":
            made = [vgg16()]
        case "layer":
            made = [layer()]
        case "resnet101":
            made = [resnet101(strategy) for strategy in PIPELINES]
        case name:
            sys.exit(f"expected {', '.join(NAMES)}; received {name}")
    write(rows | {str(row["row"]): row for row in made})


def write(rows: dict[str, dict]) -> None:
    from compress.cli.experiment import machine, provenance

    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    lines = [
        "# How long low-rank factorization takes",
        "",
        "Random weights. Processor seconds are those of all threads together. Seconds are what the clock said; other "
        "work on the machine makes them more.",
        "",
    ]
    if row := rows.get("vgg16"):
        lines += [
            "| VGG-16, 224 x 224 | parameters kept | seconds | processor seconds |",
            "|---|---|---|---|",
            f"| `strategy.lowrank.params=0.25` | {row['params']:.3f} | {row['seconds']:.0f} | {row['processor']:.0f} |",
            "",
            f"Threads of the linear algebra: {row['threads']}; processes that waited for a core at the end: "
            f"{row['load']:.0f}.",
            "",
        ]
    if row := rows.get("layer"):
        times, errors = row["layer"], row["errors"]
        lines += [
            f"| its largest layer, 25088 x 4096, at rank {row['rank']} | processor seconds | relative error |",
            "|---|---|---|",
            f"| ours, in a random subspace of the Gram matrix | {times['ours']:.1f} | {errors['ours']:.4f} |",
            f"| LAPACK's full SVD (numpy, single precision) | {times['lapack']:.1f} | {errors['lapack']:.4f} |",
            f"| times faster | {times['lapack'] / times['ours']:.1f} | |",
            "",
        ]
    lines += [
        "| ResNet-101, 224 x 224, no recovery | seconds | processor seconds | peak memory, GB | parameters kept "
        "| multiply-adds kept | latency before, ms | after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        if row["row"].startswith("resnet101"):
            lines.append(
                f"| `strategy={row['row'].partition(' ')[2]}` | {row['seconds']:.0f} | {row['processor']:.0f} | "
                f"{row['memory'] / 1e9:.1f} | {row['params']:.3f} | {row['macs']:.3f} | {row['latency'][0]:.0f} | "
                f"{row['latency'][1]:.0f} |"
            )
    lines += provenance("python benchmarks/lowrank_speed.py", [0], machine())
    PAGE.write_text("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
