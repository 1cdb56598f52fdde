"""Finds the profile of a processor under which the roofline's estimates come nearest to measured latencies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import least_squares

from compress.boards.roofline import Roofline, Work
from compress.errors import CompressError

START = {"peak": 1e10, "depthwise": 0.3, "bandwidth": 1e10, "overhead_us": 1.0}
"""Where the search starts, and what is kept of a number that the files say nothing about."""
LEAST_FILES = 4
_PULL = 0.03
"""How much a factor of e away from the start weighs, against an estimate that is wrong by a factor of e."""


def fit_profile(works: Sequence[Work], latencies_ms: Sequence[float], fitted_to: str = "") -> Roofline:
    """Return the profile with the least squared logarithms of estimate over measurement.

    Args:
        works: of each file.
        latencies_ms: measured median of each file, above zero.
        fitted_to: what they were measured on, in words.

    Raises:
        CompressError: if there are too few files.
    """
    if len(works) < LEAST_FILES:
        raise CompressError(
            "the fit of a profile",
            expected=f"at least {LEAST_FILES} files with measured latencies",
            received=str(len(works)),
            fix="Name more files, of different sizes and types.",
        )
    kinds = sorted({str(kind) for work in works for kind in np.unique(work.types[work.macs > 0])})
    start = np.log([START["peak"]] * len(kinds) + [START["depthwise"], START["bandwidth"], START["overhead_us"]])
    measured = np.log(np.asarray(latencies_ms, float))

    def profile(logarithms: np.ndarray) -> Roofline:
        *peaks, depthwise, bandwidth, overhead = map(float, np.exp(logarithms))
        return Roofline(
            peaks=dict(zip(kinds, peaks, strict=True)),
            depthwise=min(depthwise, 1.0),
            bandwidth=bandwidth,
            overhead_us=overhead,
            fitted_to=fitted_to,
        )

    def wrong(logarithms: np.ndarray) -> np.ndarray:
        board = profile(logarithms)
        estimates = np.log([board.times(work).sum() for work in works])
        return np.concatenate([estimates - measured, _PULL * (logarithms - start)])

    top = np.log([1e16] * len(kinds) + [1.0, 1e16, 1e8])
    # The larger of two times has corners; single files must not decide (soft_l1).
    solved = least_squares(wrong, start, bounds=(np.full(len(start), -20.0), top), loss="soft_l1", f_scale=0.3)
    return profile(solved.x)
