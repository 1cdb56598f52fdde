"""MLflow: one parent run for a command, a child run for each pipeline, the Pareto front of a multirun."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import MinLen
from filelock import FileLock
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from compress.deploy.interface import Interface
from compress.errors import CompressError
from compress.tracking.charts import OBJECTIVES, Point, pareto_page, pareto_picture
from compress.tracking.pareto import non_dominated
from compress.tracking.serving import log_served_model

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from compress.candidate import Numbers
    from compress.pipeline import Result, StageResult

_PARENT_FILE = "mlflow_parent.json"
_LONGEST_PARAMETER = 500
_TABLES_SECONDS = 120.0
_EXPERIMENT_TAGS = {
    # MLflow's own tag: opens the experiment under "Model training", where runs have columns of metrics.
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": "Columns worth choosing: `accuracy`, `tflite_bytes`, `gzip_bytes`, `latency_p50`. "
    'The Pareto fronts: `tags.pareto = "true"`.',
}


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TrackingSettings:
    """``conf/tracking``."""

    enabled: bool
    uri: str
    experiment: Annotated[str, MinLen(1)]


class Recorder(ABC):
    """Takes down what a pipeline does."""

    @abstractmethod
    def stage(self, result: StageResult) -> None:
        """Take down a finished stage (the baseline first)."""

    @abstractmethod
    def finish(self, report: Mapping[str, Any], result: Result, folder: Path) -> None:
        """Take down the finished pipeline and its files."""


class NoRecorder(Recorder):
    """Takes nothing down (``tracking=none``)."""

    def stage(self, result: StageResult) -> None:
        """Do nothing."""

    def finish(self, report: Mapping[str, Any], result: Result, folder: Path) -> None:
        """Do nothing."""


class MlflowRecorder(Recorder):
    """Writes into one child run."""

    def __init__(self, client: MlflowClient, run: str) -> None:
        self._client = client
        self._run = run
        self._step = 0

    def stage(self, result: StageResult) -> None:
        """Log the stage's numbers as ``<stage>.<number>`` and as a step of the plain ``<number>``."""
        metrics = metrics_of(result.numbers)
        named = {f"{result.name}.{key}": value for key, value in {**metrics, **result.measured}.items()}
        _log_metrics(self._client, self._run, {**named, f"{result.name}.seconds": result.seconds})
        _log_metrics(self._client, self._run, metrics, step=self._step)
        self._step += 1

    def finish(self, report: Mapping[str, Any], result: Result, folder: Path) -> None:
        """Log ratios, the files, the picture of the layers, and the model as one that MLflow can serve."""
        ratios = {f"ratio.{key}": value for key, value in report["ratios"].items() if value is not None}
        _log_metrics(self._client, self._run, {**ratios, "seconds": report["seconds"]})
        for name in ("report.json", "model.tflite", "model.cmp", "layers.png"):
            self._client.log_artifact(self._run, str(folder / name))
        if "interface" in report:
            self._client.log_artifact(self._run, str(folder / report["artifacts"]["card"]))
            interface = Interface.from_json(report["interface"])
            log_served_model(self._client, self._run, folder / report["artifacts"]["tflite"], interface)
            self._client.set_tag(
                self._run, "serve", f"mlflow models serve -m runs:/{self._run}/model --env-manager local"
            )
        for stage in result.stages:
            if stage.allocation:
                chosen = [{**asdict(item), "chosen": ", ".join(item.chosen)} for item in stage.allocation]
                columns = {key: [row[key] for row in chosen] for key in chosen[0]}
                self._client.log_table(self._run, columns, f"allocation_{stage.name}.json")
        if result.last.noise:
            self._client.log_artifact(self._run, str(folder / "noise.png"))
            rows = [asdict(item) for item in result.last.noise]
            self._client.log_table(self._run, {key: [row[key] for row in rows] for key in rows[0]}, "noise.json")


def metrics_of(numbers: Numbers) -> dict[str, float]:
    """Return the numbers as MLflow metrics; the latency as ``latency_p50`` and so on."""
    plain = asdict(numbers)
    plain.pop("latency_failure")
    latency = plain.pop("latency_ms") or {}
    on_board = plain.pop("on_board")
    metrics = {key: float(value) for key, value in plain.items() if value is not None}
    metrics.update({f"board_{key}": float(value) for key, value in on_board.items()})
    metrics.update({f"latency_{key}": float(latency[key]) for key in ("p50", "p90", "p99", "mean") if latency.get(key)})
    if "accuracy_keras" in metrics:
        metrics["accuracy_gap"] = metrics["accuracy"] - metrics["accuracy_keras"]
    return metrics


@contextmanager
def open_recorder(
    tracking: TrackingSettings, config: Mapping[str, Any], sweep: Path | None, *, command: Sequence[str]
) -> Iterator[Recorder]:
    """Open a child run (and, outside a multirun, its parent); close both with the right status.

    Raises:
        CompressError: if the store does not answer.
    """
    if not tracking.enabled:
        yield NoRecorder()
        return
    client, experiment = connect(tracking.uri, tracking.experiment)
    stages = config.get("strategy") or {}
    name = "+".join(stages) or "none"
    parent = None if sweep is None else read_parent(sweep)
    own_parent = parent is None
    if parent is None:
        parent = start_parent(client, experiment, f"{name}", command)
    child = client.create_run(
        experiment, run_name=name, tags={"mlflow.parentRunId": parent, "strategy": name, "seed": str(config["seed"])}
    ).info.run_id
    status = "FAILED"
    try:
        for key, value in flatten(redacted(config)).items():
            client.log_param(child, key, str(value)[:_LONGEST_PARAMETER])
        client.log_dict(child, redacted(config), "config.yaml")
        yield MlflowRecorder(client, child)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        client.set_terminated(child, status)
        if own_parent:
            client.set_terminated(parent, status)


def log_survey(
    tracking: TrackingSettings,
    config: Mapping[str, Any],
    folder: Path,
    command: Sequence[str],
    metrics: Mapping[str, float],
) -> None:
    """Log a sensitivity pass as one run: its settings, the table and the heat map.

    Raises:
        CompressError: if the store does not answer.
    """
    if not tracking.enabled:
        return
    client, experiment = connect(tracking.uri, tracking.experiment)
    tags = {"command": " ".join(["python -m compress.sensitivity", *command])[:4000], "seed": str(config["seed"])}
    run = client.create_run(experiment, run_name="sensitivity", tags=tags).info.run_id
    status = "FAILED"
    try:
        for key, value in flatten(redacted(config)).items():
            client.log_param(run, key, str(value)[:_LONGEST_PARAMETER])
        _log_metrics(client, run, metrics)
        for suffix in ("md", "json", "png"):
            client.log_artifact(run, str(folder / f"sensitivity.{suffix}"))
        status = "FINISHED"
    finally:
        client.set_terminated(run, status)


def connect(uri: str, experiment: str) -> tuple[MlflowClient, str]:
    """Return a client and the experiment's id; ask the store something first.

    Raises:
        CompressError: if the store does not answer.
    """
    # Long enough for a slow server, short enough for a wrong address; a user's own setting wins.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    for noisy in ("alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from mlflow.tracking import MlflowClient

    def ask() -> tuple[MlflowClient, str]:
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        if found is not None and found.lifecycle_stage != "active":
            raise CompressError(
                "tracking.experiment",
                expected="an experiment that is there",
                received=f"{experiment}, which was deleted",
                fix="Name another one: tracking.experiment=<name>, or restore it (mlflow experiments restore).",
            )
        if found is not None:
            return client, str(found.experiment_id)
        return client, str(client.create_experiment(experiment, tags=_EXPERIMENT_TAGS))

    try:
        with _alone(uri):
            return ask()
    except CompressError:
        raise
    except Exception as error:
        # Each kind of store raises its own types: requests, SQLAlchemy, MLflow.
        reason = " ".join(str(error).split())
        raise CompressError(
            "tracking.uri",
            expected="an MLflow store that answers",
            received=f"{without_password(uri)} ({type(error).__name__}: {without_password(reason)[:160]})",
            fix="Start the server, correct tracking.uri, or write tracking=none.",
        ) from error


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Keep other runs from a SQLite file meanwhile: two that make its tables at once spoil them for good."""
    from sqlalchemy.engine import make_url

    database = make_url(uri).database if uri.startswith("sqlite:") else None
    if not database or database == ":memory:":
        yield
        return
    with FileLock(f"{database}.lock", timeout=_TABLES_SECONDS):
        yield


def start_parent(client: MlflowClient, experiment: str, name: str, command: Sequence[str]) -> str:
    """Create the run that stands for the whole command and return its id."""
    run = client.create_run(
        experiment, run_name=name, tags={"command": " ".join(["python -m compress.run", *command])[:4000]}
    )
    return str(run.info.run_id)


def write_parent(sweep: Path, parent: str) -> None:
    """Leave the parent run's id in the multirun's folder, where its jobs find it, whatever process they run in."""
    sweep.mkdir(parents=True, exist_ok=True)
    (sweep / _PARENT_FILE).write_text(json.dumps({"run": parent}))


def read_parent(sweep: Path) -> str | None:
    """Return the parent run's id, or None if the multirun left none."""
    file = sweep / _PARENT_FILE
    return str(json.loads(file.read_text())["run"]) if file.is_file() else None


def finish_sweep(client: MlflowClient, experiment: str, parent: str, *, stopped: bool = False) -> list[Point]:
    """Tag the Pareto front among the parent's finished children, log the charts, close the parent.

    ``stopped``: the multirun did not come to its end.
    """
    children = client.search_runs(
        [experiment], f"tags.`mlflow.parentRunId` = '{parent}' and attributes.status = 'FINISHED'", max_results=5000
    )
    failed = client.search_runs(
        [experiment], f"tags.`mlflow.parentRunId` = '{parent}' and attributes.status != 'FINISHED'", max_results=1
    )
    points = _points([run for run in children if "accuracy" in run.data.metrics])
    for point in points:
        client.set_tag(point.run, "pareto", str(any(point.pareto.values())).lower())
        for key, on_front in point.pareto.items():
            client.set_tag(point.run, f"pareto.{key}", str(on_front).lower())
    if points:
        with tempfile.TemporaryDirectory(prefix="compress-") as folder:
            page, picture = Path(folder, "pareto.html"), Path(folder, "pareto.png")
            pareto_page(points, page)
            pareto_picture(points, picture)
            for file in (page, picture):
                client.log_artifact(parent, str(file))
        client.set_tag(parent, "mlflow.note.content", _summary(points))
        _log_metrics(client, parent, {"runs": len(points), "pareto_runs": sum(any(p.pareto.values()) for p in points)})
    client.set_terminated(parent, "KILLED" if stopped else "FAILED" if failed else "FINISHED")
    return points


def _summary(points: Sequence[Point]) -> str:
    """Return the multirun's runs as a Markdown table, the best accuracy first; shown on the parent run's page."""
    lines = ["| pipeline | accuracy % | .tflite bytes | p50 ms | on a front |", "|---|---|---|---|---|"]
    for point in sorted(points, key=lambda p: (-p.accuracy, p.tflite_bytes)):
        fronts = ", ".join(key for key, on_front in point.pareto.items() if on_front) or "-"
        lines.append(
            f"| {point.label} | {point.accuracy:.2f} | {point.tflite_bytes:,.0f} | {point.latency_p50:.3f} | {fronts} |"
        )
    return "\n".join(lines)


def _points(runs: Sequence[Any]) -> list[Point]:
    nan = float("nan")
    values = {key: [run.data.metrics.get(key, nan) for run in runs] for key in ("accuracy", *OBJECTIVES)}
    import numpy as np

    fronts = {key: non_dominated(np.array(values["accuracy"]), np.array(values[key])) for key in OBJECTIVES}
    several_seeds = len({run.data.tags.get("seed") for run in runs}) > 1
    return [
        Point(
            run=run.info.run_id,
            label=run.data.tags.get("strategy", "") + (f" seed {run.data.tags.get('seed')}" if several_seeds else ""),
            accuracy=values["accuracy"][i],
            tflite_bytes=values["tflite_bytes"][i],
            latency_p50=values["latency_p50"][i],
            pareto={key: bool(front[i]) for key, front in fronts.items()},
        )
        for i, run in enumerate(runs)
    ]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def redacted(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with the passwords in URIs blanked."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, list):
            return [clean(item) for item in value]
        return without_password(value) if isinstance(value, str) else value

    return {key: clean(value) for key, value in config.items()}


def without_password(text: str) -> str:
    """Blank what stands between ``://`` and ``@``."""
    return re.sub(r"://(?=[^/\s])\S*@", "://***@", text)


def _log_metrics(client: MlflowClient, run: str, metrics: Mapping[str, float], step: int = 0) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    client.log_batch(run, metrics=[Metric(key, float(value), now, step) for key, value in metrics.items()])
