"""Sends what runs before have kept because the store was away."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from compress.errors import CompressError
from compress.tracking.entries import SweepEnded
from compress.tracking.journal import PARENT_TAG, SUFFIX, Journal, Start, read_start, remove_litter
from compress.tracking.store import Store, StoreAway, TrackingSettings, now
from compress.tracking.sweeps import Summary, finish_sweep
from compress.words import counted

_LOG = logging.getLogger("compress")


@dataclass(frozen=True)
class Delivery:
    """What was sent, and what was not."""

    runs: int = 0
    """Runs of which the store now has everything."""
    kept: tuple[Path, ...] = ()
    """Files that are still there: of this store, and of no process at work."""
    problems: tuple[CompressError, ...] = ()
    """What is damaged, and what the store has refused."""
    unfinished: frozenset[str] = frozenset()
    """Runs of which a child is not there as a whole."""
    others: Mapping[str, int] = field(default_factory=dict)
    """Other store -> how many files are kept for it."""


def deliver(folder: Path, store: Store) -> Delivery:
    """Send what is kept in ``folder`` for this store, oldest first.

    The end of a multirun is sent after the last of its runs: the Pareto fronts are computed from what MLflow has of
    them. What another process is at work with, and what is meant for another store, is left alone.
    """
    folder = folder.expanduser().absolute()
    remove_litter(folder)
    found, problems, others = _find(folder, store)
    stores = {store.experiment: store}
    kept: list[Path] = []
    unfinished: set[str] = set()
    runs, away = 0, False
    for file, start in found.items():
        parent = "" if start is None else start.tags.get(PARENT_TAG, "")
        if start is None or away:
            unfinished.add(parent)
            kept.append(file)
            continue
        try:
            own = stores.setdefault(start.experiment, Store(store.uri, start.experiment))
            journal = Journal.take_over(file, own)
            if journal is None:
                unfinished.add(parent)
            elif journal.run in unfinished:
                journal.leave()
                kept.append(file)
            elif journal.close():
                runs += 1
            else:
                away = True
                unfinished.add(parent)
                kept.append(file)
        except CompressError as error:
            # A refusal: what is left of the run has been sent. Or the file is damaged.
            problems.append(error)
            if file.exists():
                kept.append(file)
    for problem in problems:
        _LOG.warning("%s", problem)
    if runs:
        _LOG.info("MLflow has been sent what was kept of %s", counted(runs, "run"))
    return Delivery(runs, tuple(kept), tuple(problems), frozenset(unfinished), others)


def end_sweep(
    store: Store, parent: str, settings: TrackingSettings, *, stopped: bool, in_turn: bool = False
) -> Summary | None:
    """Finish a multirun in MLflow: what its jobs have kept, the Pareto fronts, the parent's end.

    Where the store is away, that is kept to be sent later, and None is returned.

    Args:
        store: where its runs are.
        parent: the run that stands for it.
        settings: what is compared, and where is kept what cannot be sent.
        stopped: the multirun did not come to its end.
        in_turn: its jobs run in this process, one after the other.

    Raises:
        CompressError: if the store refuses it for good.
    """
    folder, when = Path(settings.unsent), now()
    # Written down before anything else: this process may be killed, too.
    journal = Journal.begin(folder, store, "multirun", {}, run=parent, sweep=True)
    summary = None
    try:
        journal.write(SweepEnded(settings.objectives, settings.reference, stopped, when))
        if parent not in deliver(folder, store).unfinished:
            summary = store.ask(
                lambda client, _: finish_sweep(
                    client, parent, settings.objectives, settings.reference, stopped=stopped, in_turn=in_turn, when=when
                )
            )
    except StoreAway as error:
        _LOG.debug("%s", error)
    except CompressError:
        journal.forget()
        raise
    except BaseException:
        journal.keep()
        raise
    if summary is None:
        journal.keep()
    else:
        journal.forget()
    return summary


def _find(folder: Path, store: Store) -> tuple[dict[Path, Start | None], list[CompressError], Counter[str]]:
    """Return the files for this store, each with its start (None: it is damaged), what is damaged, and other stores.

    Oldest first, but the ends of multiruns last.
    """
    others: Counter[str] = Counter()
    starts: dict[Path, Start] = {}
    damaged: dict[Path, Start | None] = {}
    problems: list[CompressError] = []
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            start = read_start(file)
        except FileNotFoundError:
            # Its process has just put it away.
            continue
        except CompressError as error:
            problems.append(error)
            damaged[file] = None
            continue
        if start.store == store.name:
            starts[file] = start
        else:
            others[start.store] += 1
    ordered = sorted(starts, key=lambda file: (starts[file].sweep, starts[file].time))
    return {**damaged, **{file: starts[file] for file in ordered}}, problems, others
