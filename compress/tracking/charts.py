"""Pictures of one run: layers before and after, the noise of an integer file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from compress.deploy.noise import Noise

_OFTEN_SATURATED = 0.01
_LONGEST_NAME = 44


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
