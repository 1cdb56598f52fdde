"""Pareto charts of one sweep or several: an interactive page, which needs no network, and a PNG.

The page carries plotly.js compressed, as the browser can unpack it itself: 1.9 MB instead of 4.8, and the chart's own
few kilobytes.
"""

from __future__ import annotations

import base64
import functools
import gzip
import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.tracking.pareto import Estimate, Front, Objective, Point

TEMPLATE = Path(__file__).with_name("pareto_chart.html")
_COLORS = ("#d1495b", "#1f5fa8", "#2e8b57", "#b8860b", "#7b4fa3", "#00838f", "#8d5524", "#555555")
_DOMINATED = "#9aa5b1"
_MOST_NAMED = 25
_LOCAL_SERVER = "http://127.0.0.1:5000"
"""Where the README has people start the MLflow UI for a local file."""
_AXES = {
    "accuracy": "accuracy of the exported file, %",
    "tflite_bytes": "bytes of the .tflite",
    "packed_bytes": "bytes of the packed file",
    "latency_p50": "latency p50, ms",
}
_HOVER = ("accuracy", "tflite_bytes", "packed_bytes", "nonzero_params", "macs", "peak_memory_bytes", "latency_p50")


@dataclass(frozen=True)
class Sweep:
    """The points of a sweep; where its runs are found."""

    name: str
    """Shown if there are several."""
    points: Sequence[Point]
    uri: str = ""
    """The MLflow store."""
    experiment: str = ""
    """Id of the experiment."""


@dataclass(frozen=True)
class _Panel:
    """One pair of axes; ``front``: whose steps are drawn there, if it has these two objectives and no more."""

    x: Objective
    y: Objective
    names: frozenset[str]
    """Fronts that it shows."""
    steps: str | None


def _panels(fronts: Sequence[Front]) -> list[_Panel]:
    """Return a panel for each pair of a front's first objective and another one."""
    found: dict[tuple[str, str], _Panel] = {}
    for front in fronts:
        y, *others = front.objectives
        for x in others:
            before = found.get((x.metric, y.metric))
            steps = front.name if not others[1:] else before.steps if before else None
            names = (before.names if before else frozenset()) | {front.name}
            found[x.metric, y.metric] = _Panel(x, y, names, steps)
    return list(found.values())


def pareto_page(sweeps: Sequence[Sweep], fronts: Sequence[Front], path: Path, title: str) -> None:
    """Write the page: hover shows a point's pipeline and numbers, a click leads to its runs in the MLflow UI."""
    figure = json.dumps(pareto_figure(sweeps, fronts), allow_nan=False)
    # Inside a script element only these could end it, or open a comment.
    figure = figure.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    page = TEMPLATE.read_text(encoding="utf-8")
    for mark, text in (("TITLE", html.escape(title)), ("FIGURE", figure), ("LIBRARY", _library())):
        page = page.replace(f"[[{mark}]]", text, 1) if mark != "TITLE" else page.replace(f"[[{mark}]]", text)
    path.write_text(page, encoding="utf-8")


@functools.cache
def _library() -> str:
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def pareto_figure(sweeps: Sequence[Sweep], fronts: Sequence[Front]) -> dict[str, Any]:
    """Return the chart as plotly.js reads it, without numbers that JSON does not have."""
    panels = _panels(fronts)
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    traces: list[dict[str, Any]] = []
    layout: dict[str, Any] = {
        "height": 560 * rows,
        "hovermode": "closest",
        "plot_bgcolor": "white",
        "legend": {"orientation": "h", "y": 1.08 if rows == 1 else 1.03},
        "margin": {"t": 60},
    }
    for number, panel in enumerate(panels):
        suffix = "" if number == 0 else str(number + 1)
        row, column = divmod(number, columns)
        for axis, objective, place, count in (("x", panel.x, column, columns), ("y", panel.y, rows - 1 - row, rows)):
            other = "y" if axis == "x" else "x"
            layout[f"{axis}axis{suffix}"] = {
                "title": {"text": html.escape(_AXES.get(objective.metric, objective.metric))},
                "domain": [place / count, (place + (0.82 if count > 1 else 1.0)) / count],
                "anchor": f"{other}{suffix}",
                "gridcolor": "#e6e9ee",
                "zeroline": False,
                "linecolor": "#444",
            }
        for index, sweep in enumerate(sweeps):
            color = _COLORS[index % len(_COLORS)]
            shown = [p for p in sweep.points if _has(p, panel)]
            front = [p for p in shown if p.fronts & panel.names]
            # The cheapest first, where costs are on the axis, so that the steps go along the front.
            front.sort(key=lambda p: (p.values[panel.x.metric].mean, p.values[panel.y.metric].mean))
            several = len(sweeps) > 1
            for name, chosen, on_front in (
                ("dominated", [p for p in shown if not p.fronts & panel.names], False),
                ("Pareto front", front, True),
            ):
                plain = _DOMINATED if not several else color
                traces.append(
                    {
                        "type": "scatter",
                        "mode": "lines+markers" if on_front and panel.steps else "markers",
                        "name": html.escape(f"{sweep.name}: {name}") if several else name,
                        "legendgroup": f"{index} {name}",
                        "showlegend": number == 0,
                        "xaxis": f"x{suffix}",
                        "yaxis": f"y{suffix}",
                        "x": [p.values[panel.x.metric].mean for p in chosen],
                        "y": [p.values[panel.y.metric].mean for p in chosen],
                        "error_x": _bars([p.values[panel.x.metric] for p in chosen]),
                        "error_y": _bars([p.values[panel.y.metric] for p in chosen]),
                        "marker": {"size": 11 if on_front else 9, "color": color if on_front else plain},
                        "opacity": 1.0 if on_front or not several else 0.4,
                        "line": {"color": color, "shape": _steps(panel)},
                        "text": [_hover(p) for p in chosen],
                        "hovertemplate": "%{text}<extra></extra>",
                        "customdata": [_details(p, sweep) for p in chosen],
                    }
                )
    return {"data": traces, "layout": layout}


def _has(point: Point, panel: _Panel) -> bool:
    none = Estimate(math.nan)
    return all(math.isfinite(point.values.get(o.metric, none).mean) for o in (panel.x, panel.y))


def _steps(panel: _Panel) -> str:
    """Return the shape of the line between two neighbours of a front: what both dominate lies on its worse side."""
    # Sorted by x. Of a cost, each level of y is reached from its x on; of a gain, up to its x.
    return "vh" if panel.x.maximise else "hv"


def _bars(values: Sequence[Estimate]) -> dict[str, Any]:
    widths = [value.half_width or 0.0 for value in values]
    finite = [width if math.isfinite(width) else 0.0 for width in widths]
    return {"type": "data", "array": finite, "visible": any(finite), "thickness": 1, "width": 4}


def _hover(point: Point) -> str:
    seeds = f" (mean of {len(point.runs)} seeds, with 95 % intervals)" if len(point.runs) > 1 else ""
    rows = [f"{html.escape(metric)} {point.values[metric].text}" for metric in _metrics(point)]
    return "<br>".join([f"<b>{html.escape(point.label)}</b>{seeds}", *rows])


def _metrics(point: Point) -> list[str]:
    return [metric for metric in _HOVER if metric in point.values]


def _details(point: Point, sweep: Sweep) -> dict[str, Any]:
    """Return what a click shows: the page writes all of it as text."""
    server = sweep.uri if sweep.uri.startswith(("http://", "https://")) and "@" not in sweep.uri else _LOCAL_SERVER
    return {
        "label": point.label,
        "sweep": sweep.name,
        "values": [[metric, point.values[metric].text] for metric in _metrics(point)],
        "server": server.rstrip("/"),
        "runs": [
            {"seed": seed, "run": run, "path": f"/#/experiments/{sweep.experiment}/runs/{run}"}
            for run, seed in point.runs.items()
        ],
    }


def pareto_picture(sweeps: Sequence[Sweep], fronts: Sequence[Front], path: Path) -> None:
    """Draw the same chart into a PNG."""
    from matplotlib.figure import Figure

    panels = _panels(fronts)
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(6.2 * columns, 5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    several = len(sweeps) > 1
    for axis, panel in zip(axes, panels, strict=False):
        for index, sweep in enumerate(sweeps):
            color = _COLORS[index % len(_COLORS)]
            shown = [p for p in sweep.points if _has(p, panel)]
            on = sorted(
                (p for p in shown if p.fronts & panel.names),
                key=lambda p: (p.values[panel.x.metric].mean, p.values[panel.y.metric].mean),
            )
            off = [p for p in shown if not p.fronts & panel.names]
            steps = "steps-pre" if panel.x.maximise else "steps-post"
            line = {"linestyle": "-" if panel.steps else "none", "drawstyle": steps}
            for chosen, name, style in (
                (off, "dominated", {"color": color if several else _DOMINATED, "linestyle": "none", "alpha": 0.6}),
                (on, "Pareto front", {"color": color, **line}),
            ):
                x, y = ([p.values[o.metric] for p in chosen] for o in (panel.x, panel.y))
                axis.errorbar(
                    [value.mean for value in x],
                    [value.mean for value in y],
                    xerr=_bars(x)["array"],
                    yerr=_bars(y)["array"],
                    marker="o",
                    capsize=2,
                    elinewidth=0.8,
                    label=f"{sweep.name}: {name}" if several else name,
                    **style,
                )
            # Names of many points would only hide them.
            for point in on if len(shown) > _MOST_NAMED or several else shown:
                place = (point.values[panel.x.metric].mean, point.values[panel.y.metric].mean)
                axis.annotate(point.label, place, fontsize=7, xytext=(4, 4), textcoords="offset points")
        axis.set_xlabel(_AXES.get(panel.x.metric, panel.x.metric))
        axis.set_ylabel(_AXES.get(panel.y.metric, panel.y.metric))
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=90)
