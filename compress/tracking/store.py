"""The MLflow store: how it is reached, and what is common to all that is written into it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from annotated_types import MinLen
from filelock import FileLock
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from compress.errors import CompressError
from compress.tracking.pareto import DEFAULT_OBJECTIVES
from compress.tracking.process import has_ended, process_tags

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

T = TypeVar("T")
_PARENT_FILE = "mlflow_parent.json"
LONGEST_TAG = 4000
_TABLES_SECONDS = 120.0
_MOST_RUNNING = 1000
_PAUSE_SECONDS = 30.0
_REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE")
"""MLflow's codes for what would be refused again."""
_CLIENTS = (
    *("mlflow", "requests", "urllib3", "http", "sqlalchemy", "psycopg", "psycopg2", "pymysql", "MySQLdb"),
    *("botocore", "boto3", "azure", "google", "paramiko", "pysftp"),
)
"""Packages whose exceptions come from a store."""
_WORDS = ("databricks", "databricks-uc", "uc")
"""Addresses of MLflow's that are single words."""
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
    """Metric -> the value that hypervolumes are counted from; those not named: see docs/runs.md."""
    unsent: str = ".compress_unsent"
    """Folder where what a store has not taken yet is kept."""


class StoreAway(CompressError):
    """The store does not answer: later it may."""


class Store:
    """An MLflow store that may be away for a while.

    Args:
        uri: where it is.
        experiment: the experiment's name in it; it is made where there is none.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        self.uri = uri
        self.experiment = experiment
        self._connection: tuple[MlflowClient, str] | None = None
        self._not_before = 0.0
        self._away = False

    @property
    def name(self) -> str:
        """The URI without a password, the same for all ways to write it: what is kept for a store is found by it."""
        file = _database_file(self.uri)
        return without_password(f"sqlite:///{Path(file).absolute()}" if file else self.uri.rstrip("/"))

    def reach(self) -> tuple[MlflowClient, str]:
        """Return a client and the experiment's id.

        Raises:
            CompressError: as :func:`connect` does.
        """
        if self._connection is None:
            self._connection = connect(self.uri, self.experiment)
        return self._connection

    def ask(self, question: Callable[[MlflowClient, str], T]) -> T:
        """Return the answer to a question that is asked with a client and the experiment's id.

        Raises:
            StoreAway: if the store does not answer.
            CompressError: if it answers that it never will take this, or its files cannot be written from here.
        """
        try:
            return question(*self.reach())
        except CompressError:
            self._leave()
            raise
        except Exception as error:
            if _is_of_store(error):
                mistake = as_mistake(error, self.uri)
            elif isinstance(error, OSError):
                mistake = _no_access(error)
            else:
                # A defect.
                raise
            self._leave()
            raise mistake from error

    def try_to(self, tell: Callable[[MlflowClient, str], None], *, at_once: bool = False) -> bool:
        """Tell it something, and say whether it was there to be told.

        A store that was away is left alone for a while, so that work does not wait for it again and again.

        Args:
            tell: what is done with a client and the experiment's id.
            at_once: ask even if it was away a moment ago.

        Raises:
            CompressError: with ``at_once``, if it answers that it never will take this.
        """
        if not at_once and time.monotonic() < self._not_before:
            return False
        try:
            self.ask(tell)
        except CompressError as error:
            if at_once and not isinstance(error, StoreAway):
                raise
            _LOG.log(logging.DEBUG if self._away else logging.WARNING, "%s What is reported is kept meanwhile.", error)
            self._away = True
            return False
        if self._away:
            _LOG.info("%s answers again", self.name)
        self._away = False
        return True

    def _leave(self) -> None:
        self._connection = None
        self._not_before = time.monotonic() + _PAUSE_SECONDS


def _is_of_store(error: Exception) -> bool:
    """Say whether a client of a store, or of its folder of artifacts, raised it: each kind has types of its own."""
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.partition(".")[0] in _CLIENTS


def _no_access(error: OSError) -> CompressError:
    """Return what it means that a file on this machine's disk cannot be written or read."""
    return CompressError(
        "tracking",
        expected="files that can be written and read: an experiment keeps those of its runs where it was first made",
        received=f"{error.strerror or type(error).__name__}: {error.filename or error}",
        fix="Give access there, or name an experiment that has a folder of its own: tracking.experiment=<name>.",
    )


def is_refusal(error: Exception) -> bool:
    """Say whether a store has answered that it will never take this; a proxy's error page is no such answer."""
    code = getattr(error, "error_code", None)
    return code in _REFUSALS and not str(error).startswith("API request to")


def as_mistake(error: Exception, uri: str) -> CompressError:
    """Return what a store's exception means."""
    reason = f"{type(error).__name__}: {without_password(' '.join(str(error).split()))[:160]}"
    if is_refusal(error):
        return CompressError(
            "tracking.uri",
            expected=f"an MLflow store that takes what is reported ({without_password(uri)})",
            received=reason,
            fix="Write tracking.uri=sqlite:///mlflow.db: MLflow does not write into folders any more."
            if "filesystem tracking backend" in str(error)
            else "See whether the run or the experiment was deleted meanwhile; tracking=none goes without MLflow.",
        )
    return StoreAway(
        "tracking.uri",
        expected="an MLflow store that answers",
        received=f"{without_password(uri)} ({reason})",
        fix="Start the server, correct tracking.uri, or write tracking=none.",
    )


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


def _require_address(uri: str) -> None:
    """Refuse a bare word, which MLflow would take for a folder to be made."""
    if ":" in uri or uri in _WORDS or Path(uri).is_dir():
        return
    raise CompressError(
        "tracking.uri",
        expected="the address of an MLflow store: sqlite:///<file>.db, or http://<server>:<port>",
        received=uri or "nothing",
        fix=f"Write tracking.uri=sqlite:///{Path(uri).with_suffix('.db') if uri else 'mlflow.db'}, or tracking=none.",
    )


def _ask(uri: str, question: Callable[[MlflowClient], T]) -> tuple[MlflowClient, T]:
    """Return a client, and the store's answer to a first question."""
    _require_address(uri)
    # Long enough for a slow server, short enough for a wrong address; a user's own setting wins.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    # A client that asks again by itself would make a run twice whose answer was lost: the journal asks again.
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # That a server does not answer is told once, by us.
    for noisy, level in (("alembic", logging.WARNING), ("mlflow", logging.WARNING), ("urllib3", logging.ERROR)):
        logging.getLogger(noisy).setLevel(level)
    from mlflow.tracking import MlflowClient

    try:
        with _alone(uri):
            _make_database(uri)
            client = MlflowClient(tracking_uri=uri)
            return client, question(client)
    except CompressError:
        raise
    except Exception as error:
        raise as_mistake(error, uri) from error


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


def start_parent(store: Store, name: str, command: Sequence[str]) -> str:
    """Create the run that stands for the whole command and return its id.

    Raises:
        CompressError: if the store does not answer.
    """
    told = without_password(" ".join(["python -m compress.run", *command]))[:LONGEST_TAG]
    tags = {"command": told, **process_tags()}
    return store.ask(
        lambda client, experiment: str(client.create_run(experiment, run_name=name, tags=tags).info.run_id)
    )


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


def forget_parent(sweep: Path) -> None:
    """Remove the id of a run that is no more, and the multirun's folder if nothing else is in it."""
    (sweep / _PARENT_FILE).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        sweep.rmdir()


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
    """Blank what stands between ``://`` and ``@``, and the passwords and tokens in the query of an address."""
    text = re.sub(r"://(?=[^/\s])\S*@", "://***@", text)
    return re.sub(r"(?i)([?&;][\w.-]*(?:password|passwd|token|secret)[\w.-]*=)[^&\s]+", r"\1***", text)


def log_metrics(
    client: MlflowClient, run: str, metrics: Mapping[str, float], step: int = 0, when: int | None = None
) -> None:
    """Log metrics, all at once; ``when``: milliseconds since 1970 (None: now)."""
    from mlflow.entities import Metric

    when = now() if when is None else when
    client.log_batch(run, metrics=[Metric(key, float(value), when, step) for key, value in metrics.items()])


def now() -> int:
    """Return the time as MLflow counts it: milliseconds since 1970."""
    return int(time.time() * 1000)
