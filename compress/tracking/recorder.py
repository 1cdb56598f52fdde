"""What a pipeline reports to MLflow: a parent run for the command, a child run for each pipeline."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.errors import GivenUp
from compress.tracking.delivery import deliver
from compress.tracking.entries import Document, Files, Metrics, Parameters, RunEnded, ServedModel, Table, Tags
from compress.tracking.journal import Journal, require_folder
from compress.tracking.process import process_tags
from compress.tracking.store import (
    LONGEST_TAG,
    Store,
    TrackingSettings,
    close_orphans,
    flatten,
    now,
    read_parent,
    redacted,
    start_parent,
    without_password,
)

if TYPE_CHECKING:
    from compress.candidate import Numbers
    from compress.pipeline.pipeline import Result
    from compress.pipeline.stage import StageResult

_LONGEST_PARAMETER = 6000
_LONGEST_NAME = 250
_COMMAND = "run"
"""Name of the parent run of a command with one pipeline; that of many is called multirun."""
_FOREIGN = re.compile(r"[^\w.\- ]", re.ASCII)
"""What MLflow does not take in a name, and slashes and colons, which it takes in some places only."""


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

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._step = 0
        self._cached = 0

    def stage(self, result: StageResult) -> None:
        """Log the stage's numbers as ``<stage>.<number>`` and as a step of the plain ``<number>``."""
        metrics = metrics_of(result.numbers)
        timed = result.numbers.latency_ms is not None or result.numbers.estimate_ms is not None
        if self._step == 0 and timed:
            # The baseline, which all others are measured, or estimated, in turns with.
            metrics["relative_latency"] = 1.0
        named = {f"{result.name}.{key}": value for key, value in {**metrics, **result.measured}.items()}
        named[f"{result.name}.seconds"] = result.seconds
        time = now()
        self._journal.add(Metrics(named, 0, time), Metrics(metrics, self._step, time))
        self._step += 1
        self._cached += result.cached

    def finish(self, report: Mapping[str, Any], result: Result, folder: Path) -> None:
        """Log ratios, the files, the picture of the layers, and the model as one that MLflow can serve."""
        folder = folder.absolute()
        ratios = {f"ratio.{key}": value for key, value in report["ratios"].items() if value is not None}
        # The baseline is one of the stages.
        counted = {"stages_made": self._step - self._cached, "stages_cached": self._cached}
        files = ["report.json", "model.tflite", "model.cmp", "layers.png"]
        if "interface" in report:
            files.append(report["artifacts"]["card"])
        if result.last.noise:
            files.append("noise.png")
        self._journal.add(
            Metrics({**ratios, **counted, "seconds": report["seconds"]}, 0, now()),
            Files(tuple(folder / name for name in files)),
        )
        if "interface" in report:
            self._journal.add(ServedModel(folder / report["artifacts"]["tflite"], dict(report["interface"])))
        for stage in result.stages:
            if stage.allocation:
                chosen = tuple({**asdict(item), "chosen": ", ".join(item.chosen)} for item in stage.allocation)
                self._journal.add(Table.of(f"allocation_{stage.name}.json", chosen))
        if result.last.noise:
            self._journal.add(Table.of("noise.json", tuple(asdict(item) for item in result.last.noise)))


def metrics_of(numbers: Numbers) -> dict[str, float]:
    """Return the numbers as MLflow metrics; the latency as ``latency_p50`` and so on.

    ``relative_latency`` is the share of the baseline's, both measured in turns: runs at other times can be compared.
    """
    plain = asdict(numbers)
    plain.pop("latency_failure")
    latency = plain.pop("latency_ms") or {}
    on_board = plain.pop("on_board")
    metrics = {key: float(value) for key, value in plain.items() if value is not None}
    metrics.update({f"board_{key}": float(value) for key, value in on_board.items()})
    metrics.update({f"latency_{key}": float(latency[key]) for key in ("p50", "p90", "p99", "mean") if latency.get(key)})
    if numbers.speedup:
        metrics["relative_latency"] = 1 / numbers.speedup
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

    A store that goes away meanwhile stops nothing: what it has not taken is kept, and sent later. What it refuses for
    good is told at the end, when it has been sent the rest.

    Args:
        tracking: where runs are recorded.
        config: the whole configuration of the run.
        sweep: the folder of the multirun that it belongs to, if any.
        command: the command line, for the parent's tag.
        overrides: what the command line changed for this run alone.

    Raises:
        CompressError: if the store does not answer when a run outside a multirun starts; if it refuses something.
    """
    if not tracking.enabled:
        yield NoRecorder()
        return
    store, unsent = Store(tracking.uri, tracking.experiment), Path(tracking.unsent)
    name = "+".join(config.get("strategy") or {}) or "none"
    parent = None if sweep is None else read_parent(sweep)
    own_parent = None
    require_folder(unsent)
    if parent is None:
        _meet(store, unsent)
        parent = start_parent(store, _COMMAND, command)
        own_parent = Journal.begin(unsent, store, _COMMAND, {}, run=parent)
    changed = json.dumps([without_password(text) for text in overrides])
    tags = {"mlflow.parentRunId": parent, "strategy": name, "seed": str(config["seed"]), **process_tags()}
    if len(changed) <= LONGEST_TAG:
        tags["overrides"] = changed
    child = Journal.begin(unsent, store, name, tags)
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    try:
        child.add(_parameters(config), Document("config.yaml", redacted(config)))
        yield MlflowRecorder(child)
        status = "FINISHED"
    except GivenUp as reason:
        child.add(Tags({"given_up": str(reason)}))
        status = "KILLED"
        raise
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        _end(child, own_parent, status)


def _end(child: Journal, parent: Journal | None, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
    """End the runs; the parent's end waits for nothing that the child's is refused for."""
    try:
        end(child, status)
    finally:
        if parent is not None:
            end(parent, status)


def meet_store(tracking: TrackingSettings) -> None:
    """Refuse a store that does not answer; send it what runs before have kept, and close what they have left open.

    Raises:
        CompressError: if it does not answer, or nothing can be kept for it.
    """
    if tracking.enabled:
        require_folder(Path(tracking.unsent))
        _meet(Store(tracking.uri, tracking.experiment), Path(tracking.unsent))


def _meet(store: Store, unsent: Path) -> None:
    store.reach()
    deliver(unsent, store)
    store.ask(close_orphans)


def end(journal: Journal, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
    """Write down how the run ended, and send what is left."""
    journal.add(RunEnded(status, now()))
    journal.close()


def log_survey(
    tracking: TrackingSettings,
    config: Mapping[str, Any],
    folder: Path,
    command: Sequence[str],
    metrics: Mapping[str, float],
) -> None:
    """Log a sensitivity pass as one run: its settings, the table and the heat map.

    Raises:
        CompressError: if the store refuses it; where it does not answer, it is kept.
    """
    if not tracking.enabled:
        return
    told = without_password(" ".join(["python -m compress.sensitivity", *command]))[:LONGEST_TAG]
    tags = {"command": told, "seed": str(config["seed"]), **process_tags()}
    journal = Journal.begin(Path(tracking.unsent), Store(tracking.uri, tracking.experiment), "sensitivity", tags)
    files = tuple(folder.absolute() / f"sensitivity.{suffix}" for suffix in ("md", "json", "png"))
    journal.add(_parameters(config), Metrics(dict(metrics), 0, now()), Files(files))
    end(journal, "FINISHED")


def _parameters(config: Mapping[str, Any]) -> Parameters:
    """Return the settings by names that MLflow takes: ``layer_bits.d.*`` is ``layer_bits.d.:2a:``."""
    return Parameters(
        {
            _FOREIGN.sub(lambda found: f":{ord(found[0]):x}:", key)[:_LONGEST_NAME]: str(value)[:_LONGEST_PARAMETER]
            for key, value in flatten(redacted(config)).items()
        }
    )
