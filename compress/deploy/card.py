"""The model card: what was done, with which numbers, on what data; in Markdown, from the report alone.

The sections follow Mitchell et al., Model Cards for Model Reporting (arXiv 1810.03993), as far as a run knows them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from compress.deploy.interface import Interface
from compress.words import counted

UNSTATED = "not stated"
_SHOWN_LABELS = 20
_PLOTS = {"layers.png": "weights and multiply-adds of each layer, before and after", "noise.png": "quantization noise"}


def make_card(
    report: Mapping[str, Any],
    *,
    licence: str = "",
    author: str = "",
    data_licence: str = "",
    files: Mapping[str, str] | None = None,
) -> str:
    """Return the card of a run; what nobody has said is marked as such. ``files``: what lies beside it, and why."""
    interface = Interface.from_json(report["interface"])
    tags = ["compressed"] if interface.channels is None else ["image-classification", "compressed"]
    beside = ["## Files", _rows(("file", "what it is"), list(files.items()))] if files else []
    parts = [
        # YAML for model hubs; what JSON quotes, YAML reads.
        f"---\nlicense: {json.dumps(licence or 'unknown')}\nlibrary_name: tflite\ntags: {json.dumps(tags)}\n---",
        f"# {report['model']}, compressed: {report['strategy']}",
        _summary(report, interface),
        "## Use",
        _use(interface),
        *beside,
        "## What was done",
        _done(report),
        "## Numbers",
        _numbers(report),
        "## Verification",
        _verification(report["verification"]),
        "## Data",
        _data(report, interface),
        "## Licence",
        _rows(
            ("field", "value"),
            [
                ("licence of the model", licence or UNSTATED),
                ("licence of the data", data_licence or UNSTATED),
                ("author", author or UNSTATED),
            ],
        ),
        "## What to know",
        "\n".join(f"- {note}" for note in report["notes"]) or "Nothing was found wrong.",
        "## Plots",
        "\n\n".join(f"![{text}]({name})" for name, text in _PLOTS.items() if name in plots_of(report)),
        "## How it was made",
        _made(report),
    ]
    return "\n\n".join(parts) + "\n"


def plots_of(report: Mapping[str, Any]) -> list[str]:
    """Return the names of the pictures beside the report."""
    stages = report["stages"]
    return [name for name in _PLOTS if name != "noise.png" or (stages and stages[-1]["noise"])]


def input_in_words(interface: Interface) -> str:
    """Return what the input is, in one sentence."""
    low, high = interface.pixels
    kind = interface.input.dtype
    if interface.input.scale:
        kind += f", value = {interface.input.scale:g} * (number - {interface.input.zero_point})"
    shape = "x".join(map(str, interface.input.shape))
    if interface.channels is None:
        return f"{shape} numbers ({kind})"
    color = "gray" if interface.channels == 1 else "RGB"
    height, width = interface.input.shape[1:3]
    return (
        f"a {color} image of {height} rows and {width} columns, {shape} ({kind}); black is {low:g}, white is {high:g}"
    )


def _summary(report: Mapping[str, Any], interface: Interface) -> str:
    final, ratio = report["final"], report["ratios"]
    trained = "" if report["trained"] else " Its weights were never trained: the accuracy means nothing."
    gained = (
        f" ({ratio['accuracy_delta']:+.2f} points against the original model's file, which is "
        f"{ratio['tflite_bytes']:.2f} times as large)"
        if report["stages"]
        else ""
    )
    return (
        f"A classifier of {interface.output.shape[-1]} classes: {final['tflite_bytes']:,} bytes, "
        f"{final['accuracy']:.2f} % right on the {_part(report)} part of {report['data']}{gained}. These are numbers "
        f"of the `.tflite` file itself, run by LiteRT.{trained}"
    )


def _use(interface: Interface) -> str:
    scores = (
        "probabilities of the classes" if interface.scores == "probabilities" else "logits: softmax makes probabilities"
    )
    lines = [f"- input: {input_in_words(interface)}", f"- output: {_times(interface.output.shape)}, {scores}"]
    if interface.channels is not None:
        lines.append(
            "- a photo is turned upright and resized to that size (bilinear, proportions are not kept); its pixels p "
            f"of 0 to 255 become (p - {interface.mean:g}) / {interface.std:g}; the file does all other preprocessing"
        )
    return "\n".join(lines)


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _done(report: Mapping[str, Any]) -> str:
    if not report["stages"]:
        return "Nothing: the model was exported and measured as it is."
    rows = []
    for stage in report["stages"]:
        chosen = {
            key: value
            for key, value in stage["config"].items()
            if key not in ("recovery", "only", "skip", "repeat", "release") and value not in (None, [], (), {}, False)
        }
        what = ", ".join(f"{key}={_short(value)}" for key, value in chosen.items())
        kept = "; ".join(
            text.partition(": ")[2] for text in stage["guarantees"] if text.startswith(f"{stage['name']}:")
        )
        rows.append((stage["name"], what or "-", _training(stage), kept or "-", str(len(stage["skipped"]))))
    return _rows(("stage", "settings", "training", "what it established", "layers left alone"), rows)


def _training(stage: Mapping[str, Any]) -> str:
    """Return how a stage has trained, and by whom and with what it was taught, in words."""
    recovered, recovery = stage["recovered"], stage["config"]["recovery"]
    if recovered is None or recovered["method"] == "none":
        return "-"
    words = [f"{recovered['method']}, {recovery['epochs']:g} epochs"]
    if recovered["method"] == "distill":
        words[0] += f", taught by {', '.join(recovered['teachers'])}"
        words += [f"{name} {_short(weight)}" for name, weight in (recovery["losses"] or {}).items()]
    return "; ".join(words)


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _numbers(report: Mapping[str, Any]) -> str:
    rows = []
    for name, numbers in [("original", report["baseline"]), *((s["name"], s) for s in report["stages"])]:
        latency, keras, packed = numbers["latency_ms"], numbers["accuracy_keras"], numbers["packed_bytes"]
        rows.append(
            (
                name,
                f"{numbers['accuracy']:.2f}",
                "-" if keras is None else f"{keras:.2f}",
                f"{numbers['nonzero_params']:,}",
                f"{numbers['macs']:,}",
                f"{numbers['tflite_bytes']:,}",
                "-" if packed is None else f"{packed:,}",
                f"{numbers['peak_memory_bytes']:,}",
                "-" if latency is None else f"{latency['p50']:.3f}",
            )
        )
    headings = ("after", "accuracy %", "in Keras %", "nonzero params", "MACs", ".tflite bytes", ".cmp bytes")
    table = _rows((*headings, "peak memory", "p50 ms"), rows)
    final = report["final"]
    speedup = final.get("speedup") if report["stages"] and final["latency_ms"] else None
    in_turns = f" The last file is {speedup:.2f} times as fast as the original, timed in turns." if speedup else ""
    return f"{table}\n\nLatency is that of one sample on the board `{report['board']}`.{in_turns}"


def _verification(found: Mapping[str, Any]) -> str:
    agreed = found["agreement"]
    lines = []
    if agreed is not None:
        lines.append(
            "The file and the Keras model that it was made from choose the same class for "
            f"{agreed['same_class']:.2f} % of {counted(agreed['samples'], 'sample')}. Their outputs differ by at most "
            f"{agreed['max_difference']:.3g}, and by {agreed['mean_difference']:.3g} on average; the largest output is "
            f"{agreed['largest_output']:.3g}."
        )
    used = ", ".join(f"{row['count']} {row['name']}" for row in found["operators"])
    lines.append(f"Operators: {used}.")
    if found.get("float_operators"):
        lines.append(f"Between its integer operators it computes with floats: {', '.join(found['float_operators'])}.")
    for who, key in (
        (f"The board {found['board']}", "lacking"),
        ("TensorFlow Lite for Microcontrollers", "micro_lacking"),
    ):
        lines.append(
            f"{who} " + (f"lacks {', '.join(found[key])}." if found[key] else "has a kernel for each of them.")
        )
    return "\n\n".join(lines)


def _data(report: Mapping[str, Any], interface: Interface) -> str:
    names = interface.class_names
    shown = ", ".join(names[:_SHOWN_LABELS]) + (" and more" if len(names) > _SHOWN_LABELS else "")
    return (
        f"`{report['data']}`: what the stages learned or calibrated, they took from its train part; accuracy and "
        f"agreement are those on its {_part(report)} part.\n\n"
        f"Classes, in the order of the outputs: {shown}."
    )


def _part(report: Mapping[str, Any]) -> str:
    # Reports of earlier versions do not say: there was nothing but the test part.
    return str(report.get("evaluated_on", "test"))


def _made(report: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"`strategy={report['strategy']}`, seed {report['seed']}; {versions}. Every setting is in `report.json`."


def _rows(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
