"""What numbers look like: which there are, and whether they are few, or whole steps of a grid."""

from __future__ import annotations

import numpy as np

_SAMPLE = 200_000
"""Values that are looked at first, to see whether a codebook or a grid is worth a try."""
_MOST_LEVEL = 127


def present(numbers: np.ndarray, most: int) -> np.ndarray:
    """Return whether each number below ``most`` is there."""
    present = np.zeros(most, bool)
    present[numbers] = True
    return present


def looked_up(values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the distinct values, sorted, and which of them each value is; None if there are more than ``most``."""
    book = np.unique(values[:: max(1, len(values) // _SAMPLE)])
    while len(book) <= most:
        indices = np.minimum(np.searchsorted(book, values), len(book) - 1)
        missing = values[book[indices] != values]
        if not len(missing):
            return book, indices
        # What the sample has missed is rare; if not, the book grows too large soon.
        book = np.union1d(book, missing[: 4 * _SAMPLE])
    return None


def grid_steps(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return steps float32 [columns] and levels int32 [rows, columns] whose products are the numbers; None if none are.

    A column's smallest value is taken for one step, or for two, three or four. Zeros may be negative.
    """
    if not np.isfinite(numbers).all():
        return None
    sizes = np.abs(numbers)
    smallest_size = np.where(sizes > 0, sizes, np.float32(np.inf)).min(0)
    smallest_size = np.where(np.isfinite(smallest_size), smallest_size, np.float32(1))
    steps = np.ones_like(smallest_size)
    levels = np.zeros(numbers.shape, np.int32)
    open_columns = np.arange(numbers.shape[1])
    for multiple in range(1, 5):
        tried = (smallest_size[open_columns] / np.float32(multiple)).astype(np.float32)
        column = numbers[:, open_columns]
        with np.errstate(all="ignore"):
            ratio = np.rint(column / tried)
        fits = (np.abs(ratio) <= _MOST_LEVEL).all(0) & (tried > 0)
        whole = np.where(fits, ratio, 0).astype(np.int32)
        fits &= (whole.astype(np.float32) * tried == column).all(0)
        steps[open_columns[fits]] = tried[fits]
        levels[:, open_columns[fits]] = whole[:, fits]
        open_columns = open_columns[~fits]
        if not len(open_columns):
            return steps, levels
    return None
