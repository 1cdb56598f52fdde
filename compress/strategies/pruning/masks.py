"""Masks of single weights: which weights stay, given a score for each. Pure NumPy.

A mask is made of three independent choices: the scores, the pattern (what goes together), and the ranking (what is
compared with what). A score of minus infinity says that the weight is gone already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from compress.graph.kernels import Kernel
from compress.words import counted

GONE = -np.inf
_BEST_OF_OUTPUT, _OF_PATTERN, _BEST_OF_KERNEL = 1, 2, 3
"""Ranks of units: a lower one goes first, whatever the scores; all others have rank 0."""


@dataclass(frozen=True)
class Axes:
    """Which axes of a kernel are input channels and outputs; ``sums``: an output sums over the input channels."""

    inputs: int
    outputs: tuple[int, ...]
    sums: bool = True

    @classmethod
    def of(cls, kernel: Kernel) -> Axes:
        """Return the axes of ``kernel``, counted from the last."""
        depthwise = kernel.attribute == "depthwise_kernel"
        inputs = -1 if kernel.output_axes == (-2,) else -2
        return cls(inputs, kernel.output_axes, sums=not depthwise)


class Pattern:
    """Which weights go together, or may go at all: here, each weight for itself."""

    def unsuited(self, shape: Sequence[int], axes: Axes) -> str | None:
        """Say why kernels of this shape cannot have the pattern; None if they can."""
        return None

    def pool(self, scores: np.ndarray, axes: Axes) -> np.ndarray:
        """Return one score for each unit that goes as a whole; the axes stay."""
        return scores

    def spread(self, units: np.ndarray, axes: Axes) -> np.ndarray:
        """Return for each weight what ``units`` says about its unit: the inverse of :meth:`pool`."""
        return units

    def stays(self, units: np.ndarray, axes: Axes) -> np.ndarray:
        """Return the units that must stay, given their scores."""
        return np.zeros(units.shape, bool)


@dataclass(frozen=True)
class KeptOfEach(Pattern):
    """N:M: of every ``group`` consecutive weights along the inputs, ``kept`` stay (Mishra et al., arXiv 2104.08378).

    On the way there, the weights that will have to go do so in the order of their scores.
    """

    kept: int
    group: int

    @property
    def sparsity(self) -> float:
        """Share of the weights that goes."""
        return 1.0 - self.kept / self.group

    def unsuited(self, shape: Sequence[int], axes: Axes) -> str | None:
        """Kernels of single channels, and input channels that do not divide."""
        if not axes.sums:
            return f"each output reads one channel, {self.kept}:{self.group} goes along input channels"
        if shape[axes.inputs] % self.group:
            channels = counted(shape[axes.inputs], "input channel is", "input channels are")
            return f"its {channels} no multiple of {self.group}"
        return None

    def stays(self, units: np.ndarray, axes: Axes) -> np.ndarray:
        """The ``kept`` best of each group."""
        moved = np.moveaxis(units, axes.inputs, -1)
        groups = moved.reshape(*moved.shape[:-1], -1, self.group)
        rank = np.argsort(np.argsort(groups, axis=-1, kind="stable"), axis=-1)
        return np.moveaxis((rank >= self.group - self.kept).reshape(moved.shape), -1, axes.inputs)


@dataclass(frozen=True)
class Blocks(Pattern):
    """Blocks of ``inputs`` x ``outputs`` channels at one position of the kernel: a block's score is the sum."""

    inputs: int
    outputs: int

    def unsuited(self, shape: Sequence[int], axes: Axes) -> str | None:
        """Kernels of single channels, and channels that do not divide."""
        if not axes.sums:
            return "each output reads one channel, blocks span input channels"
        for axis, size, what in ((axes.inputs, self.inputs, "input"), (axes.outputs[0], self.outputs, "output")):
            if shape[axis] % size:
                return f"its {counted(shape[axis], f'{what} channel is', f'{what} channels are')} no multiple of {size}"
        return None

    def pool(self, scores: np.ndarray, axes: Axes) -> np.ndarray:
        """Sums over the blocks; a block is gone when all of it is."""
        gone = np.isneginf(scores)
        return np.where(self._sums(~gone, axes) == 0, GONE, self._sums(np.where(gone, 0.0, scores), axes))

    def spread(self, units: np.ndarray, axes: Axes) -> np.ndarray:
        """Repeat."""
        return np.repeat(np.repeat(units, self.inputs, axes.inputs), self.outputs, axes.outputs[0])

    def _sums(self, values: np.ndarray, axes: Axes) -> np.ndarray:
        for axis, size in ((axes.inputs, self.inputs), (axes.outputs[0], self.outputs)):
            values = np.add.reduceat(values, np.arange(0, values.shape[axis], size), axis=axis, dtype=np.float64)
        return values


@dataclass(frozen=True)
class Masking:
    """From scores to masks, for several kernels at once.

    Attributes:
        axes: of each kernel.
        pattern: what goes together.
        ranking: ``layer`` takes the same share of every kernel; ``global`` compares all kernels with each other, and
            leaves every output of every kernel its best unit, if the share leaves so many.
        costs: of one weight of each kernel; with unequal ones the share of ``global`` is one of costs.
    """

    axes: Sequence[Axes]
    pattern: Pattern
    ranking: Literal["layer", "global"]
    costs: Sequence[float]

    def masks(self, scores: Sequence[np.ndarray], share: float) -> list[np.ndarray]:
        """Return a mask for each kernel, false where the lowest ``share`` of the units is; exact to one unit.

        At least one unit of every kernel stays.
        """
        units = [self.pattern.pool(score, axes) for score, axes in zip(scores, self.axes, strict=True)]
        ranks = [self._ranks(unit, axes) for unit, axes in zip(units, self.axes, strict=True)]
        if self.ranking == "layer":
            kept = [
                ~_lowest(unit.ravel(), rank.ravel(), min(round(share * unit.size), unit.size - 1))
                for unit, rank in zip(units, ranks, strict=True)
            ]
        else:
            kept = self._global(units, ranks, share)
        return [
            self.pattern.spread(mask.reshape(unit.shape), axes)
            for mask, unit, axes in zip(kept, units, self.axes, strict=True)
        ]

    def _ranks(self, units: np.ndarray, axes: Axes) -> np.ndarray:
        ranks = np.where(self.pattern.stays(units, axes), _OF_PATTERN, 0)
        if self.ranking == "global":
            last = tuple(range(-len(axes.outputs), 0))
            moved = np.moveaxis(units, axes.outputs, last)
            flat = moved.reshape(-1, int(np.prod(moved.shape[moved.ndim - len(axes.outputs) :])))
            best = np.zeros(flat.shape, bool)
            best[flat.argmax(0), np.arange(flat.shape[1])] = True
            best &= flat > GONE
            ranks = np.maximum(ranks, np.moveaxis(best.reshape(moved.shape), last, axes.outputs) * _BEST_OF_OUTPUT)
            top = np.flatnonzero(ranks == ranks.max())
            ranks.flat[top[units.flat[top].argmax()]] = _BEST_OF_KERNEL
        return ranks

    def _global(self, units: Sequence[np.ndarray], ranks: Sequence[np.ndarray], share: float) -> list[np.ndarray]:
        scores, order = (np.concatenate([part.ravel() for part in parts]) for parts in (units, ranks))
        costs = np.concatenate([np.full(unit.size, cost) for unit, cost in zip(units, self.costs, strict=True)])
        most = scores.size - len(units)
        gone = _cheapest(scores, order, costs, share, most)
        if gone[order == _BEST_OF_OUTPUT].any():
            # Too few are left for all outputs: the scores decide which ones lose everything.
            order[order == _BEST_OF_OUTPUT] = 0
            gone = _cheapest(scores, order, costs, share, most)
        return np.split(~gone, np.cumsum([unit.size for unit in units])[:-1])


def _cheapest(scores: np.ndarray, ranks: np.ndarray, costs: np.ndarray, share: float, most: int) -> np.ndarray:
    """Return which of the scores [n] go, at most ``most``, so that ``share`` of all costs does."""
    if costs.min() == costs.max():
        return _lowest(scores, ranks, min(round(share * scores.size), most))
    first = np.lexsort((scores, ranks))
    spent = np.cumsum(costs[first])
    # The one that reaches the budget goes, too.
    count = int(np.searchsorted(spent, share * spent[-1] * (1 - 1e-9))) + 1 if share > 0 else 0
    gone = np.zeros(scores.size, bool)
    gone[first[: min(count, most)]] = True
    return gone


def _lowest(scores: np.ndarray, ranks: np.ndarray, count: int) -> np.ndarray:
    """Return which ``count`` of the scores [n] are the lowest, those of a lower rank before all others."""
    result = np.zeros(scores.size, bool)
    # Rank by rank, as a partition takes a small part of the time of a sort.
    for rank in np.unique(ranks):
        members = np.flatnonzero(ranks == rank)
        take = min(count, members.size)
        if take > 0:
            result[members[np.argpartition(scores[members], take - 1)[:take]]] = True
        count -= take
    return result
