"""An Optuna study with several objectives that processes and machines share, and that survives them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError, did_you_mean
from compress.search.space import Choice, Interval, Space
from compress.tracking.pareto import Objective
from compress.tracking.process import has_ended, process_tags
from compress.tracking.store import without_password

if TYPE_CHECKING:
    import optuna

_LOG = logging.getLogger("compress")
_LOCK_SECONDS = 30
_SILENCE = timedelta(minutes=2)
"""A trial that nobody has claimed for so long is nobody's."""
REFERENCE = "reference"
"""The study's attribute with where its hypervolume is counted from, by objective; None: from the worst trial."""
SAMPLERS = ("gaussian", "nsga2", "tpe", "random")


@dataclass(frozen=True)
class Trial:
    """A setting to try."""

    number: int
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Best:
    """A trial that no other one beats: what was drawn, what it came to, and where its results are."""

    number: int
    setting: Mapping[str, Any]
    values: tuple[float, ...]
    folder: str


class Study:
    """A study in a database.

    Args:
        storage: a database's URI, as SQLAlchemy writes it.
        name: of the study; one that is there is continued.
        objectives: what is optimised.
        space: what may be tried.
        sampler: ``gaussian``, ``nsga2``, ``tpe`` or ``random``.
        settings: what decides the outcomes of its trials beside the space.
        seed: of the sampler.
        population: size of a generation, for ``nsga2``; how many are drawn without a model first, for ``gaussian`` and
            ``tpe``.

    Raises:
        CompressError: if the database does not answer or is locked, or the study of that name has another space or
            other settings.
    """

    def __init__(
        self,
        storage: str,
        name: str,
        objectives: Sequence[Objective],
        space: Space,
        *,
        sampler: str,
        seed: int,
        population: int,
        settings: str = "",
    ) -> None:
        if sampler not in SAMPLERS:
            raise CompressError(
                "hydra.sweeper.sampler",
                expected=f"one of {', '.join(SAMPLERS)}",
                received=sampler,
                fix=did_you_mean(sampler, SAMPLERS),
            )
        self._where = without_password(storage)
        self._space, self._objectives = space, tuple(objectives)
        self._asked: dict[int, optuna.Trial] = {}
        with _answering(self._where):
            optuna = _import_optuna()
            self._distributions = distributions_of(space)
            self._study = optuna.create_study(
                storage=_storage(optuna, storage),
                study_name=name,
                directions=["maximize" if o.maximise else "minimize" for o in objectives],
                load_if_exists=True,
            )
            self._require_same("space", "search space and objectives", _described(space, objectives))
            self._require_same("settings", "settings of the jobs", settings)
            self._study.sampler = self._sampler(optuna, sampler, seed, population)
            self._continue_killed()

    def _require_same(self, attribute: str, what: str, mine: str) -> None:
        """Take down what the study's trials are about; refuse to go on with another one."""
        known = self._study.user_attrs.get(attribute)
        if known is None:
            self._study.set_user_attr(attribute, mine)
        elif known != mine:
            raise CompressError(
                "hydra.sweeper.study",
                expected=f"the {what} that the study {self._study.study_name} has",
                received="others, whose results could not be compared with its trials'",
                fix="Give the new search a name of its own: hydra.sweeper.study=<name>.",
            )

    def _sampler(self, optuna: Any, name: str, seed: int, population: int) -> Any:
        from compress.search.draws import NumberedSampler
        from compress.search.gaussian import GaussianSampler

        if name == "gaussian":
            return GaussianSampler(self._space, self._distributions, self._objectives, seed, population, REFERENCE)
        kinds = {
            "nsga2": lambda own: optuna.samplers.NSGAIISampler(seed=own, population_size=population),
            "tpe": lambda own: optuna.samplers.TPESampler(seed=own, n_startup_trials=population, multivariate=False),
            "random": lambda own: optuna.samplers.RandomSampler(seed=own),
        }
        return NumberedSampler(kinds[name], seed)

    def _continue_killed(self) -> None:
        """Close the trials of processes that were killed on this machine, and put their settings first in the queue."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            process = trial.user_attrs.get("process")
            # Who asked says who it is right after that, unless it was killed in between.
            begun = trial.datetime_start
            unclaimed = process is None and begun is not None and datetime.now() - begun > _SILENCE
            if unclaimed or has_ended(process or {}):
                try:
                    self._study.tell(trial.number, state=TrialState.FAIL)
                except (ValueError, UpdateFinishedTrialError):
                    # Another process was faster.
                    continue
                self._study.enqueue_trial(trial.params)
                _LOG.info("trial %d was killed: its setting is tried again", trial.number)

    @property
    def finished(self) -> int:
        """Trials that are done: with values, or given up as hopeless."""
        from optuna.trial import TrialState

        with _answering(self._where):
            done = (TrialState.COMPLETE, TrialState.PRUNED)
            return len(self._study.get_trials(deepcopy=False, states=done))

    @property
    def reported(self) -> bool:
        """Whether any trial has reported all objectives."""
        from optuna.trial import TrialState

        with _answering(self._where):
            return bool(self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))

    def left(self, trials: int) -> int:
        """Return how many of ``trials`` are still to be made: neither done, nor at work in another process.

        Call it when this process has told all that it has asked for.
        """
        from optuna.trial import TrialState

        with _answering(self._where):
            self._continue_killed()
            elsewhere = len(self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
        if elsewhere and self.finished < trials <= self.finished + elsewhere:
            _LOG.info(
                "search: %d trials are left to other processes. If those have ended on other machines, run the same"
                " command there, or raise hydra.sweeper.trials",
                elsewhere,
            )
        return trials - self.finished - elsewhere

    def ask(self) -> Trial:
        """Return the next setting."""
        with _answering(self._where):
            trial = self._study.ask(self._distributions)
            trial.set_user_attr("process", process_tags())
            self._asked[trial.number] = trial
        return Trial(trial.number, tuple(f"{key}={_text(value)}" for key, value in trial.params.items()))

    def tell(
        self, trial: Trial, metrics: Mapping[str, float] | None, *, hopeless: bool = False, folder: str = ""
    ) -> None:
        """Take down what a trial has come to; None: it failed.

        Args:
            trial: which one.
            metrics: what it has reported.
            hopeless: it was given up.
            folder: where the job's results are.

        Raises:
            CompressError: if the metrics lack an objective: the trial has failed.
        """
        from optuna.trial import TrialState

        with _answering(self._where):
            if metrics is not None and folder:
                self._asked[trial.number].set_user_attr("folder", folder)
            if metrics is None:
                self._study.tell(trial.number, state=TrialState.PRUNED if hopeless else TrialState.FAIL)
                return
            missing = [o.metric for o in self._objectives if not math.isfinite(metrics.get(o.metric, math.nan))]
            if missing:
                self._study.tell(trial.number, state=TrialState.FAIL)
                raise CompressError(
                    "hydra.sweeper.objectives",
                    expected="metrics that every run reports",
                    received=f"{missing[0]}, which trial {trial.number} does not",
                    fix=did_you_mean(missing[0], metrics),
                )
            self._note_reference(metrics)
            self._study.tell(trial.number, [metrics[o.metric] for o in self._objectives])

    def _note_reference(self, metrics: Mapping[str, float]) -> None:
        """Keep where the hypervolume is counted from, as :func:`~compress.tracking.pareto.make_scale` says."""
        found: list[float | None] = []
        for objective in self._objectives:
            baseline = metrics.get(f"baseline.{objective.metric}")
            known = baseline is not None and math.isfinite(baseline) and baseline > 0
            found.append((0.0 if objective.maximise else baseline) if known else None)
        before = self._study.user_attrs.get(REFERENCE, [None] * len(found))
        both = [max((v for v in pair if v is not None), default=None) for pair in zip(before, found, strict=True)]
        if both != before:
            self._study.set_user_attr(REFERENCE, both)

    def best(self) -> list[Best]:
        """Return the non-dominated trials."""
        with _answering(self._where):
            best = self._study.best_trials
        return [
            Best(
                trial.number,
                {key: _as_run(value) for key, value in trial.params.items()},
                tuple(trial.values),
                str(trial.user_attrs.get("folder", "")),
            )
            for trial in best
        ]


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise CompressError(
            "hydra/sweeper",
            expected="Optuna, which hydra/sweeper=search stands on",
            received="a Python without it",
            fix="Write pip install 'compress[search]'.",
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _storage(optuna: Any, uri: str) -> Any:
    arguments = {"connect_args": {"timeout": _LOCK_SECONDS}} if uri.startswith("sqlite:") else {"pool_pre_ping": True}
    return optuna.storages.RDBStorage(uri, engine_kwargs=arguments)


def distributions_of(space: Space) -> dict[str, optuna.distributions.BaseDistribution]:
    """Return the space in Optuna's terms.

    Raises:
        CompressError: if a key can have no value.
    """
    distributions = _import_optuna().distributions

    def one(values: Interval | Choice) -> optuna.distributions.BaseDistribution:
        if isinstance(values, Choice):
            return distributions.CategoricalDistribution(values.values)
        if not (math.isfinite(values.low) and math.isfinite(values.high)):
            raise ValueError("no end")
        if values.whole:
            step = 1 if values.step is None else int(values.step)
            return distributions.IntDistribution(int(values.low), int(values.high), log=values.log, step=step)
        return distributions.FloatDistribution(values.low, values.high, log=values.log, step=values.step)

    found = {}
    for key, values in space.items():
        try:
            found[key] = one(values)
        except ValueError as error:
            raise CompressError(
                key,
                expected="the smaller number first, above zero for tag(log,...); one value at least for a range",
                received=_shown(values),
                fix="Write for example interval(0.3,0.9), tag(log,interval(1e-4,1e-1)) or range(2,9).",
            ) from error
    return found


def _shown(values: Interval | Choice) -> str:
    if isinstance(values, Choice):
        return ", ".join(values.values) or "a range without a value"
    text = f"interval({values.low:g},{values.high:g})"
    return f"tag(log,{text})" if values.log else text


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _as_run(value: Any) -> Any:
    """Return a drawn value as the command line has carried it to the job."""
    return float(_text(value)) if isinstance(value, float) else value


def _described(space: Space, objectives: Sequence[Objective]) -> str:
    return json.dumps([{key: repr(space[key]) for key in sorted(space)}, [repr(o) for o in objectives]])


@contextmanager
def _answering(where: str) -> Iterator[None]:
    """Say in one paragraph that the database does not answer, or is locked."""
    try:
        yield
    except CompressError:
        raise
    except Exception as error:
        names = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
        if not names & {"optuna", "sqlalchemy", "sqlite3"} and not isinstance(error, ImportError):
            raise
        chain = [str(e) for e in (error, error.__cause__, error.__context__) if e is not None]
        locked = any("locked" in text for text in chain)
        raise CompressError(
            f"hydra.sweeper.storage {where}",
            expected="a database that answers",
            received=f"one that another process has kept locked for {_LOCK_SECONDS} seconds"
            if locked
            else f"{type(error).__name__}: {without_password(' '.join(chain[0].split()))[:200]}",
            fix="End the process that holds it (a copy, a database browser), or use a database server."
            if locked
            else "Correct hydra.sweeper.storage, e.g. sqlite:///search.db, and install the database's driver.",
        ) from error
