"""Kernels that are products of two factors, nearest to a goal: one is solved for, then the other, and again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compress.strategies.goal import FLOOR, Goal, conjugate_gradients


def solved_last(goal: Goal, before: np.ndarray, blocks: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return the last factor [q, filters] that is best behind the first.

    Args:
        goal: the kernel to come near to, [..., filters].
        before: what the first factor makes of each input, [d, q].
        blocks: filters, and which of the q channels they read; the others are zero.
    """
    weighted = before if goal.inputs is None else goal.inputs @ before
    gram, cross = weighted.T @ before, weighted.T @ goal.kernel.reshape(len(before), -1)
    gram[np.diag_indices_from(gram)] += FLOOR * max(float(np.trace(gram)) / len(gram), 1e-30)
    found = np.zeros_like(cross)
    for filters, read in blocks:
        found[np.ix_(read, filters)] = np.linalg.solve(gram[np.ix_(read, read)], cross[np.ix_(read, filters)])
    return found


def descended_first(formula: str, goal: Goal, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return the first factor of a product by ``einsum`` after a few steps towards the best, the last held."""
    terms, letters = formula.split("->")
    one, other = terms.split(",")

    def kernel_of(factor: np.ndarray) -> np.ndarray:
        return np.einsum(formula, factor, last, optimize=True)

    def gradient(kernel: np.ndarray) -> np.ndarray:
        return np.einsum(f"{other},{letters}->{one}", last, goal.weighted(kernel), optimize=True)

    scale = np.ones(first.shape)
    if goal.inputs is not None:
        power = np.diag(goal.inputs).reshape(goal.kernel.shape[:-1])
        read = "".join(letter for letter in one if letter in letters)
        power = np.einsum(f"{letters[:-1]}->{read}", power)
        scale = scale / np.maximum(power, FLOOR * max(float(power.max()), 1e-30))[..., None]
    return conjugate_gradients(
        lambda x: gradient(kernel_of(x)), gradient(goal.kernel - kernel_of(first)), first, lambda x: x * scale
    )
