"""Asymmetric numeral systems, by ``constriction``: streams of almost exactly their entropy.

Source: Duda, arXiv 1311.2540; Bamler, arXiv 2201.01741.
"""

from __future__ import annotations

from collections.abc import Sequence

import constriction
import numpy as np

from compress.deploy.coding.frequencies import Frequencies
from compress.deploy.coding.wire import DamagedError, Reader, little_endian, varint

_MOST_WORDS_PER_SYMBOL = 1
_STATE_WORDS = 2


def encode(parts: Sequence[tuple[np.ndarray, Frequencies]]) -> bytes:
    """Return the number of 32-bit words, and the words, for parts of symbols [n], each with its frequencies."""
    coder = constriction.stream.stack.AnsCoder()
    # What goes in last comes out first.
    for symbols, frequencies in reversed(parts):
        coder.encode_reverse(symbols.astype(np.int32), _model(frequencies))
    words = coder.get_compressed()
    return varint(len(words)) + little_endian(words)


def size(bits: float) -> float:
    """Return about how many bytes :func:`encode` takes for symbols of that many bits of information."""
    words = bits / 32 + 0.5
    return 4 * words + len(varint(int(words)))


class Decoder:
    """Gives back the symbols of :func:`encode`."""

    def __init__(self, reader: Reader, most_symbols: int) -> None:
        count = reader.varint(most_symbols * _MOST_WORDS_PER_SYMBOL + _STATE_WORDS)
        words = reader.array(np.dtype(np.uint32), count)
        if count and not words[-1]:
            raise DamagedError("a stream whose last word is zero")
        self._coder = constriction.stream.stack.AnsCoder(words)

    def pop(self, count: int, frequencies: Frequencies) -> np.ndarray:
        """Return the next ``count`` symbols uint32 [n]."""
        return np.asarray(self._coder.decode(_model(frequencies), count)).view(np.uint32)

    def finish(self) -> None:
        """Refuse a stream in which something is left."""
        if not self._coder.is_empty():
            raise DamagedError("a stream with symbols left over")


def _model(frequencies: Frequencies) -> constriction.stream.model.Categorical:
    # `perfect=False` turns parts of a power of two into fixed-point numbers by a formula that can be written down.
    return constriction.stream.model.Categorical(frequencies.parts.astype(np.float64), perfect=False)
