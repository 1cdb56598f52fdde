"""What a job tells the search that it belongs to: its numbers, or that it was given up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import GivenUp
from compress.tracking.pareto import is_gain

_GIVEN_UP = "given_up.txt"


def refuse_hopeless(stage: str, metrics: Mapping[str, float], limits: Mapping[str, float]) -> None:
    """Stop a pipeline whose numbers after a stage are beyond a limit: below it for a gain, above it for a cost.

    Raises:
        GivenUp: saying which.
    """
    for metric, limit in limits.items():
        value = metrics.get(metric)
        if value is not None and (value < limit if is_gain(metric) else value > limit):
            raise GivenUp(f"{metric} is {value:g} after {stage}, beyond the limit of {limit:g}")


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
    """Return the final numbers of a report by the names that they have in MLflow."""
    final = dict(report["final"])
    latency = final.pop("latency_ms", None) or {}
    on_board = final.pop("on_board", None) or {}
    values = {
        **final,
        **{f"latency_{key}": latency.get(key) for key in ("p50", "p90", "p99", "mean")},
        **{f"board_{key}": value for key, value in on_board.items()},
        **{f"ratio.{key}": value for key, value in report["ratios"].items()},
    }
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
