"""``hydra/sweeper=search``: a Hydra sweeper that lets an Optuna study choose what to try next.

Hydra looks for plugins in the package ``hydra_plugins`` alone; what is searched, and how, is in ``compress.search``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from compress.cli.config_source import GROUP, stage_names
from compress.errors import CompressError, did_you_mean

if TYPE_CHECKING:
    from compress.search.space import Choice, Interval, Space
    from compress.search.study import Study, Trial

_LOG = logging.getLogger("compress")
_BESIDE = ("hydra", "tracking", "cache", "debug")
"""Keys of a job's configuration that its outcome does not depend on; a search may change its limits."""
_STAGE = re.compile(rf"[+~]*{GROUP}\.(\w+)")


class SearchSweeper(Sweeper):
    """Asks a study for settings and launches them, until it has had ``trials`` of them.

    The fields are those of ``conf/hydra/sweeper/search.yaml``.
    """

    def __init__(
        self,
        trials: int,
        at_once: int,
        objectives: Any,
        sampler: str,
        population: int,
        seed: int,
        storage: Any,
        study: str | None,
        params: Any,
        give_up: Any,
    ) -> None:
        from compress.search.trial import read_limits
        from compress.tracking.names import require_known
        from compress.tracking.pareto import read_fronts

        for name, value in (("trials", trials), ("at_once", at_once), ("population", population)):
            _require(isinstance(value, int) and value >= 1, name, "a whole number from 1", value, "10")
        several = isinstance(objectives, Sequence) and all(isinstance(item, str) for item in objectives)
        _require(
            several and not isinstance(objectives, str),
            "objectives",
            "a list of metrics (a search has one front)",
            objectives,
            "[accuracy,packed_bytes]",
        )
        whole = isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0
        _require(whole, "seed", "a whole number from 0", seed, "0")
        _require(isinstance(storage, str), "storage", "a database's URI", storage, "sqlite:///search.db")
        _require(
            params is None or isinstance(params, Mapping),
            "params",
            "keys with what they may be",
            params,
            "{strategy.prune.sparsity: 'interval(0.3,0.9)'}",
        )
        # The jobs read the limits from the configuration themselves.
        read_limits(give_up, "hydra.sweeper.give_up")
        (front,) = read_fronts(list(objectives), "hydra.sweeper.objectives")
        require_known([front], "hydra.sweeper.objectives", recorded=False)
        self._trials, self._at_once, self._front = trials, at_once, front
        self._objectives, self._sampler, self._population = list(objectives), str(sampler), population
        self._seed, self._storage, self._name = seed, storage, None if study is None else str(study)
        self._params = dict(params or {})
        self._launcher: Launcher | None = None
        self._config: DictConfig | None = None
        self._context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take the configuration and make the launcher."""
        self._config, self._context = config, hydra_context
        self._launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=hydra_context, task_function=task_function
        )

    def sweep(self, arguments: list[str]) -> None:
        """Search; leave what was found in ``search.json`` in the sweep's folder."""
        from compress.search.study import Study, distributions_of

        assert self._config is not None
        assert self._launcher is not None
        assert self._context is not None
        parser = OverridesParser.create(config_loader=self._context.config_loader)
        declared = parser.parse_overrides([f"{key}={_written(value)}" for key, value in self._params.items()])
        given = parser.parse_overrides(arguments)
        # What the command line says of a key wins over what the file declares.
        by_key = {override.get_key_element(): override for override in [*declared, *given]}
        space = {key: found for key, override in by_key.items() if (found := _values(override)) is not None}
        fixed = [f"{key}={o.get_value_element_as_str()}" for key, o in by_key.items() if key not in space]
        if not space:
            raise CompressError(
                "hydra.sweeper.params",
                expected="something to search over",
                received="no key with several values",
                fix="Write for example 'strategy.prune.sparsity=interval(0.3,0.9)' or strategy=prune,lowrank+prune.",
            )
        distributions_of(space)
        composed = self._compose_each(fixed, space)
        sweep = Path(self._config.hydra.sweep.dir)
        sweep.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self._config, sweep / "multirun.yaml")
        study = Study(
            self._storage,
            self._name or _name_of(composed, space, self._objectives, self._sampler, self._seed),
            self._front.objectives,
            space,
            sampler=self._sampler,
            seed=self._seed,
            population=self._population,
            settings=_digest(composed),
        )
        _LOG.info("search: %d of %d trials were made before", study.finished, self._trials)
        tried = 0
        while (left := study.left(self._trials)) > 0:
            if tried >= _MOST_TRIES * self._trials:
                raise CompressError(
                    "hydra.sweeper.params",
                    expected="a search space in which pipelines work",
                    received=f"{study.finished} finished trials of {tried}; the log says why",
                    fix="Narrow the space to what the strategies accept.",
                )
            trials = [study.ask() for _ in range(min(self._at_once, left))]
            jobs = [_of_its_pipeline([*fixed, *trial.overrides], space) for trial in trials]
            # Numbers as the study's: where it is continued in the same folder, no job writes into an older one's.
            results = self._launcher.launch(jobs, initial_job_idx=trials[0].number)
            tried += len(jobs)
            without = [
                error for pair in zip(trials, results, strict=True) if (error := _tell(study, *pair)) is not None
            ]
            if without and not study.reported:
                raise without[0]
            for error in without:
                _LOG.warning("%s The trial counts as failed.", error)
        best = [
            {
                "trial": found.number,
                "setting": _setting_of_its_pipeline(found.setting, space),
                "values": list(found.values),
                "folder": found.folder,
            }
            for found in study.best()
        ]
        (sweep / "search.json").write_text(json.dumps({"objectives": self._objectives, "best": best}, indent=1))
        _LOG.info("search: %d trials, %d of them not beaten: %s", study.finished, len(best), sweep / "search.json")
        if not best and study.finished:
            raise CompressError(
                "hydra.sweeper.give_up",
                expected="limits that some pipeline keeps to",
                received=f"ones for which all {study.finished} trials were given up",
                fix="Lower the limits, or widen the search space.",
            )

    def _compose_each(self, fixed: Sequence[str], space: Space) -> list[str]:
        """Compose a job of each choice, so that a key that no pipeline knows is told before the study begins.

        Returns:
            What decides the jobs' outcomes, as YAML, for the name of the study: files may change, too.
        """
        from compress.search.space import Choice

        assert self._config is not None
        assert self._context is not None
        pipelines = space.get(GROUP)
        choices = list(pipelines.values) if isinstance(pipelines, Choice) else []
        known = {name for choice in choices for name, _ in stage_names(_bare(choice))}
        for key in (*space, *(text.partition("=")[0] for text in fixed)):
            stage = _STAGE.match(key)
            if choices and stage is not None and stage[1] not in known:
                raise CompressError(
                    key,
                    expected="a key of a stage of one of the pipelines",
                    received=f"{stage[1]}, which none of {', '.join(choices)} has",
                    fix=did_you_mean(stage[1], sorted(known)),
                )
        example = {key: found.at(0.0) for key, found in space.items()}
        each = [
            {**example, key: v} for key, values in space.items() if isinstance(values, Choice) for v in values.values
        ]
        composed = []
        for own in each or [example]:
            job = _of_its_pipeline([*fixed, *(f"{key}={value}" for key, value in own.items())], space)
            config = self._context.config_loader.load_sweep_config(self._config, job)
            deciding = [str(key) for key in config if key not in _BESIDE]
            composed.append(OmegaConf.to_yaml(OmegaConf.masked_copy(config, deciding), sort_keys=True))
        return composed


def _of_its_pipeline(overrides: Sequence[str], space: Space) -> list[str]:
    """Leave out what is said of stages that the job's pipeline does not have, where the search chooses the pipeline."""
    return [f"{key}={value}" for key, value in _setting_of_its_pipeline(_split(overrides), space).items()]


def _split(overrides: Sequence[str]) -> dict[str, str]:
    return {key: value for key, _, value in (text.partition("=") for text in overrides)}


def _setting_of_its_pipeline(setting: Mapping[str, Any], space: Space) -> dict[str, Any]:
    if GROUP not in space:
        return dict(setting)
    names = {name for name, _ in stage_names(_bare(setting[GROUP]))}
    stages = {key: _STAGE.match(key) for key in setting}
    return {key: value for key, value in setting.items() if (stage := stages[key]) is None or stage[1] in names}


def _bare(value: Any) -> str:
    """Return a value without the quotes that the command line may have around it."""
    return str(value).strip("'\"")


def _require(right: bool, name: str, expected: str, received: object, example: str) -> None:
    if not right:
        raise CompressError(
            f"hydra.sweeper.{name}",
            expected=expected,
            received="null" if received is None else str(received),
            fix=f"Write 'hydra.sweeper.{name}={example}'.",
        )


_MOST_TRIES = 3
"""Jobs for each trial that is wanted, at most: those that fail are replaced."""


def _tell(study: Study, trial: Trial, result: JobReturn) -> CompressError | None:
    """Take down what a job has come to; return the error if it has not reported an objective."""
    # Imported here: Hydra imports this module at every start.
    from compress.search.trial import read_outcome

    # Raises what the job has raised, under debug=true.
    accuracy = result.return_value
    assert result.hydra_cfg is not None
    folder = str(result.hydra_cfg.hydra.runtime.output_dir)
    metrics, hopeless = read_outcome(Path(folder))
    try:
        study.tell(trial, None if accuracy is None else metrics, hopeless=hopeless, folder=folder)
    except CompressError as error:
        return error
    return None


def _written(value: Any) -> str:
    """Return a declared value as the command line writes it."""
    if OmegaConf.is_config(value) or isinstance(value, list):
        return ",".join(str(item) for item in value)
    return str(value)


def _values(override: Override) -> Interval | Choice | None:
    """Return what the key may be; None if it is fixed."""
    from compress.search.space import Choice, Interval

    value = override.value()
    if not override.is_sweep_override():
        return None
    if isinstance(value, IntervalSweep):
        assert value.start is not None
        assert value.end is not None
        # interval(1,4) holds floats, int(interval(1,4)) whole numbers.
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        return Interval(value.start, value.end, whole=whole, log="log" in value.tags)
    if isinstance(value, RangeSweep) and "log" in value.tags:
        raise CompressError(
            override.get_key_element(),
            expected="tag(log,...) around an interval",
            received=f"tag(log,range({value.start},{value.stop}))",
            fix="Write tag(log,int(interval(1,1000))), whose numbers are whole, too.",
        )
    if isinstance(value, RangeSweep) and isinstance(value.start, int) and isinstance(value.stop, int):
        step = value.step
        if isinstance(step, int) and step > 0 and value.start < value.stop:
            # As Python's range, without its end.
            last = value.start + (value.stop - 1 - value.start) // step * step
            return Interval(value.start, last, whole=True, step=step)
    if isinstance(value, (ChoiceSweep, RangeSweep)):
        return Choice(tuple(override.sweep_string_iterator()))
    raise CompressError(
        override.get_key_element(),
        expected="choice(...), range(...), interval(...), or values with commas between them",
        received=override.get_value_element_as_str(),
        fix="Write for example interval(0.3,0.9).",
    )


def _name_of(*parts: Any) -> str:
    """Return the name of the study that these decide, so that the same command continues its own search."""
    return f"search-{_digest(parts)}"


def _digest(parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
