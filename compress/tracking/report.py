"""``report.json``: the run's numbers, as published in ``report.schema.json``, and the table that is printed."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import compress
from compress.candidate import Numbers
from compress.deploy.interface import Interface
from compress.deploy.verification import Verification, complaints
from compress.graph.macs import uncounted
from compress.pipeline.pipeline import Result
from compress.pipeline.stage import StageResult
from compress.words import counted

SCHEMA_FILE = Path(__file__).with_name("report.schema.json")
ACCURACY_GAP_LIMIT = 0.5
"""Percentage points that Keras and the exported file may differ before the report says so."""
_LOSS_LIMIT = 5.0
"""Percentage points below the baseline that are no ordinary price of compression."""
_FASTER = 1 / 0.97
"""Times as fast that is more than noise: 3 % of the latency."""

_PACKAGES = (
    "tensorflow", "tf_keras", "tensorflow-model-optimization", "ai-edge-litert", "numpy", "mlflow", "hydra-core",
)  # fmt: skip
_RATIOS = ("params", "nonzero_params", "macs", "tflite_bytes", "packed_bytes", "gzip_bytes", "peak_memory_bytes")


def make_report(
    result: Result,
    config: Mapping[str, Any],
    *,
    seconds: float,
    interface: Interface | None = None,
    verification: Verification | None = None,
) -> dict[str, Any]:
    """Return the report of a finished pipeline.

    Args:
        result: what the pipeline gave.
        config: the composed configuration, as plain values.
        seconds: wall time of the whole run.
        interface: what the last file reads and writes.
        verification: what is known about the last file; what is wrong with it becomes notes.
    """
    baseline, final = result.baseline.numbers, result.final
    found = notes(result)
    evaluated_on = config["data"].get("evaluate_on", "test")
    if evaluated_on != "test":
        found.insert(0, f"Accuracies are on the {evaluated_on} part of the data, not on the test part.")
    if verification is not None:
        found += complaints(verification, result.artifact.storage.scheme)
    report = {
        "schema": 1,
        "strategy": "+".join(stage.name for stage in result.stages) or "none",
        "model": model_name(result, config),
        "trained": not result.untrained,
        "data": _choice(config["data"]),
        "evaluated_on": evaluated_on,
        "seed": config["seed"],
        "board": board_name(config["board"]),
        "versions": versions(),
        "seconds": round(seconds, 3),
        "baseline": numbers_to_json(baseline),
        "stages": [_stage(stage) for stage in result.stages],
        "final": numbers_to_json(final),
        "ratios": ratios(baseline, final),
        "layers": {"baseline": result.baseline.layers, "final": result.last.layers},
        "notes": found,
        "artifacts": {
            "keras": None if result.keras_model is None else "model.keras",
            "tflite": "model.tflite",
            "packed": "model.cmp",
            "card": None,
        },
    }
    if verification is not None:
        report["verification"] = verification.to_json()
    if interface is not None:
        report["interface"] = interface.to_json()
        report["artifacts"]["card"] = "card.md"
    return report


def model_name(result: Result, config: Mapping[str, Any]) -> str:
    """Return the name of the model: the Keras model's, or that of the file that was brought."""
    return Path(config["model"]["path"]).stem if result.candidate is None else result.candidate.model.name


def numbers_to_json(numbers: Numbers) -> dict[str, Any]:
    """Return numbers under the keys of the report."""
    return {key: value for key, value in asdict(numbers).items() if key != "latency_failure"}


def ratios(baseline: Numbers, final: Numbers) -> dict[str, float | None]:
    """Return baseline / final of every size, and the accuracy's change in percentage points."""
    result: dict[str, float | None] = {}
    for key in _RATIOS:
        before, after = getattr(baseline, key), getattr(final, key)
        result[key] = before / after if before is not None and after else None
    # As papers count it: 4 bytes for every parameter of the original.
    result["compression_rate"] = 4 * baseline.params / final.packed_bytes if final.packed_bytes else None
    both = baseline.latency_ms is not None and final.latency_ms is not None
    result["latency_p50"] = (
        baseline.latency_ms.p50 / final.latency_ms.p50 if both else None  # type: ignore[union-attr]
    )
    result["accuracy_delta"] = final.accuracy - baseline.accuracy
    return result


def notes(result: Result) -> list[str]:
    """Say what did not get better and why, and what a reader must know to trust the numbers."""
    baseline, final = result.baseline.numbers, result.final
    guarantees, released = (result.candidate.guarantees, result.candidate.released) if result.candidate else ((), ())
    kinds = {kind.__name__ for guarantee in guarantees for kind in type(guarantee).__mro__}
    found: list[str] = []
    if result.untrained:
        found.append("The reference model is untrained (model.train.epochs=0): its accuracies mean nothing.")
    for stage in (result.baseline, *result.stages):
        in_keras = stage.numbers.accuracy_keras
        gap = 0.0 if in_keras is None else stage.numbers.accuracy - in_keras
        if abs(gap) > ACCURACY_GAP_LIMIT:
            found.append(
                f"{stage.name}: the exported file's accuracy differs from the Keras model's by {gap:+.2f} points "
                f"(limit {ACCURACY_GAP_LIMIT})."
            )
        if stage.recovered is not None and stage.recovered.why is not None:
            found.append(f"{stage.name}: recovery=auto chose {stage.recovered.why}.")
        if stage.recovered is not None and stage.recovered.warning is not None:
            found.append(f"{stage.name}: {stage.recovered.warning}")
        if stage.numbers.latency_failure is not None:
            found.append(f"{stage.name}: the board gave no latency: {stage.numbers.latency_failure}.")
    if final.estimate_ms is not None:
        was = f"{baseline.estimate_ms:.3f} to " if result.stages and baseline.estimate_ms else ""
        found.append(f"The board runs nothing: {was}{final.estimate_ms:.3f} ms is an estimate and no latency.")
    if result.keras_model is None:
        found.append(_A_FILE if result.candidate is None else _A_GRAPH)
    elif missing := uncounted(result.keras_model):
        found.append(f"macs leave out what these layers multiply, in a way that is not counted: {', '.join(missing)}.")
    if not result.stages:
        return found
    if not result.untrained and baseline.accuracy - final.accuracy > _LOSS_LIMIT:
        found.append(_loss_note(result))
    for before, stage in zip((result.baseline, *result.stages), result.stages, strict=False):
        had, has = before.numbers.sparse_kernels, stage.numbers.sparse_kernels
        if has and not had:
            found.append(_sparse_note(stage.name, has, _gain(baseline, before.numbers, stage.numbers)))
        if has < had:
            found.append(
                f"{stage.name}: {counted(has, 'kernel is', 'kernels are')} stored sparsely, {had} before: the others "
                "get no smaller by it, or "
                "LiteRT does not run them so (int8 weights of a dense layer, or beside float activations)."
            )
    gain = _gain(baseline, baseline, final)
    if gain is not None and gain.times < _FASTER:
        reasons = [text for kind, text in _SLOW_REASONS.items() if kind in kinds]
        found.append(
            f"Latency {'did not fall' if gain.times <= 1 else 'fell by less than 3 %'} ({gain.measured}): "
            + ("; ".join(reasons) or "no stage removed work that this runtime would do")
            + "."
        )
    if final.tflite_bytes >= baseline.tflite_bytes:
        reason = (
            "TFLite stores repeated values like any others, and so zeros where they are too few for its sparse form "
            "or LiteRT cannot run it; gzip_bytes shows what a download would save"
            if kinds & {"Zeros", "Codebook", "VectorCodebook", "Levels", "TiedFilters"}
            else "scales, and operators that convert to integers and back, outweigh so few weights"
            if kinds & {"Stored", "OnGrid"}
            else "no stage removed weights or stored them in fewer bits"
        )
        found.append(f"The .tflite file did not shrink: {reason}.")
    for text in released:
        found.append(f"Given up on purpose: {text}.")
    return found


@dataclass(frozen=True)
class _Gain:
    """How many times as fast a file is as another, and by which measurement."""

    times: float
    measured: str


def _gain(baseline: Numbers, before: Numbers, after: Numbers) -> _Gain | None:
    """Return what a file has gained against one before it; None if that is not known.

    Medians of two stages are of different hours, and an older one comes from the cache: they decide only where the
    files were not timed in turns with the baseline.
    """
    first = 1.0 if before is baseline else before.speedup
    if after.latency_ms is None:
        return None
    if first is not None and after.speedup is not None:
        times = after.speedup / first
        return _Gain(times, f"{times:.2f} times as fast, timed in turns with the original")
    if before.latency_ms is None:
        return None
    medians = before.latency_ms.p50, after.latency_ms.p50
    return _Gain(medians[0] / medians[1], f"p50 {medians[0]:.3f} to {medians[1]:.3f} ms")


def _loss_note(result: Result) -> str:
    """Say which stage has lost most of the accuracy, and what to try."""
    pairs = zip((result.baseline, *result.stages), result.stages, strict=False)
    before, stage = max(pairs, key=lambda pair: pair[0].numbers.accuracy - pair[1].numbers.accuracy)
    said = f"Accuracy fell from {result.baseline.numbers.accuracy:.2f} to {result.final.accuracy:.2f} %"
    if len(result.stages) > 1:
        said += f", most in {stage.name}: from {before.numbers.accuracy:.2f} to {stage.numbers.accuracy:.2f} %"
    else:
        said += f" in {stage.name}"
    return f"{said}. {_advice(stage)}."


def _advice(stage: StageResult) -> str:
    """Return what to try where a stage has lost much accuracy: what it has not done, or other training."""
    milder = f"a milder setting of strategy.{stage.name}"
    recovery = stage.config["recovery"]
    if stage.recovered is None or stage.recovered.method == "none":
        if stage.recovered is None and recovery["method"] != "none" and recovery["epochs"] > 0:
            return f"It trains nothing: try {milder}"
        return f"It trained nothing: try {milder}, or recovery=finetune recovery.epochs=1 if its strategy can train"
    key = f"strategy.{stage.name}.recovery"
    rate, epochs = recovery["learning_rate"], recovery["epochs"]
    if _began_anew(stage):
        return (
            f"Its student began with fresh weights: try {key}.epochs={5 * epochs:g} ({epochs:g} were made), "
            f"another {key}.learning_rate ({rate:g} was used), or a larger student"
        )
    tries = [f"{key}.learning_rate={rate / 3:.2g} ({rate:g} was used)", f"{key}.epochs={2 * epochs:g}"]
    # A strategy with a student of its own teaches it whatever the recovery is.
    if stage.recovered.method == "distill" and "student" not in stage.config:
        tries.append(f"{key}.method=finetune")
    if stage.recovered.method == "distill" and recovery.get("losses"):
        tries.append(f"smaller weights in {key}.losses")
    return f"Try {', '.join(tries)}, or {milder}"


def _began_anew(stage: StageResult) -> bool:
    """Say whether the stage trained a network whose weights nobody had trained before."""
    config = stage.config
    copied = config.get("width") is not None or config.get("depth") is not None
    return config.get("student") is not None or (copied and config["start"] == "random")


def _sparse_note(stage: str, kernels: int, gain: _Gain | None) -> str:
    """Say that the stage's file is stored sparsely, and whether the board's runtime got faster with it."""
    found = f"{stage}: {counted(kernels, 'kernel is', 'kernels are')} stored sparsely; "
    if gain is None:
        return found + "whether the runtime gets faster by it is not known without a latency."
    if gain.times < _FASTER:
        faster = "no faster" if gain.times <= 1 else "less than 3 % faster"
        return found + f"the runtime expands them when it loads the file and gets {faster} ({gain.measured})."
    return found + f"the runtime got faster in this stage ({gain.measured})."


_A_FILE = (
    "The model came as a .tflite file: params and macs are counted on the numbers and operators in it, and there is "
    "no model.keras."
)
_A_GRAPH = (
    "The model came as a SavedModel, a graph without Keras layers: macs are counted on the operators of the .tflite "
    "file, and there is no model.keras."
)
_SLOW_REASONS = {
    "Zeros": "the runtime multiplies by zeros like by any other weight",
    "Levels": "the runtime sees no levels, only floats or integers",
    "Codebook": "the runtime sees no codebook, only floats or integers",
    "VectorCodebook": "the runtime sees no codebook, only floats or integers",
    "TiedFilters": "the runtime sees no meta filters, only a kernel like any other",
    "MultiBias": "repeating and shifting responses moves as many bytes as it saves work",
    "Rank": "two small operators cost more than their multiply-adds say",
    "SeparableForm": "depthwise convolutions do little work for each byte that they move",
    "OctaveForm": "averaging, repeating and joining maps takes the time that the multiply-adds no longer take",
    "Stored": "the runtime may lack faster kernels for this type on this processor, or convert back to float",
}


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide the numbers, and the project's commit if it is known."""
    import platform

    found = {"compress": compress.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    found["commit"] = commit()
    return found


def commit() -> str:
    """Return the git commit of the source tree, marked if it has changes; ``unknown`` outside one."""
    folder = Path(compress.__file__).parent.parent
    if not (folder / ".git").exists():
        return "unknown"

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "compress", "conf", "experiments")
    except OSError:
        return "unknown"
    return (head + ("+changes" if changed else "")) if head else "unknown"


def write_report(report: Mapping[str, Any], path: Path) -> None:
    """Write the report under a temporary name and rename it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.replace(path)


def read_report(path: Path) -> dict[str, Any]:
    """Return a report that was written earlier."""
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def print_table(report: Mapping[str, Any]) -> None:
    """Print baseline, every stage and the ratios as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report['strategy']} on {report['model']}, {report['data']}, seed {report['seed']}")
    for heading in (
        "stage",
        "accuracy %",
        "nonzero params",
        "MACs",
        ".tflite bytes",
        ".cmp bytes",
        "peak mem.",
        "p50 ms",
        "s",
    ):
        table.add_column(heading, justify="left" if heading == "stage" else "right", no_wrap=True)
    rows = [("baseline", report["baseline"], None)]
    rows += [
        (stage["name"] + (" (cached)" if stage["cached"] else ""), stage, stage["seconds"])
        for stage in report["stages"]
    ]
    for name, numbers, seconds in rows:
        latency = numbers["latency_ms"]
        table.add_row(
            name,
            f"{numbers['accuracy']:.2f}",
            f"{numbers['nonzero_params']:,}",
            f"{numbers['macs']:,}",
            f"{numbers['tflite_bytes']:,}",
            "-" if numbers["packed_bytes"] is None else f"{numbers['packed_bytes']:,}",
            f"{numbers['peak_memory_bytes']:,}",
            "-" if latency is None else f"{latency['p50']:.3f}",
            "" if seconds is None else f"{seconds:.1f}",
        )
    ratio, final = report["ratios"], report["final"]
    in_turns = final["latency_ms"] is not None and final["speedup"] is not None
    table.add_section()
    table.add_row(
        "gain",
        f"{ratio['accuracy_delta']:+.2f}",
        *(
            _times(ratio[key])
            for key in ("nonzero_params", "macs", "tflite_bytes", "packed_bytes", "peak_memory_bytes")
        ),
        _times(final["speedup"] if in_turns else ratio["latency_p50"]),
        "",
    )
    table.caption = f"the whole run: {report['seconds']:.1f} s"
    if in_turns:
        table.caption += (
            "\ngain in p50: the last file and the original timed in turns; the rows are medians taken apart"
        )
    console = Console()
    # A file or a pipe has no width; the table must not be cut to 80 columns there.
    (console if console.is_terminal else Console(width=140)).print(table)
    for stage in report["stages"]:
        if stage["allocation"]:
            wide = console if console.is_terminal else Console(width=140)
            wide.print(_allocation_table(stage["name"], stage["allocation"]))
        for item in stage["skipped"]:
            print(f"{stage['name']} skipped {item['layer']}: {item['reason']}")
    for note in report["notes"]:
        print(note)


def _allocation_table(stage: str, rows: Sequence[Mapping[str, Any]]) -> object:
    """Return what a search has chosen, layer by layer, as a table for the console."""
    from rich.table import Table

    table = Table(title=f"{stage}: what each layer got, and what was expected of it")
    for heading in ("layer", "chosen", "divergence", "bytes", "ms"):
        table.add_column(heading, justify="left" if heading in ("layer", "chosen") else "right")
    for row in rows:
        ms = "" if row["milliseconds"] is None else f"{row['milliseconds']:.4f}"
        chosen = ", ".join(row["chosen"]) or "as it is"
        table.add_row(row["layer"], chosen, f"{row['divergence']:.2e}", f"{row['bytes']:,}", ms)
    return table


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _stage(stage: StageResult) -> dict[str, Any]:
    return {
        "name": stage.name,
        "config": stage.config,
        **numbers_to_json(stage.numbers),
        "seconds": round(stage.seconds, 3),
        "cached": stage.cached,
        "skipped": [asdict(item) for item in stage.skipped],
        "guarantees": list(stage.guarantees),
        "released": list(stage.released),
        "measured": dict(stage.measured),
        "allocation": [asdict(item) for item in stage.allocation],
        "noise": [asdict(item) for item in stage.noise],
        "recovered": None if stage.recovered is None else asdict(stage.recovered),
    }


def board_name(values: Mapping[str, Any]) -> str:
    """Return the name of a configured board: that of its class, as the choices of ``board=`` are spelt."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(values["_target_"]).rpartition(".")[2]).lower()


def _choice(values: Mapping[str, Any]) -> str:
    """Return a short name for a configured object: its data set, or its class in lower case."""
    named = values.get("dataset")
    return str(named) if named else str(values["_target_"]).rpartition(".")[2].lower()
