"""Arrays that are put together from few distinct vectors: how they are cut, and which cut is the best.

Nobody says how an array was made: a cut under which vectors repeat is found in the numbers themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compress.deploy.coding.symbols import MOST_ANS_SYMBOLS

MOST_LENGTH = 32
"""Numbers of a vector, at most."""
_SAMPLE = 1 << 15
"""Vectors that are looked at first, to see whether a cut is worth a try."""
_MOST_DISTINCT = 0.99
"""Share of a sample's numbers up to which vectors may repeat."""


@dataclass(frozen=True)
class Cut:
    """An array of ``rows`` x ``columns`` as vectors of ``length`` numbers.

    They stand one below the other in a column (``down``), or follow each other in the array as it is counted row after
    row. Vectors are counted in the order of their first numbers.
    """

    rows: int
    columns: int
    length: int
    down: bool

    @property
    def vectors(self) -> int:
        """How many there are."""
        return self.rows * self.columns // self.length

    @property
    def fits(self) -> bool:
        """Whether the array can be cut so without a rest."""
        return not (self.rows if self.down else self.rows * self.columns) % self.length

    def apart(self, values: np.ndarray) -> np.ndarray:
        """Return the vectors [vectors, length] of an array [rows * columns]."""
        if not self.down:
            return values.reshape(-1, self.length)
        groups = values.reshape(self.rows // self.length, self.length, self.columns)
        return groups.transpose(0, 2, 1).reshape(-1, self.length)

    def together(self, vectors: np.ndarray) -> np.ndarray:
        """Return the array [rows * columns] of vectors [vectors, length]."""
        if not self.down:
            return vectors.reshape(-1)
        groups = vectors.reshape(self.rows // self.length, self.columns, self.length)
        return groups.transpose(0, 2, 1).reshape(-1)

    def sample(self, values: np.ndarray) -> np.ndarray:
        """Return some of the vectors [n, length], from all over the array."""
        if self.vectors <= _SAMPLE:
            return self.apart(values)
        chosen = np.linspace(0, self.vectors - 1, _SAMPLE).astype(np.int64)
        first = chosen * self.length
        if self.down:
            first = chosen // self.columns * (self.length * self.columns) + chosen % self.columns
        return values[first[:, None] + np.arange(self.length) * (self.columns if self.down else 1)]


def repeated(values: np.ndarray, rows: int, columns: int) -> tuple[Cut, np.ndarray, np.ndarray] | None:
    """Return the best cut, the distinct vectors uint [k, length], and which of them each is [vectors].

    None if no cut takes fewer bytes than the distinct numbers, by what a sample says.

    Args:
        values: uint [rows * columns].
        rows: of the array.
        columns: of the array.
    """
    alone = Cut(rows, columns, 1, False)
    numbers = alone.sample(values)
    if len(np.unique(numbers)) > _MOST_DISTINCT * len(numbers):
        return None
    least, best = _size(alone, values), alone
    # In a single column both directions are one.
    for down in (True, False) if columns > 1 else (False,):
        cuts = [Cut(rows, columns, length, down) for length in range(2, MOST_LENGTH + 1)]
        sizes = [(_size(cut, values), cut) for cut in cuts if cut.fits]
        least, best = min([(least, best), *sizes], key=lambda found: found[0])
    if best is alone:
        return None
    vectors = best.apart(values)
    _, first, indices = np.unique(_keys(vectors), return_index=True, return_inverse=True)
    book = vectors[first]
    # Two vectors may have one key, though it is most unlikely.
    if len(book) > MOST_ANS_SYMBOLS or not np.array_equal(book[indices], vectors):
        return None
    return best, book, indices


def _size(cut: Cut, values: np.ndarray) -> float:
    """Return about how many bytes vectors and indices take; those of the numbers if most vectors are different."""
    sample = cut.sample(values)
    _, counts = np.unique(_keys(sample), return_counts=True)
    if 2 * len(counts) > len(sample):
        return float(values.nbytes)
    bits = -float(counts @ np.log2(counts / len(sample))) / len(sample)
    return cut.vectors * bits / 8 + len(counts) * cut.length * values.itemsize


def _keys(vectors: np.ndarray) -> np.ndarray:
    """Return numbers uint64 [n], the same for two vectors [n, length] if they are the same, almost surely only then."""
    factors = np.random.default_rng(0).integers(0, 2**64, vectors.shape[1], np.uint64) | np.uint64(1)
    keys = np.zeros(len(vectors), np.uint64)
    for place, factor in enumerate(factors):
        # The halves of a product are swapped, for the lower bits of a float are often all zero.
        product = vectors[:, place].astype(np.uint64) * factor
        keys += product << np.uint64(32) | product >> np.uint64(32)
    return keys
