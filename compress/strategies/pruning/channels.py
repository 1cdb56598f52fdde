"""Channel pruning: whole channels leave the network, and it really becomes smaller.

Coupled channels go together (DepGraph, arXiv 2301.12900); how important they are says a criterion of
:mod:`compress.strategies.pruning.saliency`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import tf_keras
from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate, Effect, Skipped
from compress.errors import CompressError, did_you_mean
from compress.graph.channels.groups import Channels, Group, transferred
from compress.graph.channels.surgery import masked_model, oracle_difference, remove_channels
from compress.graph.kernels import kernels
from compress.graph.residual import residual_blocks, without_blocks, without_branches
from compress.graph.rewrite import copy_model
from compress.graph.selection import Selection
from compress.strategies.budget import Budget, one_budget
from compress.strategies.pruning.depth import branch_shares, lowest_blocks
from compress.strategies.pruning.group_sparsity import GroupLasso, GroupSparsity, GrowingDecay
from compress.strategies.pruning.measured import MEASURED, Start, largest_share
from compress.strategies.pruning.plan import Plan, Ranking, Size
from compress.strategies.pruning.reconstruction import Allocation, Reconstruction
from compress.strategies.pruning.saliency import Evidence, criteria
from compress.strategies.pruning.widths import Widths, written_channels
from compress.strategies.repair import Repair
from compress.strategies.strategy import STRICT, Context, Strategy
from compress.training import restore

_ORACLE_TOLERANCE = 1e-4
RECONSTRUCTION = "reconstruction"
_LOG = logging.getLogger("compress")


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
        bytes: share of the size of the exported file that is kept, as it would be written at this stage.
        latency: share of the latency on the board that is kept; its median is measured a few times.

    Attributes:
        criterion: what a channel's importance is. ``reconstruction`` also says how many channels each group keeps, and
            re-solves what is left by least squares on ``images`` unlabelled samples, before any training; see
            :mod:`compress.strategies.pruning.reconstruction`. It cuts groups with one writer and one reader.
        ranking: ``global`` compares all groups with each other, after division by each group's mean; ``layer`` takes
            the same share of every group.
        blocks: whole residual blocks may go, too, where their branch makes up the least of the sum.
        round_to: a group keeps a multiple of so many channels, where it has that many; the board's own if null.
        most: no group loses more than this share.
        steps: the budget is reached in so many steps, each with its part of the recovery.
        regularisation: half of the recovery comes before the cut and drives whole units to zero: ``group_lasso`` all
            of them, ``growing`` those that will go; see :mod:`compress.strategies.pruning.group_sparsity`.
        strength: of the regularisation.
        images: calibration samples of ``reconstruction`` and ``blocks``.
        allow_partial: go as far as possible when the budget cannot be met.
    """

    macs: Annotated[float, Gt(0), Lt(1)] | None = None
    params: Annotated[float, Gt(0), Lt(1)] | None = None
    channels: Annotated[float, Gt(0), Lt(1)] | None = None
    bytes: Annotated[float, Gt(0), Lt(1)] | None = None
    latency: Annotated[float, Gt(0), Lt(1)] | None = None
    criterion: Annotated[str, AfterValidator(_known)] = "l2"
    ranking: Ranking = "global"
    blocks: bool = False
    round_to: Annotated[int, Ge(1)] | None = None
    most: Annotated[float, Gt(0), Le(1)] = 0.9
    steps: Annotated[int, Ge(1)] = 1
    regularisation: Literal["none", "group_lasso", "growing"] = "none"
    strength: Annotated[float, Gt(0), Le(100)] | None = None
    images: Annotated[int, Ge(16), Le(1_000_000)] = 1000
    allow_partial: bool = False

    effects = frozenset({Effect.TRAIN, Effect.CUT})
    establishes = Widths

    def __post_init__(self) -> None:
        """Refuse several budgets at once, and what does not go together."""
        self._budget()
        if self.criterion == RECONSTRUCTION and (self.blocks or self.regularisation != "none"):
            raise ValueError(f"no blocks and no regularisation with criterion={RECONSTRUCTION}")

    def _budget(self) -> Budget:
        choices = {unit: getattr(self, unit) for unit in ("macs", "params", "channels", "bytes", "latency")}
        return one_budget(Budget("macs", 0.5), **choices)

    def targets(self, model: tf_keras.Model, selection: Selection) -> frozenset[str]:
        """Only the layers that write a group which may go."""
        names = selection.names(model)
        groups = Channels(model).groups
        return frozenset(name for group in groups if _may_go(group, names) for name in group.writers)

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Rank, cut, compare with the masked original, recover; so many times."""
        if self.regularisation != "none" and not context.recovery.trains:
            where, recovery = f"strategy.{context.stage}", context.recovery
            raise CompressError(
                f"{where}.regularisation",
                expected="a recovery that trains: half of it drives channels to zero before the cut",
                received=f"{self.regularisation} with method={recovery.method} epochs={recovery.epochs:g}",
                fix=f"Write {where}.recovery.epochs=1, or {where}.regularisation=none.",
            )
        budget, start = self._budget(), Start.of(candidate, context, self._budget().unit)
        share = 1.0 if self.regularisation == "none" else 0.5
        recovering = context.for_stage(context.stage, recovery=context.recovery.part(share / self.steps))
        widths: dict[str, int] = {}
        measured: dict[str, float] = {"oracle_difference": 0.0}
        sizes: dict[str, int] = {}
        for step in range(1, self.steps + 1):
            # The share of channels is counted anew at every step, the others from the start.
            part = 1 if budget.unit == "channels" else step
            target = Budget(budget.unit, budget.keep ** (part / self.steps))
            if self.blocks:
                candidate, gone, difference = self._drop_blocks(candidate, target, start, context)
                measured["oracle_difference"] = max(measured["oracle_difference"], difference)
                measured["blocks_removed"] = measured.get("blocks_removed", 0.0) + gone
            names = context.selection.names(candidate.model)
            channels = Channels(candidate.model)
            groups = [group for group in channels.groups if _may_go(group, names)]
            skipped = _skipped(channels, names)
            if not groups:
                raise context.nothing_done("a layer with channels that may go", skipped)
            left_alone = context.skip(skipped)
            for group in groups:
                sizes.setdefault(group.name, len(group))
            if self.criterion == RECONSTRUCTION:
                candidate, stay, repaired = self._reconstruct(candidate, sizes, target, start, context)
                channels = Channels(candidate.model)
                # What is repaired reads nothing of what goes: it is its own oracle, and a stricter one.
                oracle = candidate.model
                others = (group for group in groups if not set(group.writers) & repaired)
                reason = f"{RECONSTRUCTION} cuts what one layer writes and one linear layer reads"
                left_alone = (*left_alone, *(Skipped(group.name, reason, True) for group in others))
            else:
                candidate = self._regularise(candidate, channels, groups, sizes, target, start, recovering)
                channels = Channels(candidate.model)
                stay = self._choose(candidate, channels, groups, sizes, target, start, context)
                oracle = masked_model(channels, stay)
            if stay.all() and self.steps == 1 and not measured.get("blocks_removed"):
                raise context.nothing_done("a channel that may go under most and round_to", skipped)
            candidate, difference = _cut(candidate, oracle, channels, stay, groups, context)
            measured["oracle_difference"] = max(measured["oracle_difference"], difference)
            for name in {name for group in groups if not stay[group.units].all() for name in group.writers}:
                if (width := written_channels(candidate.model.get_layer(name))) is not None:
                    widths[name] = width
            if step == self.steps:
                present = {layer.name for layer in candidate.model.layers}
                left = {name: width for name, width in sorted(widths.items()) if name in present}
                candidate = candidate.with_guarantee(Widths(context.stage, left))
            candidate = recovering.recover(candidate)
        if budget.unit != "channels":
            # After the training: zeros that the file stores once are values of their own by now.
            measured[f"{budget.unit}_kept"] = start.kept(candidate, context, budget.unit)
        return candidate.evolve(skipped=left_alone, measured=measured)

    def _plan(self, channels: Channels, groups: Sequence[Group], sizes: Mapping[str, int], context: Context) -> Plan:
        """Return the plan; ``sizes``: how large each group was when the stage began."""
        evidence = Evidence(channels, context.data, context.seed, where=f"strategy.{context.stage}.criterion")
        criterion = criteria()[self.criterion]
        scores = []
        for group in groups:
            score = criterion.score(group, evidence)
            score = np.where(channels.pinned[group.units], np.inf, score)
            finite = score[np.isfinite(score)]
            if not criterion.members(group) and not np.any(finite):
                score = np.full(len(group), np.inf)
            scores.append(score / (np.mean(finite) or 1.0) if finite.size else score)
        if not any(np.any(score[np.isfinite(score)]) for score in scores):
            blind = not any(criterion.members(group) for group in groups)
            found = "which finds nothing to look at in the groups that may go" if blind else "whose scores are all zero"
            raise CompressError(
                f"strategy.{context.stage}.criterion",
                expected="a criterion that tells channels apart",
                received=f"{self.criterion}, {found}",
                fix="Choose another one (l2)"
                + ("." if blind else ", or look whether the model's weights are what they should be."),
            )
        floors = [min(self._floor(sizes.get(group.name, len(group))), len(group)) for group in groups]
        return Plan(channels, groups, scores, floors, self._multiple(context))

    def _choose(
        self,
        candidate: Candidate,
        channels: Channels,
        groups: Sequence[Group],
        sizes: Mapping[str, int],
        budget: Budget,
        start: Start,
        context: Context,
    ) -> np.ndarray:
        """Return which units stay: [units]."""
        plan = self._plan(channels, groups, sizes, context)
        if budget.unit not in MEASURED:
            stay = plan.meet(budget, start.size, self.ranking)
            reached = plan.cost(stay, budget.unit, start.size)
        else:
            proxy = MEASURED[budget.unit]

            def measured(share: float) -> float:
                left = plan.meet(Budget(proxy, share), start.size, self.ranking)
                return start.share_of(remove_channels(channels, left), candidate, context, budget.unit)

            share, reached = largest_share(measured, budget.keep)
            stay = plan.meet(Budget(proxy, share), start.size, self.ranking)
        if reached > budget.keep + 1e-9 and not self.allow_partial:
            raise self._out_of_reach(context, budget, reached, [group.name for group in groups])
        return stay

    def _regularise(
        self,
        candidate: Candidate,
        channels: Channels,
        groups: Sequence[Group],
        sizes: Mapping[str, int],
        budget: Budget,
        start: Start,
        recovering: Context,
    ) -> Candidate:
        """Return the candidate after the training that drives units to zero, if there is to be one."""
        if self.regularisation == "none":
            return candidate
        model = copy_model(candidate.model)
        may = np.zeros(channels.count, bool)
        may[np.concatenate([group.units for group in groups])] = True
        may &= ~channels.pinned
        sparsity: GroupSparsity
        if self.regularisation == "growing":
            may &= ~self._choose(candidate, channels, groups, sizes, budget, start, recovering)
            sparsity = GrowingDecay(channels, model, may, self.strength or 7.0)
        else:
            sparsity = GroupLasso(channels, model, may, self.strength or 0.5)
        return recovering.recover(candidate.evolve(model=model), projections=[sparsity])

    def _drop_blocks(
        self, candidate: Candidate, budget: Budget, start: Start, context: Context
    ) -> tuple[Candidate, int, float]:
        """Return the candidate without the residual blocks that score lowest, their number, what the oracle says."""
        names, model = context.selection.names(candidate.model), candidate.model
        channels = Channels(model)
        weighted = {kernel.layer.name for kernel in kernels(model)}
        blocks = [b for b in residual_blocks(model) if set(b.layers) & weighted <= names]
        groups = [group for group in channels.groups if _may_go(group, names)]
        if not blocks:
            raise CompressError(
                f"strategy.{context.stage}.blocks",
                expected="a residual block, all of whose layers may go, beside a shortcut that changes nothing",
                received=f"none in {model.name}",
                fix=f"Write strategy.{context.stage}.blocks=false, or widen its only and skip.",
            )
        proxy = Budget(MEASURED.get(budget.unit, budget.unit), budget.keep)
        shares = branch_shares(model, blocks, context.calibration_samples(self.images))
        gone = lowest_blocks(self._plan(channels, groups, {}, context), blocks, shares, proxy, start.size)
        if not gone:
            return candidate, 0, 0.0
        _LOG.info("%s: residual blocks that go: %s", context.stage, ", ".join(block.add for block in gone))
        smaller, samples = without_blocks(model, gone), _samples(context, model)
        difference = oracle_difference(without_branches(model, gone), smaller, samples)
        _require_equal(difference, f"taking out {', '.join(block.add for block in gone[:5])}", context, model)
        lost = frozenset(name for block in gone for name in (*block.layers, block.add))
        guarantees = (g.without(lost) if g.layers & lost else g for g in candidate.guarantees)
        left = tuple(g for g, old in zip(guarantees, candidate.guarantees, strict=True) if g.layers or not old.layers)
        return candidate.evolve(model=smaller, guarantees=left), len(gone), difference

    def _reconstruct(
        self, candidate: Candidate, sizes: Mapping[str, int], budget: Budget, start: Start, context: Context
    ) -> tuple[Candidate, np.ndarray, set[str]]:
        """Return the candidate, its model repaired, which units stay [units], and the writers of those that may go."""
        names = context.selection.names(candidate.model)
        repair = Repair(candidate.model, context.calibration_samples(self.images), context.seed, candidate.guarantees)
        work = Reconstruction(repair, names)
        if not work.cuttable:
            raise context.nothing_done("a group of channels with one writer and one linear reader", ())
        groups = [item.group for item in work.cuttable]
        names_of = [group.name for group in groups]
        floors = [min(self._floor(sizes.get(group.name, len(group))), len(group)) for group in groups]
        # Costs are counted on the folded network, which has fewer parameters.
        now = Size.of(candidate.model)
        whole = {unit: getattr(now, unit) / getattr(start.size, unit) for unit in ("macs", "params")} | {
            "channels": 1.0
        }
        allocation = Allocation(work, whole, floors, self._multiple(context))
        proxy = MEASURED.get(budget.unit, budget.unit)
        reached = allocation.cost(floors, proxy)
        if proxy == budget.unit and reached > budget.keep + 1e-9 and not self.allow_partial:
            raise self._out_of_reach(context, budget, reached, names_of)
        work.prepare()
        curves = work.curves()
        share = budget.keep
        if proxy != budget.unit:

            def measured(share: float) -> float:
                cut = remove_channels(work.channels, allocation.stay(allocation.keep(curves, proxy, share)))
                return start.share_of(cut, candidate, context, budget.unit)

            share, reached = largest_share(measured, budget.keep)
            if reached > budget.keep and not self.allow_partial:
                raise self._out_of_reach(context, budget, reached, names_of)
        keep = allocation.keep(curves, proxy, share)
        model, folded_stay = work.run(keep)
        restore(model, candidate.guarantees)
        stay = transferred(work.channels, folded_stay, groups, Channels(model))
        return candidate.evolve(model=model), stay, {name for group in groups for name in group.writers}

    def _out_of_reach(self, context: Context, budget: Budget, reached: float, clamped: Sequence[str]) -> CompressError:
        names = f"{', '.join(clamped[:6])}{', ...' if len(clamped) > 6 else ''}"
        multiple = self._multiple(context)
        rounded = f" in multiples of {multiple}" if multiple > 1 else ""
        return CompressError(
            f"strategy.{context.stage}.{budget.unit}",
            expected=f"at least {reached:.4g}, what is left when every group loses all that it may{rounded}",
            received=f"{budget.keep:g} (clamped: {names})",
            fix=f"Raise strategy.{context.stage}.{budget.unit} or .most, "
            + ("lower .round_to, " if rounded else "")
            + "or write allow_partial=true.",
        )

    def _multiple(self, context: Context) -> int:
        return context.channel_multiple if self.round_to is None else self.round_to

    def _floor(self, units: int) -> int:
        """Return how many units a group keeps at least."""
        return max(1, int(np.ceil((1 - self.most) * units - 1e-9)))


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
    _require_equal(difference, _lost(groups, stay), context, candidate.model)
    kept = channels.kept(stay | channels.pinned)
    guarantees = [g.cut(lambda name, value: channels.cut(name, value, kept)) for g in candidate.guarantees]
    return candidate.evolve(model=model, guarantees=tuple(guarantees)), difference


def _require_equal(difference: float, done: str, context: Context, model: tf_keras.Model) -> None:
    if not difference <= _ORACLE_TOLERANCE:
        own = [layer for layer in model.layers if not type(layer).__module__.startswith("tf_keras.")]
        names = ", ".join(layer.name for layer in own[:3])
        advice = (
            f" A layer of your own ({names}) that mixes channels says so in a method trace_channels." if own else ""
        )
        raise CompressError(
            f"stage {context.stage}",
            expected=f"the outputs of the masked original, within {_ORACLE_TOLERANCE:g}",
            received=f"a difference of {difference:.2g} after {done}",
            fix=f"Leave the layers out with strategy.{context.stage}.skip, and report this model.{advice}",
        )


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
