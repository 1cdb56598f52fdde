"""Channel pruning: whole channels leave the network, and it really becomes smaller.

Coupled channels go together (DepGraph, arXiv 2301.12900); how important they are says a criterion of
:mod:`compress.strategies.pruning.saliency`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Literal

import numpy as np
import tf_keras
from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate, Effect, Skipped
from compress.errors import CompressError, did_you_mean
from compress.graph.channels.groups import Channels, Group, transferred
from compress.graph.channels.surgery import masked_model, remove_channels
from compress.graph.fold import fold_batch_norm
from compress.graph.residual import ResidualBlock
from compress.graph.rewrite import copy_model
from compress.graph.selection import Selection
from compress.strategies.budget import Budget, one_budget
from compress.strategies.options import refuse_without_effect
from compress.strategies.pruning.cut import cut, left_out, may_go
from compress.strategies.pruning.depth import branch_shares, droppable_blocks, lowest_blocks, take_out
from compress.strategies.pruning.group_sparsity import GroupLasso, GroupSparsity, GrowingDecay
from compress.strategies.pruning.measured import MEASURED, Start, largest_share, measured_once
from compress.strategies.pruning.plan import Plan, Ranking, Size
from compress.strategies.pruning.reconstruction import Allocation, Reconstruction, cuttable_groups
from compress.strategies.pruning.saliency import Evidence, criteria, score_groups
from compress.strategies.pruning.shares import LayerShares, Shares, read_shares
from compress.strategies.pruning.widths import Widths, written_channels
from compress.strategies.repair import Repair
from compress.strategies.strategy import STRICT, Context, Strategy
from compress.training import restore

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
        channels: share of the channels that is kept, of those that it may touch. With 0 the residual blocks around them
            go, with all their layers, and channels that stand in none stay; ``reconstruction`` makes up for what
            they gave.
        bytes: share of the size of the exported file that is kept, as it would be written at this stage.
        latency: share of the latency on the board that is kept; its median is measured a few times.

    Attributes:
        layer_channels: beside ``channels``, the share that single layers keep, by name or regular expression; all
            others keep ``channels`` each, and nothing is ranked but the channels of a layer. A group of layers goes by
            the least of them.
        criterion: what a channel's importance is. ``reconstruction`` also re-solves what is left by least squares on
            ``images`` unlabelled samples, before any training, and under ``global`` decides by the change of the logits
            how many channels each group keeps; see :mod:`compress.strategies.pruning.reconstruction`. It cuts groups
            with one writer and one reader.
        ranking: ``global`` compares all groups with each other, after division by each group's mean; ``layer`` takes
            the same share of every group. Beside ``layer_channels`` it decides nothing.
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
    channels: Annotated[float, Ge(0), Lt(1)] | None = None
    bytes: Annotated[float, Gt(0), Lt(1)] | None = None
    latency: Annotated[float, Gt(0), Lt(1)] | None = None
    layer_channels: LayerShares | None = None
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
        refuse_without_effect(self, [(self.regularisation != "none", ("strength",), "a regularisation")])
        if self.criterion == RECONSTRUCTION and (self.blocks or self.regularisation != "none"):
            raise ValueError(f"no blocks and no regularisation with criterion={RECONSTRUCTION}")
        whole = self.channels == 0 and self.layer_channels is None
        own = (self.channels is not None, ("layer_channels",), "channels")
        refuse_without_effect(self, [own, (not whole, ("most", "round_to", "allow_partial"), "channels above 0")])
        given = "layer_channels" if self.layer_channels else "channels=0"
        if (whole or self.layer_channels) and (self.blocks or self.steps > 1 or self.regularisation != "none"):
            raise ValueError(f"no blocks, no steps and no regularisation with {given}: what goes is given, and at once")

    def _budget(self) -> Budget:
        choices = {unit: getattr(self, unit) for unit in ("macs", "params", "channels", "bytes", "latency")}
        return one_budget(Budget("macs", 0.5), **choices)

    def targets(self, model: tf_keras.Model, selection: Selection) -> frozenset[str]:
        """Only the layers that write a group which may go."""
        names = selection.names(model)
        groups = Channels(model).groups
        return frozenset(name for group in groups if may_go(group, names) for name in group.writers)

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Rank, cut, compare with the masked original, recover; so many times."""
        self._require_recovery(context)
        wanted = self._shares(candidate, context)
        budget = self._budget()
        start = Start.of(candidate, context, budget.unit, self._groups(candidate, context))
        share = 1.0 if self.regularisation == "none" else 0.5
        recovering = context.for_stage(context.stage, recovery=context.recovery.part(share / self.steps))
        widths: dict[str, int] = {}
        difference, removed = 0.0, 0
        for step in range(1, self.steps + 1):
            target = Budget(budget.unit, budget.keep ** (step / self.steps))
            if self.blocks:
                candidate, gone, changed = self._drop_blocks(candidate, target, start, context)
                difference, removed = max(difference, changed), removed + gone
            if wanted is None:
                done = self._step(candidate, target, start, context, recovering)
            else:
                done, removed = self._cut_shares(candidate, wanted, start, context), len(wanted.gone)
            if not done.narrower and self.steps == 1 and not removed:
                raise context.nothing_done("a channel that may go under most and round_to", done.left_alone)
            candidate, difference = done.candidate, max(difference, done.difference)
            for name in done.narrower:
                if (width := written_channels(candidate.model.get_layer(name))) is not None:
                    widths[name] = width
            if step == self.steps:
                present = {layer.name for layer in candidate.model.layers}
                left = {name: width for name, width in sorted(widths.items()) if name in present}
                candidate = candidate.with_guarantee(Widths(context.stage, left)) if left else candidate
            candidate = recovering.recover(candidate)
        # After the training: zeros that the file stores once are values of their own by now.
        measured = {"oracle_difference": difference, f"{budget.unit}_kept": start.kept(candidate, context, budget.unit)}
        if self.blocks or wanted is not None:
            measured["blocks_removed"] = float(removed)
        return candidate.evolve(skipped=done.left_alone, measured=measured)

    def _shares(self, candidate: Candidate, context: Context) -> Shares | None:
        """Return what each layer is given; None where the budget decides.

        Raises:
            CompressError: if nothing is to go.
        """
        if self.channels is None or (self.channels > 0 and self.layer_channels is None):
            return None
        groups, model = self._groups(candidate, context), candidate.model
        # What a criterion cannot cut is listed as skipped, as ever; it may have a rule.
        written = {name for group in Channels(model).groups for name in group.writers}
        names = [layer.name for layer in model.layers if layer.name in written & context.selection.names(model)]
        where = f"strategy.{context.stage}.layer_channels"
        wanted = read_shares(model, groups, names, self.channels, self.layer_channels, where)
        if not wanted.gone and not wanted.narrows:
            what = "channels that may go" if self.channels else "channels inside a residual block that can go"
            raise context.nothing_done(f"{what} (channels={self.channels:g})", wanted.outside)
        return wanted

    def _cut_shares(self, candidate: Candidate, wanted: Shares, start: Start, context: Context) -> _Done:
        """Return what a cut does that gives each layer its share."""
        done = _Done(candidate, 0.0, frozenset(), ())
        if wanted.narrows or self.criterion == RECONSTRUCTION:
            done = self._step(candidate, Budget("channels", 1.0), start, context, context, wanted)
        candidate, difference = done.candidate, 0.0
        if wanted.gone:
            candidate, difference = take_out(candidate, wanted.gone, context)
        narrower = done.narrower & {layer.name for layer in candidate.model.layers}
        left_alone = (*done.left_alone, *context.skip(wanted.outside))
        return _Done(candidate, max(difference, done.difference), narrower, left_alone)

    def _counts(self, wanted: Shares, groups: Sequence[Group], floors: Sequence[int], context: Context) -> list[int]:
        """Return how many units each group keeps.

        Raises:
            CompressError: if that is more than its share of one.
        """
        counts = wanted.counts(groups, floors, self._multiple(context))
        exceeded = wanted.exceeded(groups, counts)
        if exceeded and not self.allow_partial:
            raise CompressError(
                f"strategy.{context.stage}.layer_channels",
                expected=f"shares that most={self.most:g} and multiples of {self._multiple(context)} channels leave",
                received=f"{', '.join(exceeded[:5])}{', ...' if len(exceeded) > 5 else ''}",
                fix=f"Raise these shares or strategy.{context.stage}.most, lower .round_to, "
                "or write allow_partial=true.",
            )
        return counts

    def _require_recovery(self, context: Context) -> None:
        if self.regularisation != "none" and not context.recovery.trains:
            where, recovery = f"strategy.{context.stage}", context.recovery
            raise CompressError(
                f"{where}.regularisation",
                expected="a recovery that trains: half of it drives channels to zero before the cut",
                received=f"{self.regularisation} with method={recovery.method} epochs={recovery.epochs:g}",
                fix=f"Write {where}.recovery.method=finetune {where}.recovery.epochs=1, "
                f"or {where}.regularisation=none.",
            )

    def _groups(self, candidate: Candidate, context: Context) -> list[Group]:
        """Return the groups that may go."""
        names, model = context.selection.names(candidate.model), candidate.model
        if self.criterion == RECONSTRUCTION:
            return [item.group for item in cuttable_groups(Channels(fold_batch_norm(model)), names)]
        return [group for group in Channels(model).groups if may_go(group, names)]

    def _step(
        self,
        candidate: Candidate,
        target: Budget,
        start: Start,
        context: Context,
        recovering: Context,
        wanted: Shares | None = None,
    ) -> _Done:
        """Return what one cut to ``target`` does; ``recovering``: with this step's part of the recovery.

        ``wanted``: what each group keeps, in place of the target.
        """
        names = context.selection.names(candidate.model)
        channels = Channels(candidate.model)
        groups = [group for group in channels.groups if may_go(group, names)]
        skipped = left_out(channels, names)
        if not groups:
            raise context.nothing_done("a layer with channels that may go", skipped)
        left_alone = context.skip(skipped)
        if self.criterion == RECONSTRUCTION:
            reason = f"{RECONSTRUCTION} cuts what one layer writes and one linear layer reads"
            every = [*left_alone, *(Skipped(group.name, reason, True) for group in groups)]
            candidate, stay, repaired = self._reconstruct(candidate, target, start, context, every, wanted)
            channels = Channels(candidate.model)
            # What is repaired reads nothing of what goes: it is its own oracle, and a stricter one.
            oracle = candidate.model
            others = (group for group in groups if not set(group.writers) & repaired)
            left_alone = (*left_alone, *(Skipped(group.name, reason, True) for group in others))
        else:
            candidate = self._regularise(candidate, channels, groups, target, start, recovering)
            channels = Channels(candidate.model)
            stay, unscored = self._choose(candidate, channels, groups, target, start, context, wanted)
            reason = f"criterion={self.criterion} finds nothing to look at"
            left_alone = (*left_alone, *(Skipped(group.name, reason, True) for group in unscored))
            oracle = masked_model(channels, stay)
        candidate, difference = cut(candidate, oracle, channels, stay, groups, context)
        narrower = {name for group in groups if not stay[group.units].all() for name in group.writers}
        return _Done(candidate, difference, frozenset(narrower), left_alone)

    def _plan(self, channels: Channels, groups: Sequence[Group], start: Start, context: Context) -> Plan:
        evidence = Evidence(channels, context.data, context.seed, where=f"strategy.{context.stage}.criterion")
        scores = score_groups(self.criterion, groups, evidence)
        return Plan(channels, groups, scores, self._floors(groups, start), self._multiple(context))

    def _choose(
        self,
        candidate: Candidate,
        channels: Channels,
        groups: Sequence[Group],
        budget: Budget,
        start: Start,
        context: Context,
        wanted: Shares | None = None,
    ) -> tuple[np.ndarray, list[Group]]:
        """Return which units stay, [units], and the groups that the criterion says nothing of."""
        plan = self._plan(channels, groups, start, context)
        if wanted is not None:
            return plan.keep(self._counts(wanted, groups, plan.floors, context)), plan.unscored
        if budget.unit not in MEASURED:
            stay = plan.meet(budget, start.size, self.ranking)
            reached = plan.cost(stay, budget.unit, start.size)
        else:
            proxy = MEASURED[budget.unit]

            measured = measured_once(
                lambda share: plan.meet(Budget(proxy, share), start.size, self.ranking),
                lambda left: start.share_of(remove_channels(channels, left), candidate, context, budget.unit),
            )
            share, reached = largest_share(measured, budget.keep)
            stay = plan.meet(Budget(proxy, share), start.size, self.ranking)
        if reached > budget.keep + 1e-9 and not self.allow_partial:
            unscored = {group.name for group in plan.unscored}
            clamped = [group.name for group in groups if group.name not in unscored]
            raise self._out_of_reach(context, budget, reached, clamped)
        return stay, plan.unscored

    def _regularise(
        self,
        candidate: Candidate,
        channels: Channels,
        groups: Sequence[Group],
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
            may &= ~self._choose(candidate, channels, groups, budget, start, recovering)[0]
            sparsity = GrowingDecay(channels, model, may, self.strength or 7.0)
        else:
            sparsity = GroupLasso(channels, model, may, self.strength or 0.5)
        return recovering.recover(candidate.evolve(model=model), projections=[sparsity])

    def _drop_blocks(
        self, candidate: Candidate, budget: Budget, start: Start, context: Context
    ) -> tuple[Candidate, int, float]:
        """Return the candidate without the residual blocks that score lowest, their number, what the oracle says."""
        channels, names = Channels(candidate.model), context.selection.names(candidate.model)
        groups = [group for group in channels.groups if may_go(group, names)]
        blocks = droppable_blocks(candidate.model, context)
        proxy = Budget(MEASURED.get(budget.unit, budget.unit), budget.keep)
        shares = branch_shares(candidate.model, blocks, context.calibration_samples(self.images))
        gone = lowest_blocks(self._plan(channels, groups, start, context), blocks, shares, proxy, start.size)
        if not gone:
            return candidate, 0, 0.0
        smaller, difference = take_out(candidate, gone, context)
        return smaller, len(gone), difference

    def _reconstruct(
        self,
        candidate: Candidate,
        budget: Budget,
        start: Start,
        context: Context,
        skipped: Sequence[Skipped],
        wanted: Shares | None,
    ) -> tuple[Candidate, np.ndarray, set[str]]:
        """Return the candidate, its model repaired, which units stay [units], and the writers of those that may go."""
        names = context.selection.names(candidate.model)
        repair = Repair(candidate.model, context.calibration_samples(self.images), context.seed, candidate.guarantees)
        work = Reconstruction(repair, names)
        if not work.cuttable:
            raise context.nothing_done("a group of channels with one writer and one linear reader", skipped)
        groups = [item.group for item in work.cuttable]
        writers = {name for group in groups for name in group.writers}
        floors = self._floors(groups, start)
        if wanted is not None:
            work.prepare()
            counts = self._counts(wanted, groups, floors, context)
            return *self._repaired(candidate, work, counts, wanted.gone), writers
        names_of = [group.name for group in groups]
        # Costs are counted on the folded network, which has fewer parameters.
        now = Size.of(candidate.model, groups)
        whole = {unit: getattr(now, unit) / getattr(start.size, unit) for unit in ("macs", "params", "channels")}
        allocation = Allocation(work, whole, floors, self._multiple(context))
        proxy = MEASURED.get(budget.unit, budget.unit)
        reached = allocation.cost(allocation.floors, proxy)
        if proxy == budget.unit and reached > budget.keep + 1e-9 and not self.allow_partial:
            raise self._out_of_reach(context, budget, reached, names_of)
        work.prepare()
        curves = work.curves() if self.ranking == "global" else None
        share = budget.keep
        if proxy != budget.unit:
            measured = measured_once(
                lambda share: allocation.stay(allocation.keep(curves, proxy, share)),
                lambda left: start.share_of(remove_channels(work.channels, left), candidate, context, budget.unit),
            )
            share, reached = largest_share(measured, budget.keep)
            if reached > budget.keep and not self.allow_partial:
                raise self._out_of_reach(context, budget, reached, names_of)
        keep = allocation.keep(curves, proxy, share)
        return *self._repaired(candidate, work, keep), writers

    def _repaired(
        self, candidate: Candidate, work: Reconstruction, keep: Sequence[int], gone: Sequence[ResidualBlock] = ()
    ) -> tuple[Candidate, np.ndarray]:
        model, folded_stay = work.run(keep, gone)
        restore(model, candidate.guarantees)
        groups = [item.group for item in work.cuttable]
        return candidate.evolve(model=model), transferred(work.channels, folded_stay, groups, Channels(model))

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

    def _floors(self, groups: Sequence[Group], start: Start) -> list[int]:
        """Return how many units each group keeps at least, of those that it had when the stage began."""
        sizes = [start.size.groups.get(group.name, len(group)) for group in groups]
        least = [max(1, int(np.ceil((1 - self.most) * size - 1e-9))) for size in sizes]
        return [min(floor, len(group)) for floor, group in zip(least, groups, strict=True)]


@plain_dataclass(frozen=True)
class _Done:
    """What one step has done: the layers that are narrower, how far the oracle is, what was left alone."""

    candidate: Candidate
    difference: float
    narrower: frozenset[str]
    left_alone: tuple[Skipped, ...]
