"""``python -m compress.pareto``: the Pareto fronts of several sweeps in one chart, and the volume that each dominates.

    python -m compress.pareto runs=<parent run id>,<parent run id>
    python -m compress.pareto runs=4f1c...,9a0e... names=grid,search objectives=[accuracy,packed_bytes,latency_p50]

runs         ids of parent runs, as the MLflow UI shows them: the fronts of their children are compared
names        what the sweeps are called in the chart, in the order of runs (default: the runs' names)
uri          the MLflow store (default: $MLFLOW_TRACKING_URI, or sqlite:///mlflow.db)
objectives   metrics (one front), or lists of metrics (a front each); which way is better may be said:
             peak_memory_bytes:min, board_same_class_percent:max
reference    {metric: value} that hypervolumes are counted from; by default the baseline's (see docs/runs.md)
output       folder of pareto.html and pareto.png (default: pareto)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.cli.errors import guarded
from compress.cli.words import key_values
from compress.errors import CompressError
from compress.words import counted

if TYPE_CHECKING:
    from compress.tracking.pareto import FinishedRun

_KEYS = ("runs", "names", "uri", "objectives", "reference", "output", "debug")


@dataclass(frozen=True)
class Request:
    """The command line, read."""

    runs: tuple[str, ...]
    names: tuple[str, ...]
    uri: str
    objectives: Sequence[str | Sequence[str]]
    reference: dict[str, float]
    output: Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, or 2 after a user's mistake."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(guarded(lambda: overlay(given), given))


def overlay(arguments: Sequence[str]) -> list[CompressError]:
    """Write the chart, print the table."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return []
    request = read_arguments(arguments)
    from rich.console import Console
    from rich.table import Table

    from compress.tracking.pareto import (
        asked_or_reported,
        hypervolume,
        matrix,
        non_dominated,
        read_fronts,
        require_reference,
        require_reported,
    )
    from compress.tracking.pareto_chart import Sweep, pareto_page, pareto_picture
    from compress.tracking.sweeps import compare

    fronts = read_fronts(request.objectives, "objectives")
    require_reference(request.reference, fronts, "reference")
    sweeps, experiments = _read_sweeps(request)
    runs = [run for own in sweeps.values() for run in own]
    fronts = asked_or_reported(fronts, runs, "objectives")
    require_reported(fronts, runs, "objectives")
    points, scales = compare(sweeps, fronts, request.reference)
    chart = [Sweep(name, points[name], request.uri, experiments[name]) for name in sweeps]
    request.output.mkdir(parents=True, exist_ok=True)
    pareto_page(chart, fronts, request.output / "pareto.html", "Pareto fronts of " + ", ".join(sweeps))
    pareto_picture(chart, fronts, request.output / "pareto.png")

    every = [point for own in points.values() for point in own]
    for front in fronts:
        table = Table("sweep", "points", "on its front", "on the common front", "hypervolume", title=front.title)
        common = non_dominated(matrix(every, front.objectives), front.maximise)
        best = {id(point) for point, mask in zip(every, common, strict=True) if mask}
        for name, own in points.items():
            table.add_row(
                name,
                str(len(own)),
                str(sum(front.name in point.fronts for point in own)),
                str(sum(id(point) in best for point in own)),
                f"{hypervolume(matrix(own, front.objectives), front, scales[front.name]):.4f}",
            )
        volume = hypervolume(matrix(every, front.objectives), front, scales[front.name])
        table.add_row("together", str(len(every)), "", str(len(best)), f"{volume:.4f}")
        Console(markup=False).print(table)
        scale = scales[front.name]
        told = (f"{metric} {value:g} (unit {scale.unit[metric]:g})" for metric, value in scale.reference.items())
        print(f"hypervolumes are counted from {', '.join(told)}")
    print(f"written: {request.output / 'pareto.html'}, {request.output / 'pareto.png'}")
    return []


def read_arguments(arguments: Sequence[str]) -> Request:
    """Return what ``key=value`` words ask for.

    Raises:
        CompressError: if a key is unknown or missing, or a value is none.
    """
    from compress.tracking.pareto import DEFAULT_OBJECTIVES

    values = key_values(arguments, _KEYS[:-1], _KEYS[-1:])
    runs, names = (tuple(filter(None, values.get(key, "").strip("[]").split(","))) for key in ("runs", "names"))
    if not runs:
        raise CompressError(
            "runs",
            expected="ids of parent runs",
            received="none",
            fix="Write runs=<id>,<id>; the MLflow UI shows the id on the page of a multirun.",
        )
    names = names or tuple("" for _ in runs)
    if len(names) != len(runs):
        raise CompressError(
            "names",
            expected=f"{counted(len(runs), 'name')}, one for each of the runs",
            received=str(len(names)),
            fix="Name each.",
        )
    return Request(
        runs,
        names,
        values.get("uri") or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db",
        _read_value("objectives", list[str] | list[list[str]], values.get("objectives"), DEFAULT_OBJECTIVES),
        _read_value("reference", dict[str, float], values.get("reference"), {}),
        Path(values.get("output") or "pareto").expanduser(),
    )


def _read_value(key: str, kind: Any, text: str | None, default: Any) -> Any:
    if text is None:
        return default
    import yaml
    from pydantic import TypeAdapter, ValidationError

    try:
        value = yaml.safe_load(text)
        if key == "objectives" and isinstance(value, str):
            value = value.split(",")
        return TypeAdapter(kind).validate_python(value)
    except (yaml.YAMLError, ValidationError) as error:
        example = "[accuracy,packed_bytes]" if key == "objectives" else "{accuracy: 80, packed_bytes: 20000}"
        raise CompressError(
            key, expected=f"a value like {example}", received=text, fix=f"Write '{key}={example}'."
        ) from error


def _read_sweeps(request: Request) -> tuple[dict[str, list[FinishedRun]], dict[str, str]]:
    """Return for each sweep, by its name, the finished runs and the id of its experiment."""
    from mlflow.exceptions import MlflowException

    from compress.tracking.store import connect_to, without_password
    from compress.tracking.sweeps import read_runs

    client = connect_to(request.uri)
    sweeps: dict[str, list[FinishedRun]] = {}
    experiments: dict[str, str] = {}
    for run, given in zip(request.runs, request.names, strict=True):
        try:
            found = client.get_run(run)
        except MlflowException as error:
            raise CompressError(
                f"runs, {run}",
                expected=f"the id of a run in {without_password(request.uri)}",
                received=" ".join(str(error).split())[:160],
                fix="Copy the id from the run's page in the MLflow UI; uri=... names another store.",
            ) from error
        experiment = str(found.info.experiment_id)
        finished, _ = read_runs(client, experiment, run)
        if not finished:
            raise CompressError(
                f"runs, {run}",
                expected="a parent run with finished children",
                received="one without any",
                fix="Name the run that stands for the whole multirun.",
            )
        name = given or f"{found.info.run_name} {run[:8]}"
        if name in sweeps:
            raise CompressError("runs", expected="each sweep once", received=f"{name} twice", fix="Take one out.")
        sweeps[name], experiments[name] = finished, experiment
    return sweeps, experiments


if __name__ == "__main__":
    main()
