"""What a search may set: numbers between two, or one of some values; and where in the unit interval a setting lies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Value = float | int | str


@dataclass(frozen=True)
class Interval:
    """Numbers between two; ``whole``: whole ones, ``log``: drawn evenly by their logarithm."""

    low: float
    high: float
    whole: bool = False
    step: float | None = None
    log: bool = False

    @property
    def _ends(self) -> tuple[float, float]:
        """Between what a number is drawn before it is rounded: a whole one as often at the ends as in between."""
        half = 0.5 * (self.step or 1) if self.whole else 0.0
        low, high = self.low - half, self.high + half
        return (math.log(low), math.log(high)) if self.log else (low, high)

    def _numbers(self, places: np.ndarray) -> np.ndarray:
        low, high = self._ends
        numbers = low + places * (high - low)
        numbers = np.exp(numbers) if self.log else numbers
        if self.step is not None or self.whole:
            step = self.step or 1
            numbers = self.low + step * np.round((numbers - self.low) / step)
        return np.clip(numbers, self.low, self.high)

    def _places(self, numbers: np.ndarray) -> np.ndarray:
        low, high = self._ends
        if high <= low:
            return np.full(len(numbers), 0.5)
        return np.clip(((np.log(numbers) if self.log else numbers) - low) / (high - low), 0.0, 1.0)

    def at(self, place: float) -> Value:
        """Return the number at a place in [0, 1]."""
        number = float(self._numbers(np.array([place]))[0])
        return round(number) if self.whole else number

    def place(self, value: Value) -> float:
        """Return where a number lies, in [0, 1]."""
        return float(self._places(np.array([float(value)]))[0])

    def features(self, places: np.ndarray) -> np.ndarray:
        """Return what a model sees of places [n]: the place of the number that is really taken, [n, 1]."""
        return self._places(self._numbers(np.asarray(places)))[:, None]


@dataclass(frozen=True)
class Choice:
    """One of some values, as the command line writes them."""

    values: tuple[str, ...]

    def at(self, place: float) -> Value:
        """Return the value at a place in [0, 1]."""
        return self.values[min(int(place * len(self.values)), len(self.values) - 1)]

    def place(self, value: Value) -> float:
        """Return where a value lies, in [0, 1]."""
        return (self.values.index(str(value)) + 0.5) / len(self.values)

    def features(self, places: np.ndarray) -> np.ndarray:
        """Return what a model sees of places [n]: one column for each value, [n, values]."""
        numbers = np.minimum((np.asarray(places) * len(self.values)).astype(int), len(self.values) - 1)
        return np.eye(len(self.values))[numbers]


Space = Mapping[str, Interval | Choice]
"""Key of the configuration -> what it may be."""
