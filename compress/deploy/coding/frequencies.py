"""Frequency tables: how often each symbol of a stream is expected, in whole parts of a power of two."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compress.deploy.coding.wire import DamagedError, Reader, varint

_PRECISIONS = (6, 8, 10, 12, 14, 16)
MOST_USED = 2 ** _PRECISIONS[-1] // 2
"""Different symbols that a table can be fitted to."""
_FLOOR = 2.0**-24
"""Share of a symbol that the table says never comes: the coder gives it the smallest one that it has."""


@dataclass(frozen=True)
class Frequencies:
    """``parts`` int64 [alphabet]: how many of ``2**precision`` parts each symbol has."""

    precision: int
    parts: np.ndarray

    @classmethod
    def fitted(cls, counts: np.ndarray) -> Frequencies:
        """Return the table that takes the fewest bytes together with a stream of these symbols.

        Args:
            counts: int64 [alphabet], how often each symbol comes; at least one does, at most ``MOST_USED`` do.
        """
        used = int(np.count_nonzero(counts))
        tables = [cls._rounded(counts, precision) for precision in _PRECISIONS if 2**precision >= 2 * used]
        return min(tables, key=lambda table: len(table.to_bytes()) + table.bits(counts) / 8)

    @classmethod
    def _rounded(cls, counts: np.ndarray, precision: int) -> Frequencies:
        whole = 2**precision
        used = np.flatnonzero(counts)
        shares = counts[used] * (whole / counts.sum())
        parts = np.maximum(np.rint(shares), 1).astype(np.int64)
        # Where rounding gave away too many or too few, the largest settle it.
        order = np.argsort(-parts, kind="stable")
        excess = int(parts.sum()) - whole
        while excess:
            step = np.sign(excess)
            able = order[parts[order] > 1] if step > 0 else order
            changed = able[: abs(excess)]
            parts[changed] -= step
            excess -= step * len(changed)
        table = np.zeros(len(counts), np.int64)
        table[used] = parts
        return cls(precision, table)

    def bits(self, counts: np.ndarray) -> float:
        """Return how many bits a stream with these counts takes."""
        used = counts > 0
        shares = np.maximum(self.parts[used] / 2**self.precision, _FLOOR)
        return float(-(counts[used] * np.log2(shares)).sum())

    def to_bytes(self) -> bytes:
        """Return the precision, then for each symbol that comes its distance from the last one, and its parts."""
        used = np.flatnonzero(self.parts)
        gaps = np.diff(used, prepend=-1) - 1
        pairs = zip(gaps.tolist(), self.parts[used].tolist(), strict=True)
        return bytes([self.precision]) + b"".join(varint(gap) + varint(parts - 1) for gap, parts in pairs)

    @classmethod
    def read(cls, reader: Reader, alphabet: int) -> Frequencies:
        """Read a table of ``alphabet`` symbols."""
        precision = reader.byte()
        if precision not in _PRECISIONS:
            raise DamagedError(f"a frequency table of precision {precision}")
        parts = np.zeros(alphabet, np.int64)
        symbol, left = -1, 2**precision
        while left:
            symbol += 1 + reader.varint(alphabet - symbol - 2)
            parts[symbol] = 1 + reader.varint(left - 1)
            left -= int(parts[symbol])
        return cls(precision, parts)
