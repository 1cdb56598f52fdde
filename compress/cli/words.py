"""Command lines of words ``key=value``: of the commands that Hydra does not compose, and where a key belongs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from compress.errors import CompressError, did_you_mean


def quoted(value: str) -> str:
    """Return a value as it is written on the command line: in quotes for Hydra, and in others for the shell."""
    return value if re.fullmatch(r"[\w/.+:-]+", value, re.ASCII) or "'" in value else f"\"'{value}'\""


def key_values(arguments: Sequence[str], keys: Sequence[str], unlisted: Sequence[str] = ()) -> dict[str, str]:
    """Return key -> value; ``unlisted``: keys that are taken, too, and not offered.

    Raises:
        CompressError: if a word has no ``=``, or its key is unknown.
    """
    values: dict[str, str] = {}
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if not sign or key not in (*keys, *unlisted):
            raise CompressError(
                argument,
                expected=f"words of the form key=value; the keys are {', '.join(keys)}",
                received=key,
                fix=did_you_mean(key, keys),
            )
        values[key] = value
    return values


def places_of(name: str, config: Mapping[str, Any]) -> list[str]:
    """Return the keys of the configuration that end in ``name``: those of its stages, else those of its groups."""
    stages = config.get("strategy")
    stages = stages if isinstance(stages, Mapping) else {}
    own = [
        f"strategy.{stage}.{name}" for stage, fields in stages.items() if isinstance(fields, Mapping) and name in fields
    ]
    # A budget is a search's.
    others = ("strategy", "hydra", *(() if "auto" in stages else ("budget",)))
    groups = {group: fields for group, fields in config.items() if group not in others}
    return own or [
        f"{group}.{name}" for group, fields in groups.items() if isinstance(fields, Mapping) and name in fields
    ]
