"""Products of two matrices: the singular value decomposition, of large matrices by way of their Gram matrix.

Source: Halko, Martinsson and Tropp, Finding Structure with Randomness (arXiv 0909.4061); scikit-learn's implementation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh
from scipy.linalg.blas import ssyrk
from sklearn.utils.extmath import randomized_svd

from compress.strategies.lowrank.form import Spectrum

_LARGE = 1536
"""Matrices with both sides at least this long are large, if only a part of the rank is asked for."""
_HALF, _LITTLE = 0.5, 0.3
"""Up to these parts of the rank the Gram matrix is decomposed, and looked for in a random subspace of it."""
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
    if shortest >= _LARGE and most <= _HALF * shortest:
        return _large(matrix.astype(np.float32), most)
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    root = np.sqrt(values[:most])
    spectrum = Spectrum(values[:most], (matrix.shape[0], matrix.shape[1]), float(np.sum(values**2)))
    return Product(left[:, :most] * root, root[:, None] * right[:most], spectrum)


def _large(matrix: np.ndarray, most: int) -> Product:
    """Look for the leading subspace in the smaller Gram matrix, where each pass costs little.

    The Gram matrix squares the values, and rounding hides the small ones; only the large ones are of interest. The
    matrix is projected on the subspace found, so that no error of the values enters the product.
    """
    if matrix.shape[0] < matrix.shape[1]:
        turned = _large(matrix.T, most)
        shape = (turned.spectrum.shape[1], turned.spectrum.shape[0])
        return Product(turned.right.T, turned.left.T, Spectrum(turned.spectrum.values, shape, turned.spectrum.energy))
    gram = ssyrk(1.0, matrix.T)
    gram += np.triu(gram, 1).T
    if most > _LITTLE * len(gram):
        basis = eigh(gram, driver="evd")[1][:, -most:]
    else:
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
