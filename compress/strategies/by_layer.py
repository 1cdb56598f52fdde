"""Values of single layers beside that of all others: rules by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from compress.errors import CompressError, did_you_mean

T = TypeVar("T")


def patterns(value: Mapping[str, T]) -> Mapping[str, T]:
    """Return rules whose keys are regular expressions.

    Raises:
        ValueError: if one is none.
    """
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"names of layers, or regular expressions; {pattern!r}: {error}") from error
    return value


def by_layer(
    layers: Iterable[str], value: T, single: Mapping[str, T] | None, where: str, expected: str
) -> dict[str, T]:
    """Return the value of each layer.

    Args:
        layers: their names.
        value: of those that ``single`` says nothing of.
        single: regular expression on the whole name of a layer -> its value; the first that matches counts.
        where: the key of ``single``, for the error.
        expected: what its names should be, for the error.

    Raises:
        CompressError: if a rule of ``single`` matches no layer.
    """
    found = dict.fromkeys(layers, value)
    for pattern, own in reversed(dict(single or {}).items()):
        matched = [name for name in found if re.fullmatch(pattern, name)]
        if not matched:
            raise CompressError(where, expected=expected, received=pattern, fix=did_you_mean(pattern, found))
        found.update(dict.fromkeys(matched, own))
    return found
