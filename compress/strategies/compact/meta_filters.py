"""Which meta filter, and which transformation of it, each filter of a kernel becomes.

Alternating least squares, as k-means does it: for given meta filters the cheapest assignment of filters to places, each
place taken once (Kuhn and Munkres, by SciPy); for given places the meta filters' numbers, each the mean of the weights
that are to hold it. Neither step lets the squared error grow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from compress.candidate import Transfer
from compress.deploy.coding.transfers import labels_of, numbers_of, places

_ROUNDS = 20
_FEWEST_STARTS, _MOST_STARTS, _WORK = 2, 64, 5e7
"""Starts, and multiply-adds of a round that so many of them share: small kernels are tried more often."""


@dataclass(frozen=True)
class Assignment:
    """Meta filters float32 [meta filters, numbers], what becomes of each filter, and the squared error of it all."""

    transfer: Transfer
    numbers: np.ndarray
    error: float

    @property
    def kernel(self) -> np.ndarray:
        """The kernel that is made of them."""
        return np.asarray(self.numbers.reshape(-1)[labels_of(self.transfer)])


def assign_filters(kernel: np.ndarray, transfer: Transfer, seed: int) -> Assignment:
    """Return how to make the filters of ``kernel`` [h, w, in, out] out of few meta filters with a small squared error.

    Args:
        kernel: the kernel.
        transfer: the transformations; its slots are what is looked for.
        seed: meta filters start from filters drawn at random.
    """
    rng = np.random.default_rng(seed)
    filters = np.ascontiguousarray(kernel.reshape(-1, kernel.shape[-1]).T, np.float32)
    starts = int(np.clip(_WORK / (len(filters) * filters.size), _FEWEST_STARTS, _MOST_STARTS))
    found = [_from(filters, transfer, rng) for _ in range(starts)]
    return min(found, key=lambda assignment: assignment.error)


def _from(filters: np.ndarray, transfer: Transfer, rng: np.random.Generator) -> Assignment:
    moved = places(transfer)
    count, transformations = -(-len(filters) // len(moved)), len(moved)
    numbers = np.zeros((count, numbers_of(transfer)), np.float32)
    # Of a larger meta filter, the middle.
    numbers[:, moved[(transformations - 1) // 2]] = filters[rng.permutation(len(filters))[:count]]
    energy = float(np.square(filters, dtype=np.float64).sum())
    best = np.inf
    for _ in range(_ROUNDS):
        made = numbers[:, moved].reshape(count * transformations, -1)
        costs = np.square(made).sum(1) - 2 * filters @ made.T
        _, slots = linear_sum_assignment(costs)
        numbers = _means(filters, slots, moved, numbers.shape)
        chosen = numbers[slots[:, None] // transformations, moved[slots % transformations]]
        error = float(np.square(filters - chosen, dtype=np.float64).sum())
        if error >= best - 1e-6 * energy:
            break
        best = error
    return Assignment(replace(transfer, slots=tuple(map(int, slots))), numbers, error)


def _means(filters: np.ndarray, slots: np.ndarray, moved: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return for each number the mean of the weights that are to hold it; zero where there are none."""
    sums, members = np.zeros(shape), np.zeros(shape)
    meta, transformation = np.divmod(slots, len(moved))
    for index, place in enumerate(moved):
        # A meta filter is transformed in one way once: no number is met twice here.
        own = transformation == index
        sums[meta[own, None], place] += filters[own]
        members[meta[own, None], place] += 1
    return np.asarray(sums / np.maximum(members, 1), np.float32)
