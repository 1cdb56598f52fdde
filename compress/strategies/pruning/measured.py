"""Budgets that only a file and a board can tell: bytes and latency."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tf_keras
from scipy.optimize import brentq

from compress.candidate import Candidate
from compress.graph.channels.groups import Channels, Group
from compress.metrics.size import file_bytes
from compress.strategies.pruning.plan import Size
from compress.strategies.strategy import Context

MEASURED = {"bytes": "params", "latency": "macs"}
"""Unit that is measured -> unit that is counted and moves with it."""
_PROBES = 10
_NEAR, _LEAST = 0.005, 1e-3


@dataclass(frozen=True)
class Start:
    """What the model was when the stage began: its counts, and what was measured of its file if the budget asks."""

    size: Size
    measured: float

    @classmethod
    def of(cls, candidate: Candidate, context: Context, unit: str, groups: Iterable[Group]) -> Start:
        """Count and measure; ``groups``: those that may go.

        Raises:
            CompressError: if the board gives no latency and the budget is one.
        """
        return cls(Size.of(candidate.model, groups), _measure(candidate, context, unit) if unit in MEASURED else 1.0)

    def share_of(self, model: tf_keras.Model, candidate: Candidate, context: Context, unit: str) -> float:
        """Return the share that is left when the candidate's model is ``model``."""
        # What the guarantees say of the weights does not change how large or fast the file is.
        return _measure(candidate.evolve(model=model, guarantees=()), context, unit) / self.measured

    def kept(self, candidate: Candidate, context: Context, unit: str) -> float:
        """Return the share that the candidate is of the start."""
        if unit in MEASURED:
            return self.share_of(candidate.model, candidate, context, unit)
        if unit == "channels":
            channels = Channels(candidate.model)
            return self.size.channels_kept(channels, np.ones(channels.count, bool))
        return float(getattr(Size.of(candidate.model), unit) / getattr(self.size, unit))


def _measure(candidate: Candidate, context: Context, unit: str) -> float:
    with tempfile.TemporaryDirectory(prefix=".measured-") as folder:
        artifact = context.export(candidate, Path(folder, "model.tflite"))
        if unit == "bytes":
            return float(file_bytes(artifact.path))
        return context.median_latency(artifact, "macs")


def measured_once(
    stay: Callable[[float], np.ndarray], measure: Callable[[np.ndarray], float]
) -> Callable[[float], float]:
    """Return share -> ``measure(stay(share))``; shares that leave the same units are measured once."""
    known: dict[bytes, float] = {}

    def measured(share: float) -> float:
        left = stay(share)
        if (key := left.tobytes()) not in known:
            known[key] = measure(left)
        return known[key]

    return measured


def largest_share(measured: Callable[[float], float], goal: float) -> tuple[float, float]:
    """Return (share, what was measured there): the largest share found at which what is measured meets the goal.

    ``measured(share)`` grows with the share of multiply-adds or parameters that is kept, and is 1 at 1; it is asked a
    few times. If the goal is not met even when all goes that may, what is returned is above it.
    """
    known = {1.0: 1.0}

    def above(share: float) -> float:
        if share not in known:
            known[share] = measured(share)
        return known[share] - goal * (1 - _NEAR)

    if above(_LEAST) >= 0:
        return _LEAST, known[_LEAST]
    brentq(above, _LEAST, 1.0, xtol=1e-4, rtol=1e-3, maxiter=_PROBES, disp=False)
    return max((share, value) for share, value in known.items() if value <= goal)
