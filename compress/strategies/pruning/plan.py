"""How many channels each group loses: all units in one order, and what is left after some of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import tf_keras

from compress.graph.channels.groups import Channels, Group
from compress.metrics.counts import count_macs, count_params
from compress.strategies.budget import Budget

Ranking = Literal["global", "layer"]


@dataclass(frozen=True)
class Size:
    """Multiply-adds and parameters of a whole model, and the channels of those of its groups that may go."""

    macs: float
    params: float
    groups: Mapping[str, int]
    """Name of a group -> its units."""

    @classmethod
    def of(cls, model: tf_keras.Model, groups: Iterable[Group] = ()) -> Size:
        """Count."""
        return cls(float(count_macs(model)), float(count_params(model)), {group.name: len(group) for group in groups})

    @property
    def channels(self) -> int:
        """How many channels may go."""
        return sum(self.groups.values())

    def channels_kept(self, channels: Channels, stay: np.ndarray) -> float:
        """Return the share of the channels that is left of these groups; one that is no more has none left."""
        left = sum(int(stay[group.units].sum()) for group in channels.groups if group.name in self.groups)
        return left / max(self.channels, 1)


class Plan:
    """The units of ``groups`` in the order of their ``scores``: the lowest goes first, infinity never.

    A group keeps at least its floor, and a multiple of ``round_to`` where it has that many.
    """

    def __init__(
        self,
        channels: Channels,
        groups: Sequence[Group],
        scores: Sequence[np.ndarray],
        floors: Sequence[int],
        round_to: int,
    ) -> None:
        self.channels, self.groups, self.scores, self.floors, self.round_to = channels, groups, scores, floors, round_to
        self._ranks = [np.argsort(np.argsort(score, kind="stable")) for score in scores]
        self._preference = np.zeros(channels.count)
        for group, score in zip(groups, scores, strict=True):
            self._preference[group.units] = score
        order = np.argsort(np.concatenate(scores), kind="stable")
        self._global = np.empty_like(order)
        self._global[order] = np.arange(order.size)
        self._places = int(np.isfinite(np.concatenate(scores)).sum())
        whole = Size.of(channels.model)
        known = channels.costs(np.ones(channels.count, bool))
        self._outside = (whole.macs - known[0], whole.params - known[1])

    @property
    def unscored(self) -> list[Group]:
        """The groups that nothing may leave, as their criterion says nothing of them."""
        return [g for g, score in zip(self.groups, self.scores, strict=True) if not np.isfinite(score).any()]

    def meet(self, budget: Budget, start: Size, ranking: Ranking) -> np.ndarray:
        """Return which units stay [count]: as many as the budget allows, or as few as may be if it is out of reach."""
        by = self._by_rank if ranking == "global" else self._by_share
        if self.cost(by(0), budget.unit, start) <= budget.keep + 1e-9:
            return by(0)
        low, high = 0, self._places if ranking == "global" else 1000
        while high - low > 1:
            middle = (low + high) // 2
            if self.cost(by(middle), budget.unit, start) <= budget.keep + 1e-9:
                high = middle
            else:
                low = middle
        if ranking == "global" and self.round_to > 1 and self.cost(by(high), budget.unit, start) <= budget.keep + 1e-9:
            return self._spend(self._left(self._gone(high)), budget, start)
        return by(high)

    def keep(self, counts: Sequence[int]) -> np.ndarray:
        """Return which units stay when each group keeps so many, the highest scores."""
        return self._stay(self._left([len(group) - c for group, c in zip(self.groups, counts, strict=True)]))

    def below(self, threshold: float) -> np.ndarray:
        """Return what stays when all scores below the threshold go, as far as each group may be cut."""
        return self._by_rank(int((np.concatenate(self.scores) < threshold).sum()))

    def cost(self, stay: np.ndarray, unit: str, start: Size) -> float:
        """Return the share of ``start`` that is left."""
        if unit == "channels":
            return start.channels_kept(self.channels, stay)
        macs, params = self.channels.costs(stay)
        if unit == "macs":
            return (macs + self._outside[0]) / start.macs
        return (params + self._outside[1]) / start.params

    def _by_rank(self, count: int) -> np.ndarray:
        """Return what stays when the ``count`` lowest scores go, as far as each group may be cut."""
        return self._stay(self._left(self._gone(count)))

    def _gone(self, count: int) -> list[int]:
        gone = np.split(self._global < count, np.cumsum([len(group) for group in self.groups])[:-1])
        return [int(g.sum()) for g in gone]

    def _by_share(self, thousandths: int) -> np.ndarray:
        """Return what stays when this share of every group goes."""
        return self._stay(self._left([int(thousandths / 1000 * len(group)) for group in self.groups]))

    def _spend(self, left: list[int], budget: Budget, start: Size) -> np.ndarray:
        """Return what stays when rounded groups get back what the budget still allows, the highest scores first.

        One group's step may cost so much that others need not have lost theirs.
        """
        ordered = [np.sort(score)[::-1] for score in self.scores]
        open_ = {number for number, group in enumerate(self.groups) if left[number] < len(group)}
        while open_:
            more = {n: min(left[n] + self.round_to, len(self.groups[n])) for n in open_}
            best = max(sorted(open_), key=lambda n: float(np.mean(ordered[n][left[n] : more[n]])))
            wider = [more[best] if n == best else count for n, count in enumerate(left)]
            if self.cost(self._stay(wider), budget.unit, start) <= budget.keep + 1e-9:
                left = wider
                if left[best] == len(self.groups[best]):
                    open_.remove(best)
            else:
                # What does not fit now fits still less beside more of the others.
                open_.remove(best)
        return self._stay(left)

    def _left(self, counts: Sequence[int]) -> list[int]:
        """Return how many units each group keeps when so many are to go."""
        kept = []
        for group, score, floor, gone in zip(self.groups, self.scores, self.floors, counts, strict=True):
            left = max(len(group) - min(gone, int(np.isfinite(score).sum())), floor)
            kept.append(min(len(group), -(-left // self.round_to) * self.round_to))
        return kept

    def _stay(self, left: Sequence[int]) -> np.ndarray:
        stay = np.ones(self.channels.count, bool)
        for group, rank, count in zip(self.groups, self._ranks, left, strict=True):
            stay[group.units[rank < len(group) - count]] = False
        # A layer may read a part of a group only.
        return self.channels.viable(stay, self._preference)
