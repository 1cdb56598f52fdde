"""Layers that stay floats in an integer file, as many as its latency allows: those that help its outputs most."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.optimize import LinearConstraint, milp

from compress.candidate import Artifact, Candidate
from compress.deploy.conversion import calibration_samples
from compress.deploy.integer import Calibrated
from compress.errors import CompressError
from compress.metrics.accuracy import file_outputs
from compress.progress import progress
from compress.strategies.strategy import Context

_COMPARED = 64
_ATTEMPTS = 6


def keep_floats_within(candidate: Candidate, context: Context, layers: Sequence[str], share: float) -> tuple[str, ...]:
    """Return the layers that stay floats while the file takes at most ``share`` of the float file's time.

    What a layer costs is measured on the board, and what it is worth on calibration samples, each with that layer alone
    as floats; which ones together, by integer programming; the file of that choice is measured again.

    Args:
        candidate: its storage says how it is quantized.
        context: its board measures.
        layers: those that may stay floats.
        share: of the float file's median latency.

    Raises:
        CompressError: if the board gives no latency, or the integer file takes longer than that.
    """
    source, fixed = Calibrated.of(candidate, context.data), candidate.storage.float_layers
    compared = np.concatenate([sample for (sample,) in calibration_samples(candidate, context.data, _COMPARED)])
    with tempfile.TemporaryDirectory(prefix=".measured-") as folder:
        path = Path(folder, "model.tflite")

        def time_of(content: bytes) -> float:
            path.write_bytes(content)
            return context.median_latency(Artifact(path, candidate.storage), "bytes")

        def error_of(content: bytes) -> float:
            path.write_bytes(content)
            return float(np.mean((file_outputs(path, compared) - wanted) ** 2))

        whole = time_of(source.floats)
        wanted = file_outputs(path, compared)
        integer = source.quantized(fixed)
        least, error = time_of(integer), error_of(integer)
        goal = share * whole
        if least > goal:
            raise CompressError(
                f"strategy.{context.stage}.latency",
                expected=f"at least {least / whole:.3f}, what the integer file takes of the float file's time",
                received=f"{share:g}",
                fix="Allow more, or take work away first (prune_channels, lowrank).",
            )
        gains, costs = {}, {}
        with progress("latency of each layer") as shown:
            for number, layer in enumerate(layers, start=1):
                content = source.quantized((*fixed, layer))
                gains[layer] = max(error - error_of(content), 0.0)
                costs[layer] = max(time_of(content) - least, 0.0)
                shown.advance(number, len(layers), layer)
        allowed = goal - least
        for _ in range(_ATTEMPTS):
            chosen = worth_most(gains, costs, allowed)
            over = time_of(source.quantized((*fixed, *chosen))) - goal
            if over <= 0:
                return chosen
            # Neighbours that are floats together need no conversion between them, others need more of them.
            allowed = min(allowed, sum(costs[layer] for layer in chosen)) - over
    return ()


def worth_most(gains: Mapping[str, float], costs: Mapping[str, float], most: float) -> tuple[str, ...]:
    """Return the layers with the largest sum of gains whose costs add up to at most ``most``."""
    names = [name for name in gains if gains[name] > 0 and costs[name] <= most]
    if not names or most < 0:
        return ()
    values = np.array([gains[name] for name in names])
    spent = np.array([[costs[name] for name in names]])
    solved = milp(
        -values / values.max(),
        integrality=np.ones(len(names)),
        bounds=(0, 1),
        constraints=LinearConstraint(spent / max(most, 1e-30), -np.inf, 1),
    )
    return tuple(name for name, taken in zip(names, solved.x, strict=True) if taken > 0.5)
