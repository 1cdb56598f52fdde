"""What MLflow is told of a run, piece by piece. Telling it a piece twice changes nothing."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from compress.deploy.interface import Interface
from compress.tracking.serving import log_served_model
from compress.tracking.store import log_metrics
from compress.tracking.sweeps import finish_sweep

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_LOG = logging.getLogger("compress")
_MOST_PARAMETERS = 100
"""That MLflow takes at once."""


class Entry(ABC):
    """One piece."""

    @abstractmethod
    def send(self, client: MlflowClient, run: str) -> None:
        """Tell it to MLflow; what is there already stays as it is."""

    @property
    def ends_run(self) -> bool:
        """Whether it is the last that is told of a run."""
        return False

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read when it is sent."""
        return ()

    def with_files(self, moved: Mapping[Path, Path]) -> Entry:
        """Return the same that reads its files from where they have been copied to."""
        return self


@dataclass(frozen=True)
class Parameters(Entry):
    """Settings of the run."""

    values: dict[str, str]
    kind: Literal["parameters"] = "parameters"

    def send(self, client: MlflowClient, run: str) -> None:
        """Log them; MLflow refuses another value for one that is there, and takes the same."""
        from mlflow.entities import Param

        every = [Param(key, value) for key, value in self.values.items()]
        for start in range(0, len(every), _MOST_PARAMETERS):
            client.log_batch(run, params=every[start : start + _MOST_PARAMETERS])


@dataclass(frozen=True)
class Metrics(Entry):
    """Numbers; MLflow knows one by its name, step, time and value."""

    values: dict[str, float]
    step: int
    time: int
    """Milliseconds since 1970, when they were measured."""
    kind: Literal["metrics"] = "metrics"

    def send(self, client: MlflowClient, run: str) -> None:
        """Log them."""
        log_metrics(client, run, self.values, self.step, self.time)


@dataclass(frozen=True)
class Tags(Entry):
    """Tags of the run."""

    values: dict[str, str]
    kind: Literal["tags"] = "tags"

    def send(self, client: MlflowClient, run: str) -> None:
        """Set them."""
        for key, value in self.values.items():
            client.set_tag(run, key, value)


@dataclass(frozen=True)
class Document(Entry):
    """A small file whose content is known here."""

    name: str
    content: dict[str, Any]
    kind: Literal["document"] = "document"

    def send(self, client: MlflowClient, run: str) -> None:
        """Log it as YAML or JSON, by the name's ending."""
        client.log_dict(run, self.content, self.name)


@dataclass(frozen=True)
class Table(Entry):
    """A table that the MLflow UI shows as one."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    kind: Literal["table"] = "table"

    @classmethod
    def of(cls, name: str, rows: tuple[Mapping[str, Any], ...]) -> Table:
        """Return the table of rows that all have the keys of the first."""
        columns = tuple(rows[0])
        return cls(name, columns, tuple(tuple(row[key] for key in columns) for row in rows))

    def send(self, client: MlflowClient, run: str) -> None:
        """Write the file that ``MlflowClient.log_table`` would; that one would add the rows to those already there."""
        client.log_dict(run, {"columns": self.columns, "data": self.rows}, self.name)
        told = json.loads(client.get_run(run).data.tags.get("mlflow.loggedArtifacts", "[]"))
        own = {"path": self.name, "type": "table"}
        if own not in told:
            client.set_tag(run, "mlflow.loggedArtifacts", json.dumps([*told, own]))


@dataclass(frozen=True)
class Files(Entry):
    """Files of the run's folder."""

    paths: tuple[Path, ...]
    kind: Literal["files"] = "files"

    @property
    def files(self) -> tuple[Path, ...]:
        """All of them."""
        return self.paths

    def with_files(self, moved: Mapping[Path, Path]) -> Files:
        """Return the entry for the copies."""
        return replace(self, paths=tuple(moved.get(path, path) for path in self.paths))

    def send(self, client: MlflowClient, run: str) -> None:
        """Upload those that are still there."""
        for path in self.paths:
            if _is_there(path):
                client.log_artifact(run, str(path))


@dataclass(frozen=True)
class ServedModel(Entry):
    """The ``.tflite`` file as a model that ``mlflow models serve`` answers with."""

    tflite: Path
    interface: dict[str, Any]
    """See :class:`compress.deploy.interface.Interface`."""
    kind: Literal["served_model"] = "served_model"

    @property
    def files(self) -> tuple[Path, ...]:
        """The one file."""
        return (self.tflite,)

    def with_files(self, moved: Mapping[Path, Path]) -> ServedModel:
        """Return the entry for the copy."""
        return replace(self, tflite=moved.get(self.tflite, self.tflite))

    def send(self, client: MlflowClient, run: str) -> None:
        """Upload it, and tell how it is served."""
        if _is_there(self.tflite):
            log_served_model(client, run, self.tflite, Interface.from_json(self.interface))
            client.set_tag(run, "serve", f"mlflow models serve -m runs:/{run}/model --env-manager local")


@dataclass(frozen=True)
class RunEnded(Entry):
    """How the run ended."""

    status: Literal["FINISHED", "FAILED", "KILLED"]
    time: int
    """Milliseconds since 1970."""
    kind: Literal["ended"] = "ended"

    @property
    def ends_run(self) -> bool:
        """It is."""
        return True

    def send(self, client: MlflowClient, run: str) -> None:
        """Close the run."""
        client.set_terminated(run, self.status, self.time)


@dataclass(frozen=True)
class SweepEnded(Entry):
    """That a multirun, whose parent the run is, came to its end."""

    objectives: tuple[str | tuple[str, ...], ...]
    """See :class:`compress.tracking.store.TrackingSettings`."""
    reference: dict[str, float] | None
    stopped: bool
    time: int
    """Milliseconds since 1970."""
    kind: Literal["sweep_ended"] = "sweep_ended"

    @property
    def ends_run(self) -> bool:
        """It is."""
        return True

    def send(self, client: MlflowClient, run: str) -> None:
        """Compute the Pareto fronts from what MLflow has of the runs, log them, close the parent."""
        finish_sweep(client, run, self.objectives, self.reference, stopped=self.stopped, when=self.time)


EntryKind = Annotated[
    Parameters | Metrics | Tags | Document | Table | Files | ServedModel | RunEnded | SweepEnded,
    Field(discriminator="kind"),
]


def entries_adapter() -> TypeAdapter[Any]:
    """Return what turns an entry into JSON and back."""
    return TypeAdapter(EntryKind)


def _is_there(path: Path) -> bool:
    if not path.is_file():
        _LOG.warning("%s is not there any more and is not sent to MLflow", path)
        return False
    return True
