"""The expected hypervolume improvement of outcomes of which no more is known than how they are distributed."""

from __future__ import annotations

import numpy as np

_CELLS = 200_000
"""Cells of the grid, at most: with many objectives, a part of the front stands for it."""


def expected_improvement(
    front: np.ndarray, reference: np.ndarray, outcomes: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Return by how much each outcome is expected to raise the hypervolume, [outcomes]; all objectives are minimised.

    The values of the front divide space into a grid of cells. What an outcome adds is the part of the cells that
    nothing dominates which lies above it, and the expectation of that part is a product over the objectives, as these
    are independent. Source: Yang et al., Efficient computation of expected hypervolume improvement using box
    decomposition algorithms (arXiv 1904.12672), section 3, with all cells of the grid as boxes.

    Args:
        front: non-dominated points, [n, objectives].
        reference: where the hypervolume is counted from, [objectives].
        outcomes: what each may come to, [outcomes, objectives, nodes], independently for the objectives.
        weights: how likely each node is, [nodes].
    """
    count = len(reference)
    inside = front[(front < reference).all(axis=1)]
    most = max(int(_CELLS ** (1 / count)) - 1, 1)
    if len(inside) > most:
        order = np.argsort(inside[:, 0], kind="stable")
        inside = inside[order[np.linspace(0, len(order) - 1, most).round().astype(int)]]
    lower, parts = [], []
    for number in range(count):
        ends = np.append(np.unique(inside[:, number]), reference[number])
        lower.append(np.concatenate([[-np.inf], ends[:-1]]))
        # How far an outcome is expected to lie below each end of a cell.
        below = sum(
            weight * np.maximum(ends - outcomes[:, number, node, None], 0.0) for node, weight in enumerate(weights)
        )
        parts.append(np.diff(below, axis=1, prepend=0.0))
    corners = np.stack(np.meshgrid(*lower, indexing="ij"), axis=-1)
    free = np.ones(corners.shape[:-1], bool)
    for point in inside:
        free &= ~(point <= corners).all(axis=-1)
    # One objective after the other is summed over its cells: [outcomes, cells of the others].
    left = np.tensordot(parts[0], free.astype(float), axes=(1, 0))
    for part in parts[1:]:
        left = np.einsum("oc,oc...->o...", part, left)
    return np.asarray(left)
