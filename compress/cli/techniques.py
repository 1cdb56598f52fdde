"""The techniques of a search, from ``conf/techniques``: strategies with a list of levels for one field of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.cache.code import code_digest
from compress.cli.construct import construct, field_names, find_class, to_plain
from compress.cli.places import choices_of, read_choice
from compress.errors import CompressError, did_you_mean
from compress.search.technique import Technique
from compress.strategies.strategy import Strategy


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
    lists = {key for key, value in defaults.items() if isinstance(value, list)}
    levels = [key for key, value in fields.items() if isinstance(value, list) and key not in lists]
    if len(levels) != 1 or not fields[levels[0]]:
        raise CompressError(
            where,
            expected="one field with a list of levels",
            received=f"lists for {', '.join(levels)}" if len(levels) > 1 else f"{given!r}"[:120],
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
    """Return the fields that the YAML of a strategy gives it, and the digest of its code."""
    choices = choices_of("strategy")
    if name not in choices:
        raise CompressError(where, expected="a strategy", received=name, fix=did_you_mean(name, sorted(choices)))
    values = read_choice(choices[name])
    kind = find_class(Strategy, values.get("_target_"), where)
    if "techniques" in field_names(kind):
        raise CompressError(where, expected="a strategy that is no search itself", received=name, fix="Leave it out.")
    return to_plain(values), code_digest(kind)
