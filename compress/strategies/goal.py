"""What a factorized or compact kernel should be like: the outputs that it gives, errors weighted by what they mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from compress.strategies.least_squares import Moments
from compress.strategies.repair import RIDGE

_STEPS = 12
FLOOR = 1e-6
"""Part of the largest eigenvalue, or of the mean square, below which a direction counts as this small."""


@dataclass(frozen=True)
class Goal:
    """The kernel that a product should be like, and how much its errors matter.

    ``inputs`` [d, d] are second moments of what the kernel [..., outputs] multiplies (d: all its other axes), and
    ``metric`` [outputs, outputs] says what errors of the outputs mean together; None: every error the same.
    """

    kernel: np.ndarray
    inputs: np.ndarray | None = None
    metric: np.ndarray | None = None

    @classmethod
    def of(
        cls, known: Moments, matrix: np.ndarray, strength: float, shape: Sequence[int], metric: np.ndarray | None
    ) -> Goal:
        """Return the goal of a layer with a solved ``matrix`` [d + 1, outputs]; its bias will make up for the mean."""
        mean = known.inputs[:-1, -1:]
        centred = known.inputs[:-1, :-1] - mean @ mean.T / known.inputs[-1, -1]
        centred[np.diag_indices_from(centred)] += strength
        return cls(matrix[:-1].reshape(shape), centred, metric)

    @property
    def energy(self) -> float:
        """What a kernel of zeros would miss."""
        return self.error(np.zeros_like(self.kernel))

    def error(self, kernel: np.ndarray) -> float:
        """Return the squared error of the outputs, weighted."""
        missing = self.kernel - kernel
        return float(max(np.sum(missing * self.weighted(missing)), 0.0))

    def weighted(self, kernel: np.ndarray) -> np.ndarray:
        """Return half the gradient of a kernel's squared outputs."""
        matrix = kernel.reshape(-1, kernel.shape[-1])
        if self.inputs is not None:
            matrix = self.inputs @ matrix
        if self.metric is not None:
            matrix = matrix @ self.metric
        return matrix.reshape(kernel.shape)


def goal_of(known: Moments, matrix: np.ndarray, shape: Sequence[int], metric: np.ndarray | None) -> Goal:
    """Return the goal of a layer whose best matrix [d + 1, outputs], by least squares with this ridge, is known."""
    strength = RIDGE * max(float(np.mean(np.diag(known.inputs)[:-1])), 1e-12)
    return Goal.of(known, matrix, strength, shape, metric)


def matrix_with(known: Moments | None, wanted: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Return kernel and bias [d + 1, outputs], the bias such that the outputs have the mean of those wanted."""
    flat = kernel.reshape(-1, kernel.shape[-1])
    if known is None:
        return np.concatenate([flat, wanted[-1:]])
    mean = known.inputs[-1, :-1] / known.inputs[-1, -1]
    return np.concatenate([flat, wanted[-1:] + mean[None] @ (wanted[:-1] - flat)])


def conjugate_gradients(
    operator: Callable[[np.ndarray], np.ndarray],
    residual: np.ndarray,
    start: np.ndarray,
    conditioned: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Return the solution after a few steps; ``residual`` is that of ``start``."""
    x, direction = start, conditioned(residual)
    size = float(np.sum(residual * direction))
    for _ in range(_STEPS):
        image = operator(direction)
        curvature = float(np.sum(direction * image))
        if curvature <= 0 or size <= 0:
            break
        x = x + size / curvature * direction
        residual = residual - size / curvature * image
        turned = conditioned(residual)
        size, before = float(np.sum(residual * turned)), size
        direction = turned + size / before * direction
    return x


def roots(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the symmetric root of a positive matrix and its inverse; what is nearly zero counts as small."""
    values, vectors = np.linalg.eigh(matrix)
    values = np.maximum(values, FLOOR * max(float(values[-1]), 1e-30))
    root = np.sqrt(values)
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
