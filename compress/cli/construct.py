"""Objects from plain values: a class named by ``_target_``, its fields checked, every mistake in one paragraph."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from pydantic import PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import ArgsKwargs, ErrorDetails

from compress.cli.own_code import import_named, told
from compress.errors import CompressError, did_you_mean

T = TypeVar("T")


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
    kind = find_class(base, fields.pop("_target_", None), where)
    known = field_names(kind)
    for name in fields:
        if name not in known:
            raise unknown_key(f"{where}.{name}", name, known)
    try:
        made = kind(**fields)
    except ValidationError as error:
        raise invalid(error, where, kind) from error
    except (TypeError, ValueError, PydanticUserError) as error:
        # A plain dataclass, which pydantic does not check; or annotations that mean nothing to it.
        raise CompressError(
            where,
            expected=f"fields that {kind.__module__}.{kind.__name__} accepts",
            received=told(error),
            fix=f"Give the fields other values, or correct the class; it has {', '.join(sorted(known)) or 'none'}.",
        ) from error
    refuse_truth_as_number(made, fields, where)
    return made


def refuse_truth_as_number(made: Any, fields: Mapping[str, Any], where: str) -> None:
    """Refuse ``true`` and ``false`` where a number is wanted, which pydantic takes them for.

    Raises:
        CompressError: naming the first such field of ``made``.
    """
    for name, value in fields.items():
        taken = getattr(made, name, value)
        several = isinstance(value, list) and isinstance(taken, list | tuple) and len(value) == len(taken)
        for one, number in zip(value, taken, strict=True) if several else [(value, taken)]:
            if isinstance(one, bool) and isinstance(number, int | float) and not isinstance(number, bool):
                key, wanted = f"{where}.{name}", "[<number>]" if several else "<number>"
                raise CompressError(key, expected="a number", received=written(one), fix=f"Write {key}={wanted}.")


def written(value: Any) -> str:
    """Return the value as a command line has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def check(kind: Any, value: Any, where: str) -> Any:
    """Return ``value`` as ``kind``.

    Raises:
        CompressError: if it is not one.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise invalid(error, where) from error


def field_names(kind: Any) -> set[str]:
    """Return the names of a dataclass's fields."""
    return {item.name for item in dataclasses.fields(kind)}


def find_class(base: type[T], target: Any, where: str) -> type[T]:
    """Return the class that ``target`` is the import path of.

    Raises:
        CompressError: if there is none, or it is no dataclass below ``base``.
    """
    if not isinstance(target, str) or "." not in target:
        raise CompressError(
            f"{where}._target_",
            expected="the import path of a class",
            received=repr(target),
            fix="The YAML of every choice names its class under _target_.",
        )
    module, _, name = target.rpartition(".")
    found = import_named(module, f"{where}._target_")
    kind = getattr(found, name, None)
    if kind is None:
        raise CompressError(
            f"{where}._target_",
            expected=f"a class of {getattr(found, '__file__', None) or module}",
            received=name,
            fix=did_you_mean(name, [key for key, value in vars(found).items() if _is_below(base, value)]),
        )
    if not (dataclasses.is_dataclass(kind) and isinstance(kind, type) and issubclass(kind, base)):
        raise CompressError(
            f"{where}._target_",
            expected=f"a dataclass that is a {base.__module__}.{base.__name__}",
            received=target,
            fix="Put a decorator above it: @dataclass(frozen=True), of pydantic.dataclasses or dataclasses."
            if _is_below(base, kind)
            else "Name the class of the strategy, model, data source or board.",
        )
    if inspect.isabstract(kind):
        raise CompressError(
            f"{where}._target_",
            expected=f"a class with all that a {base.__name__} does",
            received=f"{target}, without {', '.join(sorted(getattr(kind, '__abstractmethods__', ())))}",
            fix="Write what is missing.",
        )
    return kind


def _is_below(base: type, value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, base) and value is not base


def unknown_key(where: str, name: str, known: set[str]) -> CompressError:
    """Return what is said of a key that is none of the ``known`` ones."""
    return CompressError(where, expected="a key that exists", received=name, fix=did_you_mean(name, known))


def _defaults(kind: Any) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}


def invalid(error: ValidationError, where: str, owner: Any = None) -> CompressError:
    """Return what is said of the first value that is not valid; ``owner``: the class that was to have it, if any."""
    defaults = _defaults(owner)
    first, *others = error.errors()
    path = [part for part in _place(first) if isinstance(part, str)]
    key = ".".join([where, *path])
    first = _of_number(first)
    also = [_wanted(other) for other in others if _place(other) == _place(first)]
    expected = " or ".join(dict.fromkeys([_wanted(first), *also]))
    received = first["input"]
    if isinstance(received, ArgsKwargs):
        # The fields do not go together; each alone is valid.
        as_given = {k: tuple(v) if isinstance(v, list) else v for k, v in (received.kwargs or {}).items()}
        set_ = {k: v for k, v in (received.kwargs or {}).items() if as_given[k] != defaults.get(k)}
        return CompressError(
            key,
            expected=expected[:300],
            received=", ".join(f"{k}={written(v)}" for k, v in set_.items())[:300],
            fix="Take back the ones that you do not mean.",
        )
    fix = f"Change it: {key}=<value>."
    if first["type"] == "unexpected_keyword_argument":
        fix = "Leave it out."
    elif first["type"] == "missing" and len(path) > 1:
        # Below a value that is null by default, a key of its own cannot be set.
        fix = f"Write '{key.rpartition('.')[0]}={{{path[-1]}: <value>}}'."
    elif first["type"] in ("tuple_type", "list_type") and isinstance(received, str | int | float):
        fix = f"Write '{key}=[{received}]'."
    elif first["type"] in ("dict_type", "mapping_type"):
        fix = f"Write '{key}={{<name>: <value>}}'."
    elif first["type"] == "dataclass_type" and (inner := _inner_fields(owner, path, first["ctx"]["class_name"])):
        fix = f"Write '{key}={{{inner[0]}: {received if len(inner) == 1 else '<value>'}}}'"
        fix += "." if len(inner) == 1 else f"; its keys are {', '.join(inner)}."
    given = written(received) if isinstance(received, bool) else repr(received)
    return CompressError(key, expected=expected[:300], received=given[:120], fix=fix)


def _of_number(error: ErrorDetails) -> ErrorDetails:
    """Return the error as one about what a number is, where ``true`` or NaN was compared with a limit."""
    value = error["input"]
    compared = error["type"] in ("less_than", "less_than_equal", "greater_than", "greater_than_equal")
    if compared and (isinstance(value, bool) or (isinstance(value, float) and value != value)):
        return {**error, "type": "number", "ctx": {}}
    return error


def _inner_fields(owner: Any, path: Sequence[str], name: str) -> list[str]:
    """Return the fields of the dataclass of that name which a field of ``owner`` may be."""
    if not dataclasses.is_dataclass(owner) or len(path) != 1:
        return []
    kind = get_type_hints(owner).get(path[0])
    return [
        field.name
        for one in (kind, *get_args(kind))
        if dataclasses.is_dataclass(one) and getattr(one, "__name__", "") == name
        for field in dataclasses.fields(one)
    ]


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
    "tuple_type": "a list",
    "list_type": "a list",
    "too_short": "at least {min_length} items",
    "dataclass_type": "a mapping of its keys to values",
    "dict_type": "a mapping of names to values",
    "mapping_type": "a mapping of names to values",
    "number": "a number",
}
_UNION_TAGS = ("float", "int", "bool", "str", "none")
