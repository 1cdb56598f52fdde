"""Bits of single layers beside those of all others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

from annotated_types import Ge, Le, MinLen
from pydantic import AfterValidator

from compress.strategies.by_layer import by_layer, patterns

Bits = Annotated[int, Ge(2), Le(8)]
LayerBits = Annotated[dict[str, Bits], MinLen(1), AfterValidator(patterns)]
"""Regular expression on the whole name of a layer -> bits of its weights; the first that matches counts."""


def bits_of_layers(layers: Iterable[str], bits: int, single: Mapping[str, int] | None, where: str) -> dict[str, int]:
    """Return the bits of each layer; arguments and errors as of :func:`~compress.strategies.by_layer.by_layer`."""
    expected = "names of layers, or regular expressions on them, that this stage may quantize"
    return by_layer(layers, bits, single, where, expected)
