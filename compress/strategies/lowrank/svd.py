"""Low-rank factorization of Dense and Conv2D layers by singular value decomposition.

Sources: Denton et al. (arXiv 1404.0736); Jaderberg et al. (arXiv 1405.3866); Tai et al. (arXiv 1511.06067).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import tf_keras
from annotated_types import Ge, Gt, Le, Lt
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate, Effect, Skipped
from compress.graph.kernels import kernels, without_kernel
from compress.graph.rewrite import NewLayer, calls, rewrite
from compress.graph.selection import Selection
from compress.metrics.counts import count_params
from compress.strategies.budget import Budget, one_budget
from compress.strategies.lowrank.allocation import Choice, allocate
from compress.strategies.lowrank.forms import CostUnit, Form, Unit, obstacle, pair_unit, single_unit
from compress.strategies.lowrank.rank import Rank, first_factor
from compress.strategies.strategy import STRICT, Context, Strategy


@dataclass(frozen=True, config=STRICT)
class LowRank(Strategy):
    """Replace layers by products of two smaller ones where that saves, then recover.

    One of these says how far to go (``params`` of 0.8, if none does):
        macs, params: share of the model's multiply-adds or parameters that is kept. The ranks of all layers are
            chosen together: the least discarded spectral energy (relative to each layer's own) for the saving.
        energy: share of each layer's squared singular values that is kept.
        rank: the same rank for every layer (cut to what a layer can have).

    ``form`` of convolutions: ``channel`` is k x k to ``rank`` channels, then 1 x 1; ``spatial`` is k x 1, then 1 x k;
    ``auto`` takes the better one for each layer.
    """

    macs: Annotated[float, Gt(0), Lt(1)] | None = None
    params: Annotated[float, Gt(0), Lt(1)] | None = None
    energy: Annotated[float, Gt(0), Le(1)] | None = None
    rank: Annotated[int, Ge(1)] | None = None
    form: Form = "auto"

    effects = frozenset({Effect.TRAIN, Effect.REPLACE})
    establishes = Rank

    def __post_init__(self) -> None:
        """Refuse several budgets at once."""
        self._budget()

    def targets(self, model: tf_keras.Model, selection: Selection) -> frozenset[str]:
        """Only the layers that can be factorized."""
        names = selection.names(model)
        return frozenset(k.layer.name for k in kernels(model) if k.layer.name in names and obstacle(k) is None)

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Choose form and rank for every layer, factorize, recover."""
        budget = self._budget()
        model = candidate.model
        pairs = {name for g in candidate.guarantees if isinstance(g, Rank) for name in g.ranks}
        counted: CostUnit = "params" if budget.unit == "params" else "macs"
        units, skipped = self._units(model, context.selection.names(model), pairs, counted)
        total = sum(k.macs for k in kernels(model)) if counted == "macs" else count_params(model)
        if not pairs and not any(form.cost[0] < unit.cost for unit in units for form in unit.forms):
            raise context.nothing_done("a layer that a factorization makes cheaper", skipped)
        choices = self._choose(units, budget, float(total), context.stage)
        for unit, choice in zip(units, choices, strict=True):
            if choice is None:
                skipped.append(Skipped(unit.name, "no factorization of it saves under this setting", True))
        chosen = [(unit, choice) for unit, choice in zip(units, choices, strict=True) if choice is not None]
        if not chosen:
            if pairs:
                return candidate.evolve(model=rewrite(model), skipped=context.skip(skipped))
            raise context.nothing_done("a layer that a factorization makes cheaper", skipped)
        replacements: dict[str, Sequence[NewLayer]] = {}
        for unit, (form, rank) in chosen:
            replacements.update(unit.factors(form, rank))
        result = candidate.evolve(model=rewrite(model, replacements), skipped=context.skip(skipped))
        result = result.replaced({old: [new.layer.name for new in chain] for old, chain in replacements.items()})
        ranks = {unit.name: rank for unit, (_, rank) in chosen}
        return context.recover(result.with_guarantee(Rank(context.stage, ranks)))

    def _budget(self) -> Budget:
        return one_budget(Budget("params", 0.8), macs=self.macs, params=self.params, energy=self.energy, rank=self.rank)

    def _units(
        self, model: tf_keras.Model, names: frozenset[str], pairs: set[str], counted: CostUnit
    ) -> tuple[list[Unit], list[Skipped]]:
        """Return what can be factorized: single layers, and pairs that an earlier stage made."""
        times = calls(model)
        by_layer = {k.layer.name: k for k in kernels(model)}
        reduced = {first_factor(name) for name in pairs}
        units: list[Unit] = []
        skipped = [
            Skipped(layer.name, f"weights of {type(layer).__name__} layers are not factorized")
            for layer in without_kernel(model)
            if layer.name in names
        ]
        for name, kernel in by_layer.items():
            if name not in names or name in reduced:
                continue
            reason = "called more than once" if times[name] > 1 else obstacle(kernel)
            if name in pairs:
                first = by_layer.get(first_factor(name))
                pair = None if reason or first is None else pair_unit(first, kernel, counted)
                if pair is None:
                    skipped.append(Skipped(name, reason or "a factor has been replaced since it was factorized"))
                else:
                    units.append(pair)
            elif first_factor(name) in by_layer:
                skipped.append(Skipped(name, f"the name {first_factor(name)} is taken"))
            elif reason is not None:
                skipped.append(Skipped(name, reason))
            else:
                units.append(single_unit(kernel, self.form, counted))
        return units, skipped

    def _choose(self, units: list[Unit], budget: Budget, total: float, stage: str) -> list[Choice | None]:
        if budget.unit == "rank":
            return [unit.at_rank(int(budget.keep)) for unit in units]
        if budget.unit == "energy":
            return [unit.at_error(1.0 - budget.keep) for unit in units]
        return allocate(units, budget.keep, total, stage, budget.unit)
