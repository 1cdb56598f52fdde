"""Reports of networks that are only counted: no data, no training, no export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compress.cli.build import make_plan
from compress.cli.compose import compose_config
from compress.errors import CompressError
from compress.metrics.counts import count_macs, count_params, layer_counts


class Counted:
    """Counts each network once, whichever table asks for it."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], dict[str, Any]] = {}

    def report(self, overrides: Sequence[str]) -> dict[str, Any]:
        """Return the part of a run's report that sizes are read from, for the untrained model of these overrides.

        ``final.variables`` are all numbers that the model holds, statistics of batch norms too.

        Raises:
            CompressError: if the overrides ask for a strategy, which would have to be run.
        """
        key = tuple(sorted(overrides))
        if key not in self._known:
            self._known[key] = _count(overrides)
        return self._known[key]


def _count(overrides: Sequence[str]) -> dict[str, Any]:
    import tf_keras

    plan = make_plan(compose_config(overrides))
    if plan.stages:
        raise CompressError(
            "strategy",
            expected="none: a table that is counted has no stages",
            received="+".join(stage.name for stage in plan.stages),
            fix="Write strategy=none, or leave count out of the grid.",
        )
    tf_keras.backend.clear_session()
    model = plan.model.build(plan.source.load(), plan.seed)
    sizes = {"params": count_params(model), "macs": count_macs(model), "variables": model.count_params()}
    return {"trained": False, "final": {**sizes, "layers": len(model.layers)}, "layers": {"final": layer_counts(model)}}
