"""Which layers a stage may touch, said by rule: ``only`` and ``skip``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import tf_keras
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked_dataclass

from compress.errors import CompressError, did_you_mean
from compress.graph.kernels import kernel_attributes

Position = Literal["first", "last"]


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Rule:
    """Matches layers by type (``Dense``) and name (a regular expression on the whole name); both must hold."""

    type: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Selection:
    """The layers that a stage may touch: those that a rule of ``only`` matches and no rule of ``skip``.

    ``first`` and ``last`` mean the first and the last layer with a kernel.
    """

    only: tuple[Rule | Position, ...] = ()
    skip: tuple[Rule | Position, ...] = ()
    where: str = field(default="strategy", compare=False)

    def names(self, model: tf_keras.Model) -> frozenset[str]:
        """Return the names of the selected layers of the flat ``model``.

        Raises:
            CompressError: if a rule matches no layer at all.
        """
        every = frozenset(layer.name for layer in model.layers)
        chosen = self._matched(self.only, model, "only") if self.only else every
        return chosen - self._matched(self.skip, model, "skip")

    def _matched(self, rules: Sequence[Rule | Position], model: tf_keras.Model, key: str) -> frozenset[str]:
        result: set[str] = set()
        for rule in rules:
            found = _match(rule, model, f"{self.where}.{key}".removeprefix("."))
            if not found:
                raise CompressError(
                    f"{self.where}.{key}".removeprefix("."),
                    expected="a rule that matches at least one layer",
                    received=str(_spelling(rule)),
                    fix=_advice(rule, model),
                )
            result |= found
        return frozenset(result)


def _match(rule: Rule | Position, model: tf_keras.Model, where: str) -> set[str]:
    if not isinstance(rule, Rule):
        with_kernel = [layer.name for layer in model.layers if kernel_attributes(layer)]
        return set(with_kernel[:1] if rule == "first" else with_kernel[-1:])
    try:
        pattern = re.compile(rule.name) if rule.name is not None else None
    except re.error as error:
        raise CompressError(
            where,
            expected="a regular expression",
            received=repr(rule.name),
            fix=f"Python's re module says: {error}.",
        ) from error
    return {
        layer.name
        for layer in model.layers
        if (rule.type is None or type(layer).__name__ == rule.type)
        and (pattern is None or pattern.fullmatch(layer.name))
    }


def _spelling(rule: Rule | Position) -> str:
    if not isinstance(rule, Rule):
        return rule
    parts = {"type": rule.type, "name": rule.name}
    return "{" + ", ".join(f"{k}: {v}" for k, v in parts.items() if v is not None) + "}"


def _advice(rule: Rule | Position, model: tf_keras.Model) -> str:
    if isinstance(rule, Rule) and rule.type is not None and rule.name is None:
        return did_you_mean(rule.type, {type(layer).__name__ for layer in model.layers})
    name = rule.name if isinstance(rule, Rule) and rule.name is not None else ""
    return did_you_mean(name, {layer.name for layer in model.layers})
