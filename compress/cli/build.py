"""From the composed configuration to the nouns: every value checked, every mistake answered in one paragraph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt, MinLen
from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from compress.boards.board import Board
from compress.cache.store import StageCache
from compress.cli.construct import (
    check,
    construct,
    field_names,
    find_class,
    invalid,
    refuse_truth_as_number,
    to_plain,
    unknown_key,
)
from compress.cli.places import choices_of, read_choice
from compress.cli.techniques import make_techniques
from compress.cli.words import places_of
from compress.data.source import STRICT, DataSource
from compress.distribution.settings import DistributionSettings
from compress.errors import CompressError, did_you_mean
from compress.graph.selection import Position, Rule, Selection
from compress.models.file import MODEL_SUFFIXES, FileModel
from compress.models.source import RANDOM, ModelSource, TrainableSource
from compress.networks import Networks, said_of
from compress.pipeline.pipeline import Pipeline
from compress.pipeline.stage import Stage
from compress.strategies.distillation.student import AGAIN
from compress.strategies.distillation.terms import chosen_losses
from compress.strategies.strategy import PREVIOUS, REFERENCE, Strategy
from compress.tracking.store import TrackingSettings
from compress.training import Recovery

Seed = Annotated[int, Ge(0), Lt(2**31)]
_GROUPS = (
    "strategy",
    "model",
    "data",
    "board",
    "recovery",
    "tracking",
    "cache",
    "techniques",
    "budget",
    "distribution",
)
_VALUES = ("seed", "strict", "debug")
_WRAPPERS = ("only", "skip", "repeat", "release", "recovery")


@checked_dataclass(frozen=True, config=STRICT)
class CacheSettings:
    """``conf/cache``."""

    enabled: bool
    dir: Annotated[str, MinLen(1)]
    max_gigabytes: Annotated[float, Gt(0)]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a command was asked to do: the pipeline without its data, which are read later."""

    model: ModelSource
    source: DataSource
    board: Board
    stages: tuple[Stage, ...]
    cache: StageCache
    tracking: TrackingSettings
    seed: int
    strict: bool
    networks: Networks
    distribution: DistributionSettings

    def pipeline(self) -> Pipeline:
        """Read the data and return the pipeline."""
        return Pipeline(
            model=self.model,
            data=self.source.load(),
            board=self.board,
            stages=self.stages,
            cache=self.cache,
            seed=self.seed,
            strict=self.strict,
            networks=self.networks,
        )


def make_plan(config: DictConfig) -> Plan:
    """Return the plan that the composed configuration describes.

    Raises:
        CompressError: at the first value that is not valid.
    """
    plain = to_plain(config)
    _check_shape(plain)
    _refuse_unread_budget(config, plain["budget"])
    _recovery(plain["recovery"], "recovery")
    model = construct(ModelSource, plain["model"], "model")
    model.origin()
    cache = check(CacheSettings, plain["cache"], "cache")
    check(bool, plain["debug"], "debug")
    _refuse_file(plain["strategy"])
    stages = tuple(_stage(name, values) for name, values in plain["strategy"].items())
    for stage in stages:
        _refuse_another_method(stage, plain["recovery"]["method"])
    # A stage has its teachers from recovery, unless it names its own.
    teachers = {
        name: "recovery.teachers"
        if name in (plain["recovery"]["teachers"] or ())
        else f"strategy.{stage.name}.recovery.teachers"
        for stage in reversed(stages)
        for name in stage.recovery.teachers
        if name not in (REFERENCE, PREVIOUS)
    }
    return Plan(
        model=model,
        source=construct(DataSource, plain["data"], "data"),
        board=construct(Board, plain["board"], "board"),
        stages=stages,
        cache=StageCache(Path(cache.dir).expanduser() if cache.enabled else None, cache.max_gigabytes * 1e9),
        tracking=check(TrackingSettings, plain["tracking"], "tracking"),
        seed=check(Seed, plain["seed"], "seed"),
        strict=check(bool, plain["strict"], "strict"),
        distribution=construct(DistributionSettings, plain["distribution"], "distribution"),
        networks=Networks(
            teachers={name: _named_model(name, key, [REFERENCE, PREVIOUS]) for name, key in teachers.items()},
            keys=teachers,
            students={
                name: _untrained(name, f"strategy.{stage.name}.{field}")
                for stage in stages
                for name, field in stage.strategy.models().items()
            },
        ),
    )


def _refuse_unread_budget(config: DictConfig, budget: Mapping[str, Any]) -> None:
    """Refuse a budget that no stage keeps to."""
    stages = str(OmegaConf.to_container(config.strategy, resolve=False))
    for key, value in budget.items():
        if value is not None and f"${{budget.{key}}}" not in stages:
            raise CompressError(
                f"budget.{key}",
                expected="null: no stage of the pipeline reads it",
                received=repr(value),
                fix="Write strategy=auto, which keeps to it; or give a stage an amount of its own, such as "
                "strategy.prune_channels.bytes=0.5.",
            )


def _check_shape(plain: Mapping[str, Any]) -> None:
    """Refuse a configuration that lacks a part or has one too many, as ``~model`` or ``+foo=1`` make it."""
    for key in plain:
        if key not in (*_GROUPS, *_VALUES):
            if places := places_of(key, plain):
                fix = f"Write {' or '.join(f'{place}={plain[key]}' for place in places)}."
                raise CompressError(key, expected="a key that exists", received=key, fix=fix)
            raise unknown_key(key, key, {*_GROUPS, *_VALUES})
    for key in (*_GROUPS, *_VALUES):
        if key not in plain or (key in _GROUPS and not isinstance(plain[key], Mapping)):
            raise CompressError(
                key,
                expected="one of the choices that conf/ holds for it" if key in _GROUPS else "a value",
                received=repr(plain.get(key)),
                fix=f"Write {key}=<choice>" + (", or strategy=none." if key == "strategy" else "."),
            )


def _refuse_file(strategy: Mapping[str, Any]) -> None:
    """Refuse ``strategy=prune.yaml``, which Hydra reads as it stands, in place of the stages."""
    if "_target_" in strategy:
        raise CompressError(
            "strategy",
            expected="names of strategies, as strategy=<name>+<name>",
            received=f"the fields of {strategy['_target_']}",
            fix="Write the name alone: strategy=prune, not strategy=prune.yaml.",
        )


def _stage(name: str, values: Any) -> Stage:
    where = f"strategy.{name}"
    keys = values if isinstance(values, Mapping) else {}
    recovery = keys.get("recovery")
    for key, value in ((where, values), (f"{where}.recovery", recovery)):
        if value is not None and not isinstance(value, Mapping):
            raise CompressError(
                key,
                expected="keys with their values",
                received=repr(value),
                fix=f"Write {key}.<key>=<value>; without the override, --cfg job shows the keys.",
            )
    if missing := [key for key in _WRAPPERS if key not in keys or (key == "recovery" and recovery is None)]:
        raise CompressError(
            where,
            expected="a stage with all its keys, as strategy=<name>+<name> makes it",
            received=f"one without {', '.join(missing)}",
            fix="Leave the stage out of strategy=... instead of deleting keys; recovery.method=none does not train.",
        )
    wrappers = {key: values[key] for key in _WRAPPERS}
    fields = {key: value for key, value in values.items() if key not in _WRAPPERS}
    known = field_names(find_class(Strategy, fields.get("_target_"), where))
    if "techniques" in known:
        fields["techniques"] = make_techniques(fields.get("techniques"), "techniques")
    for key in fields:
        if key != "_target_" and key not in known:
            raise unknown_key(f"{where}.{key}", key, known | set(_WRAPPERS))
    release = wrappers["release"]
    return Stage(
        name=name,
        strategy=construct(Strategy, fields, where),
        selection=make_selection(wrappers["only"], wrappers["skip"], f"{where}."),
        recovery=_recovery(values["recovery"], f"{where}.recovery"),
        repeat=_positive(wrappers["repeat"], f"{where}.repeat"),
        release=tuple(check(list[str], [release] if isinstance(release, str) else release or [], f"{where}.release")),
    )


def make_selection(only: Any, skip: Any, prefix: str) -> Selection:
    """Return the layers that ``only`` and ``skip`` choose; ``prefix``: of these two keys.

    Raises:
        CompressError: if one of them is no list of rules.
    """
    where = prefix.removesuffix(".")
    return Selection(_rules(only, f"{prefix}only"), _rules(skip, f"{prefix}skip"), where=where)


def _named_model(name: str, where: str, others: Sequence[str], *, files: bool = True) -> ModelSource:
    """Return the model of that name, or the one in the file of that name; ``others``: what else may be named."""
    choices = {key: file for key, file in choices_of("model").items() if key != "file"}
    if name in choices:
        source = construct(ModelSource, to_plain(read_choice(choices[name])), where)
    elif files and name and Path(name).expanduser().exists():
        source = FileModel(path=name)
    elif files and Path(name).suffix in MODEL_SUFFIXES:
        raise CompressError(
            where,
            expected="the file of a model",
            received=f"no such file: {Path(name).expanduser().absolute()}",
            fix="Check the path; one that is not absolute begins in the current folder.",
        )
    else:
        raise CompressError(
            where,
            expected=f"{', '.join(others)}, a model's name" + (", or its file" if files else ""),
            received=name or "an empty name",
            fix="Name a network, such as resnet20: a file's weights are trained already, and these begin anew."
            if Path(name).suffix in MODEL_SUFFIXES
            else did_you_mean(name, [*others, *sorted(choices)]),
        )
    if files:
        with said_of(where):
            source.origin()
    return source


def _untrained(name: str, where: str) -> ModelSource:
    """Return the network of that name in ``conf/model``, with weights as initialised."""
    source = _named_model(name, where, [AGAIN], files=False)
    if not isinstance(source, TrainableSource):
        raise CompressError(
            where, expected="a network that can be trained", received=name, fix="Name one like resnet20."
        )
    return dataclasses.replace(source, weights=RANDOM)


def _recovery(values: Mapping[str, Any], where: str) -> Recovery:
    for key in values:
        if key not in field_names(Recovery):
            raise unknown_key(f"{where}.{key}", key, field_names(Recovery))
    try:
        recovery = Recovery(**values)
    except ValidationError as error:
        raise invalid(error, where) from error
    refuse_truth_as_number(recovery, values, where)
    chosen_losses(recovery, where)
    return recovery


def _refuse_another_method(stage: Stage, general: str) -> None:
    """Refuse a method that is given to one stage alone, which trains in another way; ``general``: that of all."""
    own, given = stage.strategy.own_method, stage.recovery.method
    if own is not None and given in ("finetune", "distill") and given not in (own, general):
        raise CompressError(
            f"strategy.{stage.name}.recovery.method",
            expected=f"{own}, which is how this strategy trains, or none",
            received=given,
            fix=f"Leave it out, or write strategy={given} instead.",
        )


def _positive(value: Any, where: str) -> int:
    number: int = 0 if isinstance(value, bool) else check(int, value, where)
    if number < 1:
        raise CompressError(where, expected="a whole number from 1", received=str(value), fix=f"Write {where}=1.")
    return number


def _rules(value: Any, where: str) -> tuple[Rule | Position, ...]:
    if value is None:
        return ()
    items = value if isinstance(value, list) else str(value).split(",") if isinstance(value, str) else [value]
    rules: list[Rule | Position] = []
    for item in items:
        text = item.strip() if isinstance(item, str) else None
        if text == "first" or text == "last":
            rules.append("first" if text == "first" else "last")
        elif isinstance(item, Mapping) and item and set(item) <= {"type", "name"}:
            rules.append(check(Rule, dict(item), where))
        else:
            raise CompressError(
                where,
                expected="first, last, {type: ...}, {name: ...}, or a list of these",
                received=repr(item),
                fix=f"Write for example '{where}={{type: Dense}}' or '{where}={{name: conv1}}'.",
            )
    return tuple(rules)
