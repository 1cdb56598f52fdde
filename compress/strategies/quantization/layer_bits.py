"""Bits of single layers beside those of all others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated

from annotated_types import Ge, Le, MinLen
from pydantic import AfterValidator

from compress.errors import CompressError, did_you_mean

Bits = Annotated[int, Ge(2), Le(8)]


def _patterns(value: Mapping[str, int]) -> Mapping[str, int]:
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"names of layers, or regular expressions; {pattern!r}: {error}") from error
    return value


LayerBits = Annotated[dict[str, Bits], MinLen(1), AfterValidator(_patterns)]
"""Regular expression on the whole name of a layer -> bits of its weights; the first that matches counts."""


def bits_of_layers(layers: Iterable[str], bits: int, single: Mapping[str, int] | None, where: str) -> dict[str, int]:
    """Return the bits of each layer.

    Args:
        layers: their names.
        bits: of those that ``single`` says nothing of.
        single: see :data:`LayerBits`.
        where: the key of ``single``, for the error.

    Raises:
        CompressError: if a rule of ``single`` matches no layer.
    """
    found = dict.fromkeys(layers, bits)
    rules = dict(single or {})
    for pattern, width in reversed(rules.items()):
        matched = [name for name in found if re.fullmatch(pattern, name)]
        if not matched:
            raise CompressError(
                where,
                expected="names of layers, or regular expressions on them, that this stage may quantize",
                received=pattern,
                fix=did_you_mean(pattern, found),
            )
        found.update(dict.fromkeys(matched, width))
    return found
