"""Channel pruning: whole channels leave the network, and it really becomes smaller.

Coupled channels go together (DepGraph, arXiv 2301.12900); how important they are says a criterion of
:mod:`compress.strategies.pruning.saliency`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import tf_keras
from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate, Effect, Skipped
from compress.errors import CompressError, did_you_mean
from compress.graph.channels.groups import Channels, Group
from compress.graph.channels.surgery import masked_model, oracle_difference, remove_channels
from compress.graph.kernels import kernels
from compress.graph.selection import Selection
from compress.metrics.counts import count_params
from compress.strategies.budget import Budget, one_budget
from compress.strategies.pruning.reconstruction import Reconstruction, allocate
from compress.strategies.pruning.saliency import Evidence, criteria
from compress.strategies.pruning.widths import Widths
from compress.strategies.repair import Repair
from compress.strategies.strategy import STRICT, Context, Strategy
from compress.training import restore

_ORACLE_TOLERANCE = 1e-4
RECONSTRUCTION = "reconstruction"


def _known(name: str) -> str:
    names = [*criteria(), RECONSTRUCTION]
    if name not in names:
        raise ValueError(f"one of {', '.join(names)}. {did_you_mean(name, names)}")
    return name


@dataclass(frozen=True, config=STRICT)
class PruneChannels(Strategy):
    """Remove the least important channels until the budget is met, then recover.

    One of these says how far to go (``macs`` of 0.5, if none does):
        macs, params: share of the model's multiply-adds or parameters that is kept.
        channels: share of the channels that is kept, of those that it may touch.

    Attributes:
        criterion: what a channel's importance is. ``reconstruction`` also says how many channels each group keeps, and
            re-solves what is left by least squares on ``images`` unlabelled samples, before any training; see
            :mod:`compress.strategies.pruning.reconstruction`. It cuts groups with one writer and one reader.
        ranking: ``global`` compares all groups with each other, after division by each group's mean; ``layer`` takes
            the same share of every group.
        round_to: a group keeps a multiple of so many channels, where it has that many.
        most: no group loses more than this share.
        steps: the budget is reached in so many steps, each with its part of the recovery.
        images: calibration samples of ``reconstruction``.
        allow_partial: go as far as possible when the budget cannot be met.
    """

    macs: Annotated[float, Gt(0), Lt(1)] | None = None
    params: Annotated[float, Gt(0), Lt(1)] | None = None
    channels: Annotated[float, Gt(0), Lt(1)] | None = None
    criterion: Annotated[str, AfterValidator(_known)] = "l2"
    ranking: Literal["global", "layer"] = "global"
    round_to: Annotated[int, Ge(1)] = 1
    most: Annotated[float, Gt(0), Le(1)] = 0.9
    steps: Annotated[int, Ge(1)] = 1
    images: Annotated[int, Ge(16), Le(1_000_000)] = 1000
    allow_partial: bool = False

    effects = frozenset({Effect.TRAIN, Effect.CUT})
    establishes = Widths

    def __post_init__(self) -> None:
        """Refuse several budgets at once."""
        self._budget()

    def _budget(self) -> Budget:
        return one_budget(Budget("macs", 0.5), macs=self.macs, params=self.params, channels=self.channels)

    def targets(self, model: tf_keras.Model, selection: Selection) -> frozenset[str]:
        """Only the layers that write a group which may go."""
        names = selection.names(model)
        groups = Channels(model).groups
        return frozenset(name for group in groups if _may_go(group, names) for name in group.writers)

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Rank, cut, compare with the masked original, recover; so many times."""
        budget, start = self._budget(), _Size.of(candidate.model)
        recovering = context.for_stage(context.stage, recovery=context.recovery.part(1 / self.steps))
        widths: dict[str, int] = {}
        worst = 0.0
        for step in range(1, self.steps + 1):
            names = context.selection.names(candidate.model)
            channels = Channels(candidate.model)
            groups = [group for group in channels.groups if _may_go(group, names)]
            skipped = _skipped(channels, names)
            if not groups:
                raise context.nothing_done("a layer with channels that may go", skipped)
            # The share of channels is counted anew at every step, the others from the start.
            part = 1 if budget.unit == "channels" else step
            target = Budget(budget.unit, budget.keep ** (part / self.steps))
            if self.criterion == RECONSTRUCTION:
                candidate, stay = self._reconstruct(candidate, target, start, context)
                channels = Channels(candidate.model)
            else:
                stay = self._choose(channels, groups, target, start, context)
            # What reconstruction has repaired reads nothing of what goes: it is its own oracle, and a stricter one.
            oracle = candidate.model if self.criterion == RECONSTRUCTION else masked_model(channels, stay)
            candidate, difference = _cut(candidate, oracle, channels, stay, groups, context)
            worst = max(worst, difference)
            for name in {name for group in groups if not stay[group.units].all() for name in group.writers}:
                widths[name] = int(candidate.model.get_layer(name).output_shape[-1])
            if step == self.steps:
                candidate = candidate.with_guarantee(Widths(context.stage, dict(sorted(widths.items()))))
            candidate = recovering.recover(candidate)
        return candidate.evolve(skipped=context.skip(skipped), measured={"oracle_difference": worst})

    def _choose(
        self, channels: Channels, groups: Sequence[Group], budget: Budget, start: _Size, context: Context
    ) -> np.ndarray:
        """Return which units stay: [units]."""
        evidence = Evidence(channels, context.data, context.seed)
        criterion = criteria()[self.criterion]
        scores = []
        for group in groups:
            score = criterion.score(group, evidence)
            score = np.where(channels.pinned[group.units], np.inf, score)
            finite = score[np.isfinite(score)]
            if not criterion.members(group) and not np.any(finite):
                score = np.full(len(group), np.inf)
            scores.append(score / (np.mean(finite) or 1.0) if finite.size else score)
        floors = [self._floor(len(group)) for group in groups]
        plan = _Plan(channels, list(groups), scores, floors, self.round_to)
        by = plan.by_rank if self.ranking == "global" else plan.by_share
        low, high = 0, plan.places if self.ranking == "global" else 1000
        reached = plan.cost(by(high), budget.unit, start)
        if reached > budget.keep + 1e-9:
            if self.allow_partial:
                return by(high)
            raise self._out_of_reach(context, budget, reached, [group.name for group in groups])
        while high - low > 1:
            middle = (low + high) // 2
            if plan.cost(by(middle), budget.unit, start) <= budget.keep + 1e-9:
                high = middle
            else:
                low = middle
        return by(high)

    def _reconstruct(
        self, candidate: Candidate, budget: Budget, start: _Size, context: Context
    ) -> tuple[Candidate, np.ndarray]:
        """Return the candidate with a repaired model of the same structure, and which units stay: [units]."""
        names = context.selection.names(candidate.model)
        repair = Repair(candidate.model, context.calibration_samples(self.images), context.seed)
        work = Reconstruction(repair, names)
        if not work.cuttable:
            raise context.nothing_done("a group of channels with one writer and one linear reader", ())
        groups = [item.group for item in work.cuttable]
        # Costs are counted on the folded network, which has fewer parameters.
        now, folded = _Size.of(candidate.model), _Size.of(repair.folded)
        goal = budget.keep
        if budget.unit != "channels":
            goal *= getattr(start, budget.unit) / getattr(now, budget.unit)
        plan = _Plan(work.channels, groups, [np.arange(len(g), dtype=float) for g in groups], [1] * len(groups), 1)

        def cost(keep: Sequence[int]) -> float:
            stay = np.ones(work.channels.count, bool)
            for group, count in zip(groups, keep, strict=True):
                stay[group.units[count:]] = False
            return plan.cost(stay, budget.unit, folded)

        floors = [self._floor(len(group)) for group in groups]
        if cost(floors) > goal + 1e-9 and not self.allow_partial:
            raise self._out_of_reach(context, budget, cost(floors), [group.name for group in groups])
        work.prepare()
        keep = allocate(work.curves(), [len(g) for g in groups], cost, goal, floors)
        keep = [
            max(count // self.round_to * self.round_to, min(self.round_to, len(group)))
            for group, count in zip(groups, keep, strict=True)
        ]
        model, stay = work.run(keep)
        restore(model, candidate.guarantees)
        return candidate.evolve(model=model), stay

    def _out_of_reach(self, context: Context, budget: Budget, reached: float, clamped: Sequence[str]) -> CompressError:
        names = f"{', '.join(clamped[:6])}{', ...' if len(clamped) > 6 else ''}"
        return CompressError(
            f"strategy.{context.stage}.{budget.unit}",
            expected=f"at least {reached:.3f}, what is left when every group loses all that it may",
            received=f"{budget.keep:g} (clamped: {names})",
            fix=f"Raise strategy.{context.stage}.{budget.unit} or .most, or write allow_partial=true.",
        )

    def _floor(self, units: int) -> int:
        """Return how many units a group keeps at least."""
        return max(1, int(np.ceil((1 - self.most) * units - 1e-9)))


class _Size:
    """Multiply-adds and parameters of a whole model."""

    def __init__(self, macs: float, params: float) -> None:
        self.macs, self.params = macs, params

    @classmethod
    def of(cls, model: tf_keras.Model) -> _Size:
        return cls(float(sum(k.macs for k in kernels(model))), float(count_params(model)))


class _Plan:
    """All units that may go in one order, and what is left after some of them."""

    def __init__(
        self, channels: Channels, groups: list[Group], scores: list[np.ndarray], floors: list[int], round_to: int
    ) -> None:
        self.channels, self.groups, self.scores, self.floors, self.round_to = channels, groups, scores, floors, round_to
        self._ranks = [np.argsort(np.argsort(score, kind="stable")) for score in scores]
        self._preference = np.zeros(channels.count)
        for group, score in zip(groups, scores, strict=True):
            self._preference[group.units] = score
        order = np.argsort(np.concatenate(scores), kind="stable")
        self._global = np.empty_like(order)
        self._global[order] = np.arange(order.size)
        self.places = int(np.isfinite(np.concatenate(scores)).sum())
        whole = _Size.of(channels.model)
        known = channels.costs(np.ones(channels.count, bool))
        self._outside = (whole.macs - known[0], whole.params - known[1])

    def by_rank(self, count: int) -> np.ndarray:
        """Return what stays when the ``count`` lowest scores go, as far as each group may be cut."""
        gone = np.split(self._global < count, np.cumsum([len(group) for group in self.groups])[:-1])
        return self._stay([int(g.sum()) for g in gone])

    def by_share(self, thousandths: int) -> np.ndarray:
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

    def cost(self, stay: np.ndarray, unit: str, start: _Size) -> float:
        """Return the share of ``start`` that is left."""
        if unit == "channels":
            mine = np.concatenate([group.units for group in self.groups])
            return float(stay[mine].mean())
        macs, params = self.channels.costs(stay)
        if unit == "macs":
            return (macs + self._outside[0]) / start.macs
        return (params + self._outside[1]) / start.params


def _cut(
    candidate: Candidate,
    oracle: tf_keras.Model,
    channels: Channels,
    stay: np.ndarray,
    groups: Sequence[Group],
    context: Context,
) -> tuple[Candidate, float]:
    """Return the candidate without the channels that go, and how far it is from the oracle: all channels, unread."""
    model = remove_channels(channels, stay)
    difference = oracle_difference(oracle, model, _samples(context, model))
    if not difference <= _ORACLE_TOLERANCE:
        raise CompressError(
            f"stage {context.stage}",
            expected=f"the outputs of the masked original, within {_ORACLE_TOLERANCE:g}",
            received=f"a difference of {difference:.2g} after {_lost(groups, stay)}",
            fix=f"Leave the layers out with strategy.{context.stage}.skip, and report this model.",
        )
    kept = channels.kept(stay | channels.pinned)
    guarantees = [g.cut(lambda name, value: channels.cut(name, value, kept)) for g in candidate.guarantees]
    return candidate.evolve(model=model, guarantees=tuple(guarantees)), difference


def _may_go(group: Group, names: frozenset[str]) -> bool:
    """Say whether a group can lose units and all layers that write it are selected."""
    owners = {member.weight.layer for member in group.members}
    return group.kept_because is None and bool(owners) and set(group.writers) & owners <= names


def _skipped(channels: Channels, names: frozenset[str]) -> list[Skipped]:
    listed = [Skipped(name, reason) for name, reason in channels.trace.unsupported.items() if name in names]
    for group in channels.groups:
        if group.kept_because is not None and group.members and set(group.writers) & names:
            listed.append(Skipped(group.name, group.kept_because, True))
    return listed


def _samples(context: Context, model: tf_keras.Model) -> list[np.ndarray]:
    x = context.data.train.x[:16].astype(np.float32)
    return [x] if len(model.inputs) == 1 else [x for _ in model.inputs]


def _lost(groups: Sequence[Group], stay: np.ndarray) -> str:
    parts = [f"{group.name} ({int((~stay[group.units]).sum())} of {len(group)})" for group in groups]
    return f"cutting {', '.join(parts[:5])}{', ...' if len(parts) > 5 else ''}"
