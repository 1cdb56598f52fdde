"""What is expected of settings that were not tried: a Gaussian process through the outcomes of those that were."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit
from scipy.stats import norm

_LENGTHS = (0.03, 100.0)
_LENGTH_DEVIATION = math.sqrt(3.0)
_SCALE, _SCALE_DEVIATION = 1.0, 2.0
_NOISE, _NOISE_DEVIATION = 1e-3, 2.0
_SMOOTHNESS = (0.5, 1.5, 2.5)
"""Of which the likeliest is taken: accuracies fall off cliffs, bytes do not."""
_ROOM = 0.02
"""Beyond the worst and the best outcome seen, as a share of what lies between them."""
NODES = np.linspace(-4.0, 4.0, 33)
WEIGHTS = norm.pdf(NODES) / norm.pdf(NODES).sum()
"""Of a standard normal distribution: what is expected of a function of it is the weighted sum over the nodes."""


class Scale(Protocol):
    """How outcomes are looked at."""

    def to(self, outcome: np.ndarray) -> np.ndarray:
        """Return outcomes on the scale."""
        ...

    def back(self, places: np.ndarray) -> np.ndarray:
        """Return the outcomes at places of the scale."""
        ...


class Open:
    """As they are: costs may become smaller than any seen."""

    def __init__(self, outcome: np.ndarray) -> None:
        pass

    def to(self, outcome: np.ndarray) -> np.ndarray:
        """Return outcomes on the scale."""
        return outcome

    def back(self, places: np.ndarray) -> np.ndarray:
        """Return the outcomes at places of the scale."""
        return places


class Ended:
    """As logits of the place between the worst and the best seen, with a little room on both sides.

    Accuracies come to an end: of compressed networks, most are near that of the original or near chance. Doubt is small
    there and large in between, where otherwise it would be the same everywhere. More than a little beyond the best seen
    is not hoped for: the first trials should hold a network that has hardly lost anything.
    """

    def __init__(self, outcome: np.ndarray) -> None:
        room = _ROOM * max(float(np.ptp(outcome)), 1e-6 * float(np.abs(outcome).max()), 1e-12)
        self._low, self._high = float(outcome.min()) - room, float(outcome.max()) + room

    def to(self, outcome: np.ndarray) -> np.ndarray:
        """Return outcomes on the scale."""
        return np.asarray(logit((outcome - self._low) / (self._high - self._low)))

    def back(self, places: np.ndarray) -> np.ndarray:
        """Return the outcomes at places of the scale."""
        return np.asarray(self._low + (self._high - self._low) * expit(places))


class Surrogate:
    """A Gaussian process with a length for each column, and noise of its own.

    Its lengths are the likeliest under a prior that expects them long, the longer the more columns there are: ten
    outcomes fit any lengths of twenty columns, and the likelihood alone takes the wildest of them.

    Source: Hvarfner et al., Vanilla Bayesian optimization performs great in high dimensions (ICML 2024), section 5.

    Args:
        features: what was tried, [trials, columns], each within [0, 1].
        outcome: what came out, [trials].
        scale: how outcomes are looked at.
    """

    def __init__(self, features: np.ndarray, outcome: np.ndarray, scale: Callable[[np.ndarray], Scale] = Open) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

        self._scale = scale(outcome)
        outcome = self._scale.to(outcome)
        columns = features.shape[1]
        likely = math.sqrt(2.0) + 0.5 * math.log(columns)
        # In the order of the kernel's settings, which are logarithms.
        mean = np.array([math.log(_SCALE), *[likely] * columns, math.log(_NOISE)])
        deviation = np.array([_SCALE_DEVIATION, *[_LENGTH_DEVIATION] * columns, _NOISE_DEVIATION])
        likeliest = _likeliest(mean, deviation)

        def fitted(smoothness: float) -> Any:
            lengths = Matern(np.full(columns, math.exp(likely)), _LENGTHS, nu=smoothness)
            kernel = ConstantKernel(_SCALE, (1e-3, 1e3)) * lengths + WhiteKernel(_NOISE, (1e-7, 1e-1))
            process = GaussianProcessRegressor(kernel, normalize_y=True, optimizer=likeliest)
            with warnings.catch_warnings():
                # A length at its bound is a column that does not matter.
                warnings.simplefilter("ignore", ConvergenceWarning)
                return process.fit(features, outcome)

        self._process = max(map(fitted, _SMOOTHNESS), key=lambda process: process.log_marginal_likelihood_value_)
        self._noise = math.exp(self._process.kernel_.theta[-1]) * float(np.std(outcome)) ** 2

    def expect(self, features: np.ndarray) -> np.ndarray:
        """Return what settings [n, columns] may come to at the ``NODES``, without noise of measuring: [n, nodes]."""
        mean, deviation = self._process.predict(features, return_std=True)
        deviation = np.sqrt(np.maximum(deviation**2 - self._noise, 0.0))
        return self._scale.back(mean[:, None] + deviation[:, None] * NODES)


def _likeliest(mean: np.ndarray, deviation: np.ndarray) -> Callable[..., tuple[np.ndarray, float]]:
    """Return an optimiser, as scikit-learn takes one, of likelihood times a normal prior of the logarithms."""

    def optimiser(objective: Any, start: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, float]:
        def loss(place: np.ndarray) -> tuple[float, np.ndarray]:
            value, slope = objective(place, eval_gradient=True)
            away = (place - mean) / deviation
            return value + 0.5 * float(away @ away), slope + away / deviation

        found = minimize(loss, start, jac=True, bounds=bounds, method="L-BFGS-B")
        return found.x, float(found.fun)

    return optimiser
