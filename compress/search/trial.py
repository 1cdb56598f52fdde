"""What a job tells the search that it belongs to: its numbers, or that it was given up."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import CompressError, GivenUp, did_you_mean

LIMITED = ("accuracy", "accuracy_keras")
"""Metrics of a stage that say whether there is hope: what the later ones are for (bytes, speed) is not among them."""
_GIVEN_UP = "given_up.txt"


def read_limits(given: object, where: str) -> dict[str, float]:
    """Return the limits below which a pipeline is stopped: metric -> least value.

    Raises:
        CompressError: if a metric is not one that an early look can judge, or a limit is no number.
    """
    if given is None:
        return {}
    fix = f"Write for example '{where}={{accuracy: 50}}'."
    if not isinstance(given, Mapping):
        raise CompressError(where, expected="limits by metric", received=str(given), fix=fix)
    for metric, limit in given.items():
        if metric not in LIMITED:
            raise CompressError(
                where,
                expected=f"limits for {' or '.join(LIMITED)}; bytes, times and counts may still fall in later stages",
                received=str(metric),
                fix=f"{did_you_mean(str(metric), LIMITED)} Bytes and times are objectives.",
            )
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not math.isfinite(limit):
            raise CompressError(f"{where}.{metric}", expected="a number", received=str(limit), fix=fix)
    return {str(metric): float(limit) for metric, limit in given.items()}


def refuse_hopeless(stage: str, metrics: Mapping[str, float], limits: Mapping[str, float]) -> None:
    """Stop a pipeline that is below a limit after a stage.

    Raises:
        GivenUp: saying which.
    """
    for metric, limit in limits.items():
        value = metrics.get(metric)
        if value is not None and value < limit:
            raise GivenUp(f"{metric} is {value:g} after {stage}, below the limit of {limit:g}")


def note_given_up(folder: Path, reason: str | None) -> None:
    """Leave in a job's folder that it was given up, or, without a reason, that it was not."""
    file = folder / _GIVEN_UP
    if reason is None:
        file.unlink(missing_ok=True)
    else:
        file.write_text(reason)


def read_outcome(folder: Path) -> tuple[dict[str, float] | None, bool]:
    """Return a finished job's metrics (None: it has none), and whether it was given up."""
    if (folder / _GIVEN_UP).is_file():
        return None, True
    file = folder / "report.json"
    return (metrics_of_report(json.loads(file.read_text())), False) if file.is_file() else (None, False)


def metrics_of_report(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the final numbers of a report, and those of its baseline, by the names that they have in MLflow."""
    values = {
        **_flat(report["final"]),
        **{f"ratio.{key}": value for key, value in report["ratios"].items()},
        **{f"baseline.{key}": value for key, value in _flat(report["baseline"]).items()},
    }
    if values.get("speedup"):
        values |= {"relative_latency": 1 / values["speedup"], "baseline.relative_latency": 1.0}
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _flat(numbers: Mapping[str, Any]) -> dict[str, Any]:
    own = dict(numbers)
    latency, on_board = own.pop("latency_ms", None) or {}, own.pop("on_board", None) or {}
    return {
        **own,
        **{f"latency_{key}": latency.get(key) for key in ("p50", "p90", "p99", "mean")},
        **{f"board_{key}": value for key, value in on_board.items()},
    }
