"""MLflow: one parent run for a command, a child run for each pipeline."""

from __future__ import annotations

import json
import logging
import os
import re
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from annotated_types import MinLen
from filelock import FileLock
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from compress.deploy.interface import Interface
from compress.errors import CompressError, GivenUp
from compress.tracking.pareto import DEFAULT_OBJECTIVES
from compress.tracking.process import has_ended, process_tags
from compress.tracking.serving import log_served_model

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from compress.candidate import Numbers
    from compress.pipeline.pipeline import Result
    from compress.pipeline.stage import StageResult

T = TypeVar("T")
_PARENT_FILE = "mlflow_parent.json"
_LONGEST_PARAMETER = 500
_LONGEST_TAG = 4000
_TABLES_SECONDS = 120.0
_MOST_RUNNING = 1000
_LOG = logging.getLogger("compress")
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
    objectives: tuple[str | tuple[str, ...], ...] = DEFAULT_OBJECTIVES
    """What the runs of a multirun are compared by: metrics (one front), or lists of metrics (a front each)."""
    reference: dict[str, float] | None = None
    """Metric -> the value that hypervolumes are counted from; those not named: see the README."""


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
        self._cached = 0

    def stage(self, result: StageResult) -> None:
        """Log the stage's numbers as ``<stage>.<number>`` and as a step of the plain ``<number>``."""
        metrics = metrics_of(result.numbers)
        named = {f"{result.name}.{key}": value for key, value in {**metrics, **result.measured}.items()}
        log_metrics(self._client, self._run, {**named, f"{result.name}.seconds": result.seconds})
        log_metrics(self._client, self._run, metrics, step=self._step)
        self._step += 1
        self._cached += result.cached

    def finish(self, report: Mapping[str, Any], result: Result, folder: Path) -> None:
        """Log ratios, the files, the picture of the layers, and the model as one that MLflow can serve."""
        ratios = {f"ratio.{key}": value for key, value in report["ratios"].items() if value is not None}
        # The baseline is one of the stages.
        counted = {"stages_made": self._step - self._cached, "stages_cached": self._cached}
        log_metrics(self._client, self._run, {**ratios, **counted, "seconds": report["seconds"]})
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
    tracking: TrackingSettings,
    config: Mapping[str, Any],
    sweep: Path | None,
    *,
    command: Sequence[str],
    overrides: Sequence[str] = (),
) -> Iterator[Recorder]:
    """Open a child run (and, outside a multirun, its parent); close both with the right status.

    Args:
        tracking: where runs are recorded.
        config: the whole configuration of the run.
        sweep: the folder of the multirun that it belongs to, if any.
        command: the command line, for the parent's tag.
        overrides: what the command line changed for this run alone.

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
        close_orphans(client, experiment)
        parent = start_parent(client, experiment, f"{name}", command)
    changed = json.dumps([without_password(text) for text in overrides])
    tags = {"mlflow.parentRunId": parent, "strategy": name, "seed": str(config["seed"]), **process_tags()}
    if len(changed) <= _LONGEST_TAG:
        tags["overrides"] = changed
    child = client.create_run(experiment, run_name=name, tags=tags).info.run_id
    status = "FAILED"
    try:
        for key, value in flatten(redacted(config)).items():
            client.log_param(child, key, str(value)[:_LONGEST_PARAMETER])
        client.log_dict(child, redacted(config), "config.yaml")
        yield MlflowRecorder(client, child)
        status = "FINISHED"
    except GivenUp as reason:
        client.set_tag(child, "given_up", str(reason))
        status = "KILLED"
        raise
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
        log_metrics(client, run, metrics)
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

    def ask(client: MlflowClient) -> str:
        found = client.get_experiment_by_name(experiment)
        if found is not None and found.lifecycle_stage != "active":
            raise CompressError(
                "tracking.experiment",
                expected="an experiment that is there",
                received=f"{experiment}, which was deleted",
                fix="Name another one: tracking.experiment=<name>, or restore it (mlflow experiments restore).",
            )
        if found is not None:
            return str(found.experiment_id)
        return str(client.create_experiment(experiment, tags=_EXPERIMENT_TAGS))

    return _ask(uri, ask)


def connect_to(uri: str) -> MlflowClient:
    """Return a client of a store that answers, without making anything in it.

    Raises:
        CompressError: if the store does not answer, or its file is not there.
    """
    file = _database_file(uri)
    if file is not None and not Path(file).is_file():
        raise CompressError(
            "uri",
            expected="an MLflow store",
            received=f"{uri}, whose file is not there",
            fix="Go to the folder where the sweeps ran, or write uri=sqlite:////<path>/mlflow.db.",
        )
    return _ask(uri, lambda client: client.search_experiments(max_results=1))[0]


def _ask(uri: str, question: Callable[[MlflowClient], T]) -> tuple[MlflowClient, T]:
    """Return a client, and the store's answer to a first question."""
    # Long enough for a slow server, short enough for a wrong address; a user's own setting wins.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    for noisy in ("alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from mlflow.tracking import MlflowClient

    try:
        with _alone(uri):
            _make_database(uri)
            client = MlflowClient(tracking_uri=uri)
            return client, question(client)
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
    database = _database_file(uri)
    if database is None:
        yield
        return
    with FileLock(f"{database}.lock", timeout=_TABLES_SECONDS):
        yield


def _make_database(uri: str) -> None:
    """Make the tables of a new SQLite file under another name: a process killed meanwhile would spoil it for good."""
    from mlflow.tracking import MlflowClient

    name = _database_file(uri)
    if name is None or Path(name).exists():
        return
    file = Path(name)
    for left in file.parent.glob(f".{file.name}.*.partial*"):
        left.unlink(missing_ok=True)
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}.partial")
    # A relative name stays one: the current folder may be anywhere.
    MlflowClient(tracking_uri=uri.replace(name, str(partial))).search_experiments(max_results=1)
    partial.replace(file)


def _database_file(uri: str) -> str | None:
    """Return the file of a SQLite store, None for any other."""
    from sqlalchemy.engine import make_url

    database = make_url(uri).database if uri.startswith("sqlite:") else None
    return None if database == ":memory:" else database or None


def start_parent(client: MlflowClient, experiment: str, name: str, command: Sequence[str]) -> str:
    """Create the run that stands for the whole command and return its id."""
    told = " ".join(["python -m compress.run", *command])[:_LONGEST_TAG]
    run = client.create_run(experiment, run_name=name, tags={"command": told, **process_tags()})
    return str(run.info.run_id)


def close_orphans(client: MlflowClient, experiment: str) -> int:
    """Close, as KILLED, the runs of processes that were killed on this machine; return how many there were."""
    running = client.search_runs([experiment], "attributes.status = 'RUNNING'", max_results=_MOST_RUNNING)
    orphans = [run.info.run_id for run in running if has_ended(run.data.tags)]
    for orphan in orphans:
        client.set_terminated(orphan, "KILLED")
    if orphans:
        _LOG.info("%d runs whose process was killed are closed as KILLED", len(orphans))
    return len(orphans)


def write_parent(sweep: Path, parent: str) -> None:
    """Leave the parent run's id in the multirun's folder, where its jobs find it, whatever process they run in."""
    sweep.mkdir(parents=True, exist_ok=True)
    (sweep / _PARENT_FILE).write_text(json.dumps({"run": parent}))


def read_parent(sweep: Path) -> str | None:
    """Return the parent run's id, or None if the multirun left none."""
    file = sweep / _PARENT_FILE
    return str(json.loads(file.read_text())["run"]) if file.is_file() else None


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


def log_metrics(client: MlflowClient, run: str, metrics: Mapping[str, float], step: int = 0) -> None:
    """Log metrics, all at once."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    client.log_batch(run, metrics=[Metric(key, float(value), now, step) for key, value in metrics.items()])
