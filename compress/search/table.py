"""The sensitivity table as Markdown, on the console, and as a heat map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from compress.search.sensitivity import Probe, Sensitivity
from compress.words import counted

_HEADINGS = (
    "layer",
    "technique",
    "divergence",
    "accuracy",
    "MACs saved",
    "bytes saved",
    "per million MACs",
    "per kB",
)
_ANNOTATED = 30
"""Layers up to which the cells of the heat map hold their numbers."""
_LEAST = 1e-9
"""Divergence below which a logarithm says nothing."""


def rows(sensitivity: Sensitivity) -> list[list[str]]:
    """Return the cells of the measured probes, layer by layer."""
    return [_cells(probe) for probe in _in_order(sensitivity) if probe.refused is None]


def refusals(sensitivity: Sensitivity) -> dict[str, list[str]]:
    """Return what was refused and why: reason with technique -> layers."""
    found: dict[str, list[str]] = {}
    for probe in _in_order(sensitivity):
        if probe.refused is not None:
            found.setdefault(f"{_column(probe)}: {probe.refused}", []).append(probe.layer)
    return found


def markdown(sensitivity: Sensitivity, title: str) -> str:
    """Return the page."""
    lines = [
        f"# Sensitivity of {title}",
        "",
        f"Each layer alone at each level, no recovery, on {counted(sensitivity.images, 'image')} of the validation "
        "part. "
        "Divergence: mean Kullback-Leibler divergence of the class probabilities from the reference's, in nats; "
        "accuracy: change in points; bytes: of the packed file. The last two columns are divergence for each unit "
        "saved: what is small there is cheap.",
        "",
        "| " + " | ".join(_HEADINGS) + " |",
        "|---|---|" + "---:|" * (len(_HEADINGS) - 2),
        *("| " + " | ".join(cells) + " |" for cells in rows(sensitivity)),
    ]
    refused = refusals(sensitivity)
    if refused:
        lines += ["", "Not done:", ""]
        lines += [f"- {reason} ({', '.join(layers)})" for reason, layers in refused.items()]
    return "\n".join([*lines, ""])


def print_table(sensitivity: Sensitivity, title: str) -> None:
    """Print the same on the console."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"sensitivity of {title}, {counted(sensitivity.images, 'validation image')}")
    for number, heading in enumerate(_HEADINGS):
        table.add_column(heading, justify="left" if number < 2 else "right", no_wrap=True)
    for cells in rows(sensitivity):
        table.add_row(*cells)
    console = Console()
    # A file or a pipe has no width; the table must not be cut to 80 columns there.
    (console if console.is_terminal else Console(width=140)).print(table)
    for reason, layers in refusals(sensitivity).items():
        print(f"not done: {reason} ({', '.join(layers)})")


def heat_map(sensitivity: Sensitivity, title: str, path: Path) -> None:
    """Draw divergence per unit saved: layers down, techniques and levels across; grey where nothing is saved."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(probe.layer for probe in sensitivity.probes))
    panels = [
        ("for each kB saved in the packed file", _grid(sensitivity, names, "per_kilobyte")),
        ("for each million multiply-adds saved", _grid(sensitivity, names, "per_mmac")),
    ]
    panels = [(text, grid) for text, grid in panels if grid]
    if not panels:
        panels = [("nothing was saved", {"": np.full(len(names), np.nan)})]
    widths = [max(len(grid), 3) for _, grid in panels]
    figure = Figure(figsize=(3.2 + 0.62 * sum(widths), 2.6 + 0.25 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for number, (axis, (text, grid)) in enumerate(zip(axes, panels, strict=True)):
        values = np.maximum(np.stack(list(grid.values()), axis=1), _LEAST)
        known = values[np.isfinite(values)]
        low, high = (known.min(), known.max()) if known.size else (1e-6, 1.0)
        norm = LogNorm(low, max(high, low * 1.01))
        axis.set_facecolor("#d9d9d9")
        shown = axis.imshow(values, aspect="auto", cmap="RdYlGn_r", norm=norm)
        axis.set_xticks(range(len(grid)), list(grid), rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
        axis.set_yticks(range(len(names)), names if number == 0 else [], fontsize=8)
        axis.set_title(text, fontsize=10)
        figure.colorbar(shown, ax=axis, shrink=0.8, pad=0.02)
        if len(names) <= _ANNOTATED:
            for (row, column), value in np.ndenumerate(values):
                if math.isfinite(value):
                    axis.text(column, row, _short(value), ha="center", va="center", fontsize=6)
    figure.suptitle(f"{title}: divergence of the outputs (nats); green is cheap, grey: not possible or nothing saved")
    figure.savefig(path, dpi=110)


def _grid(sensitivity: Sensitivity, names: Sequence[str], unit: str) -> Mapping[str, np.ndarray]:
    """Return column -> a value for each layer, NaN where there is none; columns without any are left out."""
    place = {name: number for number, name in enumerate(names)}
    found: dict[str, np.ndarray] = {}
    for probe in sensitivity.probes:
        value = None if probe.refused is not None else getattr(probe, unit)
        if value is not None:
            found.setdefault(_column(probe), np.full(len(names), np.nan))[place[probe.layer]] = value
    return found


def _column(probe: Probe) -> str:
    return f"{probe.technique} {probe.field} {probe.value:g}"


def _in_order(sensitivity: Sensitivity) -> list[Probe]:
    order = {name: number for number, name in enumerate(sensitivity.layers)}
    return sorted(sensitivity.probes, key=lambda probe: order[probe.layer])


def _cells(probe: Probe) -> list[str]:
    return [
        probe.layer,
        _column(probe),
        f"{probe.divergence:.2e}",
        f"{probe.accuracy_change:+.2f}",
        f"{probe.macs_saved:,}" if probe.macs_saved else "",
        f"{probe.bytes_saved:,}",
        *("" if value is None else f"{value:.2e}" for value in (probe.per_mmac, probe.per_kilobyte)),
    ]


def _short(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
