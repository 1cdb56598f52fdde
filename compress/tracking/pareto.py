"""The Pareto front: runs that no other run beats in both objectives."""

from __future__ import annotations

import numpy as np


def non_dominated(gains: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Return a mask of the points that no other point dominates.

    A point dominates another if it is at least as good in both objectives and better in one. Equal points
    are all kept. Points with NaN are never on the front.

    Args:
        gains: what should be large, shape [n].
        costs: what should be small, shape [n].
    """
    gains, costs = np.asarray(gains, float), np.asarray(costs, float)
    valid = ~(np.isnan(gains) | np.isnan(costs))
    no_worse = (gains[:, None] >= gains) & (costs[:, None] <= costs)
    better = (gains[:, None] > gains) | (costs[:, None] < costs)
    dominated = (no_worse & better & valid[:, None]).any(axis=0)
    mask: np.ndarray = valid & ~dominated
    return mask
