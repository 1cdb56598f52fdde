"""From the composed configuration to the nouns: every value checked, every mistake answered in one paragraph."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from annotated_types import Ge, Gt, Lt, MinLen
from omegaconf import DictConfig, OmegaConf
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass
from pydantic_core import ArgsKwargs, ErrorDetails

from compress.boards.board import Board
from compress.cache.code import code_digest
from compress.cache.store import StageCache
from compress.cli.places import conf_dir
from compress.data.source import STRICT, DataSource
from compress.distribution.settings import DistributionSettings
from compress.errors import CompressError, did_you_mean
from compress.graph.selection import Position, Rule, Selection
from compress.models.file import FileModel
from compress.models.source import RANDOM, ModelSource, TrainableSource
from compress.networks import Networks
from compress.pipeline.pipeline import Pipeline
from compress.pipeline.stage import Stage
from compress.search.technique import Technique
from compress.strategies.distillation.student import AGAIN
from compress.strategies.distillation.terms import chosen_losses
from compress.strategies.strategy import PREVIOUS, REFERENCE, Strategy
from compress.tracking.store import TrackingSettings
from compress.training import Recovery

T = TypeVar("T")
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
    _recovery(plain["recovery"], "recovery")
    model = construct(ModelSource, plain["model"], "model")
    model.origin()
    cache = check(CacheSettings, plain["cache"], "cache")
    check(bool, plain["debug"], "debug")
    stages = tuple(_stage(name, values) for name, values in plain["strategy"].items())
    for stage in stages:
        _refuse_another_method(stage, plain["recovery"]["method"])
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
            teachers={
                name: _named_model(name, f"strategy.{stage.name}.recovery.teachers", [REFERENCE, PREVIOUS])
                for stage in stages
                for name in stage.recovery.teachers
                if name not in (REFERENCE, PREVIOUS)
            },
            students={
                name: _untrained(name, f"strategy.{stage.name}") for stage in stages for name in stage.strategy.models()
            },
        ),
    )


def _check_shape(plain: Mapping[str, Any]) -> None:
    """Refuse a configuration that lacks a part or has one too many, as ``~model`` or ``+foo=1`` make it."""
    for key in plain:
        if key not in (*_GROUPS, *_VALUES):
            raise _unknown_key(key, key, {*_GROUPS, *_VALUES})
    for key in (*_GROUPS, *_VALUES):
        if key not in plain or (key in _GROUPS and not isinstance(plain[key], Mapping)):
            raise CompressError(
                key,
                expected="one of the choices that conf/ holds for it" if key in _GROUPS else "a value",
                received=repr(plain.get(key)),
                fix=f"Write {key}=<choice>" + (", or strategy=none." if key == "strategy" else "."),
            )


def to_plain(config: DictConfig) -> dict[str, Any]:
    """Return the configuration as plain dictionaries, with every interpolation resolved."""
    plain = OmegaConf.to_container(config, resolve=True)
    if not isinstance(plain, dict):
        raise TypeError(f"the configuration is a {type(plain).__name__}")
    return {str(key): value for key, value in plain.items()}


def construct(base: type[T], values: Mapping[str, Any], where: str) -> T:
    """Return the object that ``values`` describe: ``_target_`` names a subclass of ``base``, the rest its fields.

    Raises:
        CompressError: if the class is not one, or a field is unknown or out of range.
    """
    fields = dict(values)
    kind = _find_class(base, fields.pop("_target_", None), where)
    known = _field_names(kind)
    for name in fields:
        if name not in known:
            raise _unknown_key(f"{where}.{name}", name, known)
    try:
        return kind(**fields)
    except ValidationError as error:
        raise _invalid(error, where, _defaults(kind)) from error


def check(kind: Any, value: Any, where: str) -> Any:
    """Return ``value`` as ``kind``.

    Raises:
        CompressError: if it is not one.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise _invalid(error, where, {}) from error


def _stage(name: str, values: Any) -> Stage:
    where = f"strategy.{name}"
    missing = [key for key in _WRAPPERS if key not in values] if isinstance(values, Mapping) else _WRAPPERS
    if missing or not isinstance(values["recovery"], Mapping):
        raise CompressError(
            where,
            expected="a stage with all its keys, as strategy=<name>+<name> makes it",
            received=f"one without {', '.join(missing or ['recovery'])}",
            fix="Leave the stage out of strategy=... instead of deleting keys; recovery.method=none does not train.",
        )
    wrappers = {key: values[key] for key in _WRAPPERS}
    fields = {key: value for key, value in values.items() if key not in _WRAPPERS}
    known = _field_names(_find_class(Strategy, fields.get("_target_"), where))
    if "techniques" in known:
        fields["techniques"] = make_techniques(fields.get("techniques"), "techniques")
    for key in fields:
        if key != "_target_" and key not in known:
            raise _unknown_key(f"{where}.{key}", key, known | set(_WRAPPERS))
    recovery = wrappers["recovery"]
    release = wrappers["release"]
    return Stage(
        name=name,
        strategy=construct(Strategy, fields, where),
        selection=make_selection(wrappers["only"], wrappers["skip"], f"{where}."),
        recovery=_recovery(recovery, f"{where}.recovery"),
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


def make_techniques(values: Any, where: str) -> tuple[Technique, ...]:
    """Return the techniques that ``values`` describe: strategy -> its fields, one of which is a list of levels.

    Raises:
        CompressError: if there is no such strategy, field or level.
    """
    if not isinstance(values, Mapping) or not values:
        raise CompressError(
            where,
            expected="strategies with a list of levels for one field of each",
            received=repr(values)[:100],
            fix=f"Write for example '{where}={{quantize: {{bits: [8, 4]}}}}', or {where}=standard.",
        )
    return tuple(_technique(str(name), fields, f"{where}.{name}") for name, fields in values.items())


def _technique(name: str, given: Any, where: str) -> Technique:
    fields = dict(given) if isinstance(given, Mapping) else {}
    trained = fields.pop("trained", None)
    defaults, code = _strategy_fields(name, where)
    levels = [key for key, value in fields.items() if isinstance(value, list) and not _is_list(defaults.get(key))]
    if len(levels) != 1 or not fields[levels[0]]:
        raise CompressError(
            where,
            expected="one field with a list of levels",
            received=f"{given!r}"[:120] if not levels else f"lists for {', '.join(levels)}",
            fix=f"Write for example {where}.<field>=[0.5,0.25].",
        )
    (field,) = levels
    values = fields.pop(field)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CompressError(f"{where}.{field}", expected="numbers", received=repr(value), fix="Correct it.")
    if len(set(values)) < len(values):
        raise CompressError(f"{where}.{field}", expected="different levels", received=str(values), fix="Correct it.")

    def strategies(base: Mapping[str, Any], others: Mapping[str, Any], where: str) -> dict[Any, Strategy]:
        return {value: construct(Strategy, {**base, **others, field: value}, where) for value in values}

    found = strategies(defaults, fields, where)
    learnt: dict[Any, Strategy] = {}
    if trained is not None:
        own = {str(k): v for k, v in trained.items()} if isinstance(trained, Mapping) else {"strategy": trained}
        other = str(own.pop("strategy", name))
        base, more = _strategy_fields(other, f"{where}.trained")
        if field in own or field not in base:
            raise CompressError(
                f"{where}.trained",
                expected=f"a strategy with the field {field}, whose levels are those of {where}.{field}",
                received=f"{other}, which has none" if field not in base else f"{field}={own[field]}",
                fix="Leave it out."
                if field in base
                else f"Choose another strategy, or vary another field than {field}.",
            )
        learnt, code = strategies(base, own, f"{where}.trained"), code if other == name else code + more
    return Technique(name, field, found, learnt, code)


def _strategy_fields(name: str, where: str) -> tuple[dict[str, Any], str]:
    """Return the fields of a strategy of ``conf/strategy``, and the digest of its code."""
    choices = sorted(file.stem for file in (conf_dir() / "strategy").glob("*.yaml"))
    if name not in choices:
        raise CompressError(where, expected="a strategy", received=name, fix=did_you_mean(name, choices))
    values = cast(DictConfig, OmegaConf.load(conf_dir() / "strategy" / f"{name}.yaml"))
    kind = _find_class(Strategy, values.get("_target_"), where)
    if "techniques" in _field_names(kind):
        raise CompressError(where, expected="a strategy that is no search itself", received=name, fix="Leave it out.")
    return to_plain(values), code_digest(kind)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _named_model(name: str, where: str, others: Sequence[str], *, files: bool = True) -> ModelSource:
    """Return the model of that name in ``conf/model``, or the one in the file; ``others``: what else may be named."""
    choices = sorted(file.stem for file in (conf_dir() / "model").glob("*.yaml") if file.stem != "file")
    if name in choices:
        values = cast(DictConfig, OmegaConf.load(conf_dir() / "model" / f"{name}.yaml"))
        source = construct(ModelSource, to_plain(values), where)
    elif files and Path(name).expanduser().exists():
        source = FileModel(path=name)
    else:
        raise CompressError(
            where,
            expected=f"{', '.join(others)}, a model's name" + (", or its file" if files else ""),
            received=name,
            fix=did_you_mean(name, [*others, *choices]),
        )
    if files:
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
        if key not in _field_names(Recovery):
            raise _unknown_key(f"{where}.{key}", key, _field_names(Recovery))
    try:
        recovery = Recovery(**values)
    except ValidationError as error:
        raise _invalid(error, where, {}) from error
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


def _field_names(kind: Any) -> set[str]:
    return {item.name for item in dataclasses.fields(kind)}


def _find_class(base: type[T], target: Any, where: str) -> type[T]:
    if not isinstance(target, str) or "." not in target:
        raise CompressError(
            f"{where}._target_",
            expected="the import path of a class",
            received=repr(target),
            fix="The YAML of every choice names its class under _target_.",
        )
    module, _, name = target.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise CompressError(
            f"{where}._target_", expected="an importable module", received=f"{module} ({error})", fix="Install it."
        ) from error
    if not (dataclasses.is_dataclass(kind) and isinstance(kind, type) and issubclass(kind, base)):
        raise CompressError(
            f"{where}._target_",
            expected=f"a dataclass that is a {base.__module__}.{base.__name__}",
            received=target,
            fix="Name the class of the strategy, model, data source or board.",
        )
    return kind


def _unknown_key(where: str, name: str, known: set[str]) -> CompressError:
    return CompressError(where, expected="a key that exists", received=name, fix=did_you_mean(name, known))


def _defaults(kind: Any) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}


def _invalid(error: ValidationError, where: str, defaults: Mapping[str, Any]) -> CompressError:
    first, *others = error.errors()
    path = [part for part in _place(first) if isinstance(part, str)]
    key = ".".join([where, *path])
    also = [_wanted(other) for other in others if _place(other) == _place(first)]
    expected = " or ".join(dict.fromkeys([_wanted(first), *also]))
    received = first["input"]
    if isinstance(received, ArgsKwargs):
        # The fields do not go together; each alone is valid.
        set_ = {k: v for k, v in (received.kwargs or {}).items() if v != defaults.get(k)}
        return CompressError(
            key,
            expected=expected[:300],
            received=", ".join(f"{k}={v}" for k, v in set_.items())[:300],
            fix="Take back the ones that you do not mean.",
        )
    fix = f"Change it: {key}=<value>."
    if first["type"] == "unexpected_keyword_argument":
        fix = "Leave it out."
    elif first["type"] == "missing" and len(path) > 1:
        # Below a value that is null by default, a key of its own cannot be set.
        fix = f"Write '{key.rpartition('.')[0]}={{{path[-1]}: <value>}}'."
    return CompressError(key, expected=expected[:300], received=repr(received)[:120], fix=fix)


def _place(error: ErrorDetails) -> tuple[str | int, ...]:
    """Return where in the configuration it is, without the names that the check has for its alternatives."""
    return tuple(
        part for part in error["loc"] if isinstance(part, int) or ("[" not in part and part not in _UNION_TAGS)
    )


def _wanted(error: ErrorDetails) -> str:
    """Return what was expected, in words about the value."""
    if error["type"] == "missing" and isinstance(error["loc"][-1], int):
        # A place of a list of fixed length.
        return f"a list of {error['loc'][-1] + 1} values"
    if error["type"] in _WANTED:
        return _WANTED[error["type"]].format(**error.get("ctx", {}))
    return str(error["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")


_WANTED = {
    "missing": "a value for this key",
    "unexpected_keyword_argument": "a key that exists",
    "too_short": "at least {min_length} items",
    "dataclass_type": "a mapping of its keys to values",
}
_UNION_TAGS = ("float", "int", "bool", "str", "none")
