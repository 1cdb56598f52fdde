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
        return by(high)

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
        gone = np.split(self._global < count, np.cumsum([len(group) for group in self.groups])[:-1])
        return self._stay([int(g.sum()) for g in gone])

    def _by_share(self, thousandths: int) -> np.ndarray:
        """Return what stays when this share of every group goes."""
        return self._stay([int(thousandths / 1000 * len(group)) for group in self.groups])

    def _stay(self, counts: Sequence[int]) -> np.ndarray:
        stay = np.ones(self.channels.count, bool)
        for group, score, rank, floor, gone in zip(
            self.groups, self.scores, self._ranks, self.floors, counts, strict=True
        ):
            may = int(np.isfinite(score).sum())
            left = max(len(group) - min(gone, may), floor)
            left = min(len(group), -(-left // self.round_to) * self.round_to)
            stay[group.units[rank < len(group) - left]] = False
        # A layer may read a part of a group only.
        return self.channels.viable(stay, self._preference)
