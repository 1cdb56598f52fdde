"""Pictures: layers before and after, and the Pareto chart of a multirun."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.deploy.noise import Noise

_OFTEN_SATURATED = 0.01
_LONGEST_NAME = 44


@dataclass(frozen=True)
class Point:
    """One finished run in the chart. ``pareto``: for each objective, whether the run is on that front."""

    run: str
    label: str
    accuracy: float
    tflite_bytes: float
    latency_p50: float
    pareto: Mapping[str, bool]


OBJECTIVES = {"tflite_bytes": "bytes of the .tflite", "latency_p50": "latency p50, ms"}


def layers_picture(
    before: Mapping[str, Mapping[str, int]], after: Mapping[str, Mapping[str, int]], title: str, path: Path
) -> None:
    """Draw non-zero weights and multiply-adds of every layer, before and after, into a PNG."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys([*before, *after]))
    names.sort(key=lambda name: (_base_position(name, list(before)), name))
    figure = Figure(figsize=(11, max(3.0, 0.26 * len(names) + 1.6)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(names))
    for axis, key, label in zip(axes, ("nonzero", "macs"), ("non-zero weights", "multiply-adds"), strict=True):
        axis.barh(places - 0.2, [before.get(n, {}).get(key, 0) for n in names], 0.4, label="before", color="#b8c4d6")
        axis.barh(places + 0.2, [after.get(n, {}).get(key, 0) for n in names], 0.4, label="after", color="#1f5fa8")
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(places, names, fontsize=8)
    axes[0].invert_yaxis()
    axes[1].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


def noise_picture(noise: Sequence[Noise], title: str, path: Path) -> None:
    """Draw the signal-to-quantization-noise ratio of every tensor, in the order of computation, into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, max(3.0, 0.24 * len(noise) + 1.6)), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(noise))
    # What fits the range is blue; where values are cut off at its ends, the range is to blame.
    colors = ["#d1495b" if row.saturated > _OFTEN_SATURATED else "#1f5fa8" for row in noise]
    axis.barh(places, [row.signal_to_noise_db for row in noise], 0.7, color=colors)
    axis.set_yticks(
        places, [f"{row.layer or row.tensor[-_LONGEST_NAME:]}  {row.operator.lower()}" for row in noise], fontsize=8
    )
    axis.invert_yaxis()
    axis.set_xlabel(f"signal to quantization noise, dB (red: over {_OFTEN_SATURATED:.0%} of the values are cut off)")
    axis.grid(axis="x", alpha=0.3)
    axis.set_title(title)
    figure.savefig(path, dpi=100)


def _base_position(name: str, originals: Sequence[str]) -> int:
    """Return the place of the original layer that ``name`` came from."""
    matches = [i for i, original in enumerate(originals) if name == original or name.startswith(f"{original}_")]
    return max(matches, key=lambda i: len(originals[i]), default=len(originals))


def pareto_page(points: Sequence[Point], path: Path) -> None:
    """Write the interactive chart: accuracy against bytes and against latency; hover shows pipeline and numbers."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 2, subplot_titles=[f"accuracy against {text}" for text in OBJECTIVES.values()])
    for column, (key, text) in enumerate(OBJECTIVES.items(), start=1):
        front = sorted((p for p in points if p.pareto[key]), key=lambda p: float(getattr(p, key)))
        for name, chosen, mode, color in (
            ("dominated", [p for p in points if not p.pareto[key]], "markers", "#9aa5b1"),
            ("Pareto front", front, "lines+markers", "#d1495b"),
        ):
            figure.add_trace(
                go.Scatter(
                    x=[getattr(p, key) for p in chosen],
                    y=[p.accuracy for p in chosen],
                    mode=mode,
                    name=name,
                    legendgroup=name,
                    showlegend=column == 1,
                    marker={"size": 11, "color": color},
                    line={"color": color, "shape": "hv"},
                    text=[_hover(p) for p in chosen],
                    hovertemplate="%{text}<extra></extra>",
                ),
                row=1,
                col=column,
            )
        figure.update_xaxes(title_text=text, row=1, col=column)
        figure.update_yaxes(title_text="accuracy of the exported file, %", row=1, col=column)
    figure.update_layout(template="plotly_white", height=560, title="Pareto fronts of this multirun")
    # The page carries plotly itself: it opens without a network.
    figure.write_html(path, include_plotlyjs=True, full_html=True)


def pareto_picture(points: Sequence[Point], path: Path) -> None:
    """Draw the same chart into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, (key, text) in zip(axes, OBJECTIVES.items(), strict=True):
        front = sorted((p for p in points if p.pareto[key]), key=lambda p: float(getattr(p, key)))
        others = [p for p in points if not p.pareto[key]]
        axis.scatter(
            [getattr(p, key) for p in others], [p.accuracy for p in others], color="#9aa5b1", label="dominated"
        )
        axis.plot(
            [getattr(p, key) for p in front],
            [p.accuracy for p in front],
            color="#d1495b",
            marker="o",
            drawstyle="steps-post",
            label="Pareto front",
        )
        for point in points:
            axis.annotate(
                point.label,
                (getattr(point, key), point.accuracy),
                fontsize=8,
                xytext=(4, 4),
                textcoords="offset points",
            )
        axis.set_xlabel(text)
        axis.set_ylabel("accuracy of the exported file, %")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=90)


def _hover(point: Point) -> str:
    lines: list[Any] = [
        f"<b>{point.label}</b>",
        f"accuracy {point.accuracy:.2f} %",
        f".tflite {point.tflite_bytes:,.0f} bytes",
        f"p50 {point.latency_p50:.3f} ms",
        f"run {point.run[:8]}",
    ]
    return "<br>".join(lines)
