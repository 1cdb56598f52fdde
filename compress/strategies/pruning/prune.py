"""Pruning of single weights: the least important ones become zero, while training goes on or before it.

What is important says a criterion (:mod:`compress.strategies.pruning.criteria`), what is compared and what goes
together a :class:`~compress.strategies.pruning.masks.Masking`, when it goes a schedule
(:mod:`compress.strategies.pruning.schedules`).
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import numpy as np
import tf_keras
from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BeforeValidator
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate, Effect, Skipped
from compress.errors import CompressError
from compress.graph.kernels import Kernel, kernels, without_kernel
from compress.graph.rewrite import copy_model
from compress.metrics.counts import count_params
from compress.strategies.budget import Budget, one_budget, share_for_part
from compress.strategies.pruning.criteria import criteria
from compress.strategies.pruning.masks import Axes, Blocks, KeptOfEach, Masking, Pattern
from compress.strategies.pruning.rounds import Rounds, apply_masks, zeros_of
from compress.strategies.pruning.second_order import prune_second_order
from compress.strategies.pruning.zeros import PatternedZeros, Zeros
from compress.strategies.repair import Repair
from compress.strategies.strategy import STRICT, Context, Strategy
from compress.training import restore

Share = Annotated[float, Gt(0), Lt(1)]
_MOST_OF_A_GROUP = 64


def _kept_of_each(text: str) -> str:
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or not 0 < int(found[1]) < int(found[2]) <= _MOST_OF_A_GROUP:
        raise ValueError(f"N:M, of M (at most {_MOST_OF_A_GROUP}) consecutive weights N stay, as in '2:4'")
    return text


def _two_numbers(value: object) -> object:
    if value is not None and not (isinstance(value, (list, tuple)) and len(value) == 2):
        raise ValueError("two whole numbers from 1, as in [4, 1]")
    return value


@dataclass(frozen=True, config=STRICT)
class Prune(Strategy):
    """Set the least important weights of the selected kernels to zero.

    One of these says how much (a ``sparsity`` of 0.4, if none does):
        sparsity: share of the weights that become zero.
        weights: share of the weights that is kept.
        macs: share of the model's multiply-adds that is kept, counting those with a non-zero weight.
        params: share of the model's parameters that is kept, counting the non-zero ones.

    Attributes:
        criterion: what a weight's importance is. ``magnitude`` and ``movement`` prune gradually while the recovery
            trains; ``random``, ``snip``, ``grasp`` and ``synflow`` once before it; ``second_order`` too, by what a
            weight costs after the others have made up for it, layers that matter more keeping more.
        ranking: ``layer`` takes the same share of every kernel, ``global`` compares all of them; null: as the
            criterion's paper does (``global`` for snip, grasp and synflow).
        pattern: N:M: of M consecutive weights along the input channels N stay; says how much goes.
        block: blocks of so many input x output channels go as a whole.
        ramp: the sparsity grows over this part of the recovery training, then stays; 0 prunes at once.
        regrow: this share of the live weights is exchanged at first (RigL); the mask is there from the start.
        rounds: the sparsity is reached in so many rounds, each with its part of the recovery.
        rewind: after each round, what is left goes back to the values that the stage was given (Frankle and Carbin,
            arXiv 1803.03635; from a trained start, Renda et al., arXiv 2003.02389); training before and after them all.
        images: unlabelled calibration samples of ``second_order``, labelled ones of ``snip`` and ``grasp``.
    """

    sparsity: Share | None = None
    weights: Share | None = None
    macs: Share | None = None
    params: Share | None = None
    criterion: Literal["magnitude", "random", "movement", "snip", "grasp", "synflow", "second_order"] = "magnitude"
    ranking: Literal["layer", "global"] | None = None
    pattern: Annotated[str, AfterValidator(_kept_of_each)] | None = None
    block: Annotated[tuple[Annotated[int, Ge(1)], Annotated[int, Ge(1)]] | None, BeforeValidator(_two_numbers)] = None
    ramp: Annotated[float, Ge(0), Le(1)] = 0.25
    regrow: Share | None = None
    rounds: Annotated[int, Ge(1), Le(1000)] = 1
    rewind: bool = False
    images: Annotated[int, Ge(16), Le(1_000_000)] = 1000

    effects = frozenset({Effect.TRAIN, Effect.ZERO})

    def __post_init__(self) -> None:
        """Refuse several budgets at once, and fields that do not go together."""
        budget, pattern = self._budget(), self._pattern()
        if self.pattern and self.block:
            raise ValueError("a pattern or a block, not both")
        if isinstance(pattern, KeptOfEach):
            share = {"sparsity": budget.keep, "weights": 1 - budget.keep}.get(budget.unit)
            if share is None or abs(share - pattern.sparsity) > 1e-6:
                raise ValueError(f"no budget beside a pattern: {self.pattern} is a sparsity of {pattern.sparsity:g}")
        repeated = {"rounds": self.rounds > 1, "rewind": self.rewind}
        others = {"regrow": self.regrow is not None, **repeated}
        shaped = {"ranking": self.ranking is not None, "pattern": bool(self.pattern), "block": bool(self.block)}
        if self.criterion == "second_order":
            _refuse("criterion=second_order", others | shaped)
        if self.criterion == "movement":
            _refuse("criterion=movement", {"regrow": others["regrow"], "rewind": self.rewind})
        if self.regrow is not None:
            _refuse("regrow", repeated)

    @property
    def establishes(self) -> type[Zeros]:  # type: ignore[override]
        """Zeros; in a pattern they are broken by more."""
        return PatternedZeros if self.pattern or self.block else Zeros

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Prune and recover; the share asked for is exact to one weight, or block.

        ``second_order`` meets it to a hundredth of each layer; a codebook of an earlier stage may add zeros.
        """
        self._require_training(context)
        model = copy_model(candidate.model)
        names = context.selection.names(model)
        skipped = [
            Skipped(layer.name, f"weights of {type(layer).__name__} layers are not pruned")
            for layer in without_kernel(model)
            if layer.name in names
        ]
        chosen = []
        for kernel in (kernel for kernel in kernels(model) if kernel.layer.name in names):
            reason = self._pattern().unsuited(kernel.value.shape, Axes.of(kernel))
            if reason is None:
                chosen.append(kernel)
            else:
                skipped.append(Skipped(kernel.layer.name, f"{kernel.attribute}: {reason}"))
        if not chosen:
            raise context.nothing_done("a layer with a kernel to prune", skipped)
        sparsity = self._sparsity(model, chosen, context.stage)
        masking = self._masking(chosen)
        if all(mask.all() for mask in masking.masks([np.abs(k.value) for k in chosen], sparsity)):
            raise context.nothing_done(f"a kernel of which a share of {sparsity:g} is at least one weight", skipped)
        left_alone = context.skip(skipped)
        if self.criterion == "second_order":
            done = self._one_shot(candidate, context, masking, chosen, sparsity)
        else:
            work = Rounds(
                candidate.evolve(model=model),
                context,
                tuple(k.name for k in chosen),
                masking,
                criterion=self.criterion,
                images=self.images,
                ramp=self.ramp,
                regrow=self.regrow,
                guarantee=self.establishes,
            )
            done = work.rewound(sparsity, self.rounds) if self.rewind else work.run(sparsity, self.rounds)
        return done.evolve(skipped=left_alone)

    def _one_shot(
        self, candidate: Candidate, context: Context, masking: Masking, chosen: list[Kernel], sparsity: float
    ) -> Candidate:
        """Prune and repair in closed form, then recover; kernels that cannot be solved for are pruned by magnitude."""
        repair = Repair(candidate.model, context.calibration_samples(self.images), context.seed, candidate.guarantees)
        names = frozenset(kernel.layer.name for kernel in chosen)
        model, found = prune_second_order(repair, names, 1 - sparsity, by_macs=self._budget().unit == "macs")
        left = [kernel for kernel in kernels(model) if kernel.layer.name in names]
        small = masking.masks([np.abs(kernel.value) for kernel in left], sparsity)
        masks = {k.name: found.get(k.layer.name, mask) for k, mask in zip(left, small, strict=True)}
        apply_masks(model, masks)
        restore(model, candidate.guarantees)
        return context.recover(candidate.evolve(model=model).with_guarantee(zeros_of(context.stage, model, masks)))

    def _require_training(self, context: Context) -> None:
        needs = {"criterion=movement": self.criterion == "movement", "regrow": self.regrow, "rewind": self.rewind}
        (needy, *_) = [*(name for name, wanted in needs.items() if wanted), None]
        if needy and not context.recovery.trains:
            raise CompressError(
                f"strategy.{context.stage}.recovery",
                expected=f"some training: {needy} looks at how weights change",
                received=f"method={context.recovery.method} epochs={context.recovery.epochs:g}",
                fix=f"Write strategy.{context.stage}.recovery.method=finetune strategy.{context.stage}"
                ".recovery.epochs=1, or another criterion without regrow and rewind.",
            )

    def _pattern(self) -> Pattern:
        if self.pattern:
            kept, _, group = self.pattern.partition(":")
            return KeptOfEach(int(kept), int(group))
        return Blocks(*self.block) if self.block else Pattern()

    def _masking(self, chosen: list[Kernel]) -> Masking:
        once = criteria().get(self.criterion)
        costs = [kernel.macs_per_weight if self._budget().unit == "macs" else 1.0 for kernel in chosen]
        ranking = self.ranking or (once.ranking if once else "layer")
        return Masking([Axes.of(kernel) for kernel in chosen], self._pattern(), ranking, costs)

    def _budget(self) -> Budget:
        pattern = self._pattern()
        default = Budget("sparsity", pattern.sparsity if isinstance(pattern, KeptOfEach) else 0.4)
        return one_budget(default, sparsity=self.sparsity, weights=self.weights, macs=self.macs, params=self.params)

    def _sparsity(self, model: tf_keras.Model, chosen: list[Kernel], stage: str) -> float:
        budget = self._budget()
        if budget.unit == "sparsity":
            return budget.keep
        if budget.unit == "weights":
            return 1.0 - budget.keep
        if budget.unit == "macs":
            total: float = sum(k.macs for k in kernels(model))
            part: float = sum(k.macs for k in chosen)
        else:
            total, part = count_params(model), sum(k.size for k in chosen)
        return 1.0 - share_for_part(budget.keep, total, part, stage=stage, unit=budget.unit)


def _refuse(what: str, set_: dict[str, bool]) -> None:
    wrong = [name for name, given in set_.items() if given]
    if wrong:
        raise ValueError(f"{what} without {', '.join(wrong)}")
