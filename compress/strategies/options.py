"""Fields of a strategy that mean something only beside others."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import fields
from typing import Any


def refuse_without_effect(strategy: Any, rules: Iterable[tuple[bool, Collection[str], str]]) -> None:
    """Refuse fields that were changed where they do nothing.

    A configuration gives every field, so those that are as by default pass.

    Args:
        strategy: a dataclass.
        rules: whether fields have an effect, their names, and what they go with.

    Raises:
        ValueError: naming the first such fields.
    """
    defaults = {item.name: item.default for item in fields(strategy)}
    for effective, names, company in rules:
        changed = [name for name in names if getattr(strategy, name) != defaults[name]]
        if changed and not effective:
            given = " and ".join(f"{name}={getattr(strategy, name)}" for name in changed)
            raise ValueError(f"{given} only beside {company}")
