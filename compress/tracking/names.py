"""The names of the metrics that runs report: what objectives can be, known before any run has begun."""

from __future__ import annotations

from collections.abc import Sequence

from compress.errors import CompressError, did_you_mean
from compress.tracking.pareto import Front

# Written out: the nouns that carry these numbers would import TensorFlow, which the command that sweeps does not need.
OF_FINAL = frozenset(
    {
        *("accuracy", "accuracy_keras", "params", "nonzero_params", "macs", "tflite_bytes", "gzip_bytes"),
        *("packed_bytes", "peak_memory_bytes", "sparse_kernels", "estimate_ms", "speedup", "relative_latency"),
        *("latency_p50", "latency_p90", "latency_p99", "latency_mean"),
    }
)
"""Numbers of a report, by the names that they have in MLflow."""
OF_BOARD = "board_"
"""Begins the names of what a board says besides: each board has names of its own."""
RATIOS = frozenset(
    {
        *("params", "nonzero_params", "macs", "tflite_bytes", "packed_bytes", "gzip_bytes", "peak_memory_bytes"),
        *("latency_p50", "compression_rate", "accuracy_delta"),
    }
)
OF_STAGE = OF_FINAL | {"accuracy_gap"}
OF_BASELINE = (OF_STAGE | {"seconds"}) - {"speedup"}
OF_RUN = frozenset({"seconds", "stages_made", "stages_cached"})


def require_known(fronts: Sequence[Front], where: str, *, recorded: bool) -> None:
    """Refuse an objective that no run can report, whatever its pipeline and its board.

    Args:
        fronts: the objectives.
        where: the key that holds them.
        recorded: they are read from MLflow, which is told of every stage, and not from ``report.json``.

    Raises:
        CompressError: naming the metrics nearest to it.
    """
    names = (OF_STAGE | OF_RUN) if recorded else OF_FINAL
    known = {*names, *(f"ratio.{key}" for key in RATIOS), *(f"baseline.{key}" for key in OF_BASELINE)}
    for metric in (objective.metric for front in fronts for objective in front.objectives):
        if metric in known or metric.removeprefix("baseline.").startswith(OF_BOARD):
            continue
        stage, dot, own = metric.partition(".")
        # What a stage measures of its own work has names of its own.
        if recorded and dot and own and stage not in ("ratio", "baseline"):
            continue
        others = f"{OF_BOARD}<what a board says>" + (", <stage>.<metric>" if recorded else "")
        raise CompressError(
            where,
            expected=f"a metric that runs report ({others} among them)",
            received=metric,
            fix=did_you_mean(metric, known),
        )
