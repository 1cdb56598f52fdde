"""What a multirun leaves in MLflow: the Pareto fronts of its runs, tagged, drawn, and counted as a hypervolume."""

from __future__ import annotations

import html
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import CompressError
from compress.tracking.pareto import (
    DEFAULT_OBJECTIVES,
    FinishedRun,
    Front,
    Point,
    Scale,
    asked_or_reported,
    hypervolume,
    make_points,
    make_scale,
    matrix,
    on_fronts,
    read_fronts,
    require_reported,
)
from compress.tracking.pareto_chart import Sweep, pareto_page, pareto_picture
from compress.tracking.process import has_ended
from compress.tracking.store import log_metrics, now

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_LOG = logging.getLogger("compress")
OBJECTIVES_KEY = "tracking.objectives"
Objectives = Sequence[str | Sequence[str]]
_PAGE = 1000
_LONGEST_NOTE = 4900
"""Characters of a tag that every version of MLflow takes."""


@dataclass(frozen=True)
class Summary:
    """What a finished sweep came to."""

    points: list[Point] = field(default_factory=list)
    hypervolumes: Mapping[str, float] = field(default_factory=dict)
    """Front's name -> its hypervolume."""
    missing: CompressError | None = None
    """Which objective no run has reported, if there is one."""
    begun: bool = True
    """Whether it had any job; where not, its parent run is deleted."""


def finish_sweep(
    client: MlflowClient,
    parent: str,
    objectives: Objectives = DEFAULT_OBJECTIVES,
    reference: Mapping[str, float] | None = None,
    *,
    stopped: bool = False,
    in_turn: bool = False,
    when: int | None = None,
) -> Summary:
    """Tag the Pareto fronts among the parent's finished children, log the charts, close the parent.

    Args:
        client: of the store.
        parent: the id of the run that stands for the multirun.
        objectives: what is compared: metrics (one front), or lists of metrics (a front each).
        reference: metric -> the value that hypervolumes are counted from; the baseline's for those not named.
        stopped: the multirun did not come to its end.
        in_turn: its jobs run in this process, one after the other: of a stopped one none will begin any more.
        when: milliseconds since 1970 that it ended at; None: now.
    """
    when = now() if when is None else when
    experiment = str(client.get_run(parent).info.experiment_id)
    runs, failed = read_runs(client, experiment, parent)
    for run in _search(client, experiment, f"{_children(parent)} and attributes.status = 'RUNNING'"):
        # Where all jobs have come back, one that still counts as running has died without a word.
        if not stopped or has_ended(run.data.tags):
            client.set_terminated(run.info.run_id, "FAILED")
    if stopped and in_turn and next(_search(client, experiment, _children(parent)), None) is None:
        # A mistake on the command line is no run.
        client.delete_run(parent)
        return Summary(begun=False)
    summary = _log_fronts(client, parent, runs, objectives, reference or {}, when) if runs else Summary()
    failed = failed or summary.missing is not None
    client.set_terminated(parent, "KILLED" if stopped else "FAILED" if failed else "FINISHED", when)
    return summary


def read_runs(client: MlflowClient, experiment: str, parent: str) -> tuple[list[FinishedRun], bool]:
    """Return the parent's finished children, oldest first, and whether any has failed."""
    finished, others = [], False
    for run in _search(client, experiment, _children(parent)):
        if run.info.status != "FINISHED" or "accuracy" not in run.data.metrics:
            others = others or (run.info.status != "FINISHED" and "given_up" not in run.data.tags)
            continue
        tags = run.data.tags
        finished.append(
            FinishedRun(
                run=run.info.run_id,
                strategy=tags.get("strategy", ""),
                seed=tags.get("seed", ""),
                overrides=tuple(json.loads(tags.get("overrides", "[]"))),
                settings=dict(run.data.params),
                metrics=dict(run.data.metrics),
            )
        )
    return finished, others


def _children(parent: str) -> str:
    return f"tags.`mlflow.parentRunId` = '{parent}'"


def _search(client: MlflowClient, experiment: str, query: str) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_runs(
            [experiment], query, max_results=_PAGE, order_by=["attributes.start_time ASC"], page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


def compare(
    runs: Mapping[str, Sequence[FinishedRun]], fronts: Sequence[Front], reference: Mapping[str, float]
) -> tuple[dict[str, list[Point]], dict[str, Scale]]:
    """Return the points of each sweep with the fronts that they are on, and each front's scale, common to all sweeps.

    Args:
        runs: sweep -> its finished runs.
        fronts: what is compared.
        reference: metric -> the value that hypervolumes are counted from, instead of the usual one.
    """
    every = [run for own in runs.values() for run in own]
    points = {name: on_fronts(make_points(own), fronts) for name, own in runs.items()}
    return points, {front.name: make_scale(front, every, reference) for front in fronts}


def _log_fronts(
    client: MlflowClient,
    parent: str,
    runs: Sequence[FinishedRun],
    objectives: Objectives,
    reference: Mapping[str, float],
    when: int,
) -> Summary:
    fronts = asked_or_reported(read_fronts(objectives, OBJECTIVES_KEY), runs, OBJECTIVES_KEY)
    missing = None
    try:
        require_reported(fronts, runs, OBJECTIVES_KEY)
    except CompressError as error:
        missing = error
        reported = {metric for run in runs for metric in run.metrics}
        # The others are still worth a chart.
        fronts = tuple(front for front in fronts if all(o.metric in reported for o in front.objectives))
    if not fronts:
        return Summary(missing=missing)
    by_sweep, scales = compare({"": runs}, fronts, reference)
    points = by_sweep[""]
    for point in points:
        for run in point.runs:
            client.set_tag(run, "pareto", str(bool(point.fronts)).lower())
            for front in fronts:
                client.set_tag(run, f"pareto.{front.name}", str(front.name in point.fronts).lower())
    volumes = {f.name: hypervolume(matrix(points, f.objectives), f, scales[f.name]) for f in fronts}
    info = client.get_run(parent).info
    chart = [Sweep("", points, client.tracking_uri, str(info.experiment_id))]
    with tempfile.TemporaryDirectory(prefix="compress-") as folder:
        page, picture = Path(folder, "pareto.html"), Path(folder, "pareto.png")
        pareto_page(chart, fronts, page, "Pareto fronts of this multirun")
        pareto_picture(chart, fronts, picture)
        for file in (page, picture):
            client.log_artifact(parent, str(file))
    for front in fronts:
        scale = scales[front.name]
        told = {"reference": dict(scale.reference), "unit": dict(scale.unit)}
        client.set_tag(parent, f"hypervolume_scale.{front.name}", json.dumps(told))
    client.set_tag(parent, "mlflow.note.content", note(points, fronts, str(info.experiment_id)))
    counts = {"runs": len(runs), "pareto_runs": sum(len(p.runs) for p in points if p.fronts)}
    counts |= {key: sum(int(run.metrics.get(key, 0)) for run in runs) for key in ("stages_made", "stages_cached")}
    volume_metrics = {f"hypervolume.{name}": value for name, value in volumes.items()}
    log_metrics(client, parent, {**counts, **volume_metrics}, when=when)
    return Summary(points, volumes, missing)


def note(points: Sequence[Point], fronts: Sequence[Front], experiment: str) -> str:
    """Return the sweep's points as a Markdown table, each linked with its run: the parent run's page shows it.

    Those on a front come first, then the rest; what does not fit into a tag is counted.
    """
    objectives = list({o.metric: o for front in fronts for o in front.objectives}.values())
    lines = ["| pipeline | " + " | ".join(o.metric for o in objectives) + " | on the front of |"]
    lines.append("|---" * (len(objectives) + 2) + "|")
    signs = np.where([o.maximise for o in objectives], -1.0, 1.0)
    keys = np.nan_to_num(matrix(points, objectives) * signs, nan=np.inf)
    ordered = [points[i] for i in sorted(range(len(points)), key=lambda i: (not points[i].fronts, *keys[i]))]
    for index, point in enumerate(ordered):
        first = next(iter(point.runs))
        label = "".join(f"\\{c}" if c in "\\`*_{}[]()#|" else html.escape(c) for c in point.label)
        cells = [f"[{label}](#/experiments/{experiment}/runs/{first})"]
        cells += [_cell(point, o.metric) for o in objectives]
        cells.append(", ".join(front.name for front in fronts if front.name in point.fronts) or "-")
        line = "| " + " | ".join(cells) + " |"
        if sum(map(len, lines)) + len(lines) + len(line) > _LONGEST_NOTE - 100:
            return "\n".join([*lines, "", f"And {len(ordered) - index} more, see `pareto.html`."])
        lines.append(line)
    return "\n".join(lines)


def _cell(point: Point, metric: str) -> str:
    value = point.values.get(metric)
    return "-" if value is None else value.text
