"""Products of two matrices: the singular value decomposition, of large matrices by way of a random subspace.

Source: Halko, Martinsson and Tropp, Finding Structure with Randomness (arXiv 0909.4061); scikit-learn's implementation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg.blas import ssyrk
from sklearn.utils.extmath import randomized_svd

from compress.strategies.lowrank.form import Spectrum

_LARGE = 1536
"""Matrices with both sides at least this long are large, if only a part of the rank is asked for."""
_PART = 0.4
_ITERATIONS = 3
_OVERSAMPLING = 16


@dataclass(frozen=True)
class Product:
    """A matrix [rows, columns] as a product of two: the best one at every rank up to some highest."""

    left: np.ndarray
    """[rows, highest]; each half carries the square root of the singular values."""
    right: np.ndarray
    spectrum: Spectrum

    @property
    def errors(self) -> np.ndarray:
        """Relative squared error at rank 1, 2, ..."""
        kept = np.cumsum(self.spectrum.values**2)
        return np.maximum(1.0 - kept / self.spectrum.energy, 0.0) if self.spectrum.energy > 0 else np.zeros_like(kept)


def product(matrix: np.ndarray, most: int) -> Product:
    """Return the best products at ranks up to ``most``; of a large matrix up to a small part of its rank, nearly."""
    shortest = min(matrix.shape)
    most = min(most, shortest)
    if shortest >= _LARGE and most <= _PART * shortest:
        return _large(matrix.astype(np.float32), most)
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    root = np.sqrt(values[:most])
    spectrum = Spectrum(values[:most], (matrix.shape[0], matrix.shape[1]), float(np.sum(values**2)))
    return Product(left[:, :most] * root, root[:, None] * right[:most], spectrum)


def _large(matrix: np.ndarray, most: int) -> Product:
    """Look for the subspace in the smaller Gram matrix, where each pass costs little; it squares what is looked for.

    Only the leading part is of interest, so that rounding does not matter; the product is exact on the subspace found.
    """
    if matrix.shape[0] < matrix.shape[1]:
        turned = _large(matrix.T, most)
        shape = (turned.spectrum.shape[1], turned.spectrum.shape[0])
        return Product(turned.right.T, turned.left.T, Spectrum(turned.spectrum.values, shape, turned.spectrum.energy))
    gram = ssyrk(1.0, matrix.T)
    gram += np.triu(gram, 1).T
    basis, _, _ = randomized_svd(
        gram,
        most,
        n_oversamples=_OVERSAMPLING,
        n_iter=_ITERATIONS,
        power_iteration_normalizer="QR",
        random_state=0,
    )
    image = matrix @ basis
    norms = np.maximum(np.linalg.norm(image, axis=0), np.finfo(np.float32).tiny)
    order = np.argsort(-norms)
    root = np.sqrt(norms[order])
    spectrum = Spectrum(
        norms[order].astype(np.float64), (matrix.shape[0], matrix.shape[1]), float(np.trace(gram, dtype=np.float64))
    )
    return Product(image[:, order] / root, root[:, None] * basis.T[order], spectrum)
