"""Which layers' values are spoken for, so that quantization must not rescale them."""

from __future__ import annotations

from collections.abc import Iterable

from compress.candidate import Guarantee
from compress.strategies.pruning.zeros import Zeros


def valued_layers(guarantees: Iterable[Guarantee]) -> frozenset[str]:
    """Return the layers whose weights must not be multiplied: more than zeros is guaranteed of their values."""
    valued = (guarantee for guarantee in guarantees if not isinstance(guarantee, Zeros))
    return frozenset(name.rpartition("/")[0] for guarantee in valued for name in guarantee.weights())
