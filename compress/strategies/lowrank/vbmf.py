"""The rank of a matrix by variational Bayes: how many of its singular values stand out from noise.

Source: Nakajima, Sugiyama, Babacan and Tomioka, Global Analytic Solution of Fully-observed Variational Bayesian Matrix
Factorization (JMLR 14, 2013): theorem 2 for the threshold, corollary 1 for the noise.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq, minimize_scalar

from compress.strategies.lowrank.form import Spectrum


def vbmf_rank(spectrum: Spectrum) -> int:
    """Return the rank; the spectrum must be whole. 0: nothing stands out."""
    rows, columns = min(spectrum.shape), max(spectrum.shape)
    squares = spectrum.values[:rows] ** 2
    if not np.any(squares > 0):
        return 0
    ratio = rows / columns
    tau = brentq(lambda t: _phi(t) + _phi(t / ratio), 1e-6, 1e3)
    least = (1 + tau) * (1 + ratio / tau)

    def free_energy(variance: float) -> float:
        x = squares / (columns * variance)
        signal = np.where(x > least, x, least)
        shift = signal - (1 + ratio)
        t = (shift + np.sqrt(np.maximum(shift**2 - 4 * ratio, 0.0))) / 2
        gain = np.log(t + 1) + ratio * np.log(t / ratio + 1) - t
        return float(np.sum(x - np.log(np.maximum(x, 1e-300)) + np.where(x > least, gain, 0.0)))

    most = int(min(np.ceil(rows / (1 + ratio)) - 1, rows - 1))
    high = float(np.sum(squares) / (rows * columns))
    low = max(float(squares[most] / (columns * least)), float(np.mean(squares[most:]) / columns), 1e-12 * high)
    # The energy has several minima: the best of a grid, then nearer.
    grid = np.geomspace(low, max(high, low * (1 + 1e-9)), 64)
    place = int(np.argmin([free_energy(value) for value in grid]))
    bounds = (np.log(grid[max(place - 1, 0)]), np.log(grid[min(place + 1, len(grid) - 1)]))
    found = minimize_scalar(lambda v: free_energy(np.exp(v)), bounds=bounds, method="bounded")
    variance = min((float(np.exp(found.x)), float(grid[place])), key=free_energy)
    return int(np.sum(squares > columns * variance * least))


def _phi(z: float) -> float:
    return float(np.log(z + 1) / z - 0.5)
