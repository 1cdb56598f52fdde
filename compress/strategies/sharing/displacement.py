"""Matrices of low displacement rank: sums of products of a circulant and a skew-circulant matrix.

Sources: Sindhwani, Sainath, Kumar: Structured Transforms for Small-Footprint Deep Learning (arXiv 1510.01722); Thomas
et al., Learning Compressed Transforms with Low Displacement Rank (arXiv 1810.02309).

``Z_f(v)`` is the matrix with ``Z_f(v)[i, j] = v[i - j]`` for i >= j, and ``f v[n + i - j]`` above the diagonal:
circulant for f = 1, skew-circulant for f = -1. A sum of r products ``Z_1(g) Z_-1(h)`` is of displacement rank r.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_TURNS = 200
_NO_PROGRESS = 1e-5
_RIDGE = 1e-9


@dataclass(frozen=True)
class Pairs:
    """The vectors of a matrix of low displacement rank: ``circulant`` and ``skew``, both [n, rank]."""

    circulant: np.ndarray
    skew: np.ndarray

    def matrix(self) -> np.ndarray:
        """Return the matrix [n, n]."""
        size = len(self.circulant)
        places = np.subtract.outer(np.arange(size), np.arange(size))
        sign = np.where(places < 0, -1.0, 1.0)
        return np.einsum("ijr,jkr->ik", self.circulant[places], sign[..., None] * self.skew[places], optimize=True)


def nearest_pairs(matrix: np.ndarray, rank: int) -> Pairs:
    """Return the pairs of a matrix near to a square one, by alternating least squares.

    Fourier transforms make diagonals of all factors. What is left is an approximation by a matrix of that rank, whose
    entries are weighed: it is solved for one side and the other in turn, each exactly, and so never gets worse. It
    starts at the singular vectors of the displacement ``Z_1 matrix - matrix Z_-1``, which make the matrix itself if
    there are as many as that has.
    """
    size = len(matrix)
    turned = np.exp(-1j * np.pi * np.arange(size) / size)
    # Z_1(g) = F^-1 diag(F g) F, and Z_-1(h) = D^-1 F^-1 diag(F D h) F D for the Fourier matrix F, and D = diag(turned).
    target = np.fft.ifft(np.fft.fft(matrix / turned, axis=0), axis=1)
    middle = np.fft.ifft(np.fft.fft(np.diag(1 / turned), axis=0), axis=1)
    weights, wanted = np.abs(middle) ** 2, middle.conj() * target
    left, right = _start(matrix, rank, turned)
    error = np.inf
    for _ in range(_TURNS):
        left = _solve(weights, wanted, right)
        right = _solve(weights.T, wanted.T, left)
        last, error = error, float((np.abs(target - middle * (left @ right.T)) ** 2).sum())
        if error >= (1 - _NO_PROGRESS) * last:
            break
    circulant = np.fft.ifft(left, axis=0).real
    skew = (np.fft.ifft(right, axis=0) / turned[:, None]).real
    # Both factors of a pair alike in size, so that training moves both.
    balance = np.sqrt(np.linalg.norm(skew, axis=0) / np.maximum(np.linalg.norm(circulant, axis=0), 1e-30))
    return Pairs(circulant * balance, skew / np.maximum(balance, 1e-30))


def _start(matrix: np.ndarray, rank: int, turned: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return transformed pairs [n, rank] of complex numbers, out of the displacement's singular vectors."""
    displacement = np.roll(matrix, 1, axis=0) - np.concatenate([matrix[:, 1:], -matrix[:, :1]], 1)
    vectors, values, others = np.linalg.svd(displacement)
    root = np.sqrt(values[:rank])
    # matrix = 1/2 sum of Z_1(g) Z_-1(J h) over the displacement's parts g h^T, J turning a vector round.
    skew = others[:rank].T[::-1] * root / 2
    return np.fft.fft(vectors[:, :rank] * root, axis=0), np.fft.fft(turned[:, None] * skew, axis=0)


def _solve(weights: np.ndarray, wanted: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """Return one side of the product [rows, rank]: each row has a least-squares problem of its own.

    Args:
        weights: how much each entry counts [rows, columns].
        wanted: the entries times what they are compared with, conjugated [rows, columns].
        fixed: the other side [columns, rank].
    """
    rank = fixed.shape[1]
    products = np.einsum("lr,ls->lrs", fixed.conj(), fixed).reshape(len(fixed), -1)
    grams = (weights @ products).reshape(-1, rank, rank)
    ridge = _RIDGE * np.maximum(np.trace(grams, axis1=1, axis2=2).real / rank, 1e-30)
    grams = grams + ridge[:, None, None] * np.eye(rank)
    return np.linalg.solve(grams, (wanted @ fixed.conj())[..., None])[..., 0]
