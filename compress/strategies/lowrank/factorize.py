"""Low-rank factorization: Dense and Conv2D layers as chains of smaller ones.

The forms name their sources (:mod:`compress.strategies.lowrank.forms`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import tf_keras
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate, Effect, Skipped
from compress.errors import CompressError
from compress.graph.kernels import kernels
from compress.graph.rewrite import NewLayer, rewrite
from compress.graph.selection import Selection
from compress.metrics.counts import count_macs, count_params
from compress.strategies.budget import Budget, one_budget
from compress.strategies.least_squares import is_linear
from compress.strategies.lowrank.allocation import allocate
from compress.strategies.lowrank.chain import CostUnit, build
from compress.strategies.lowrank.inner_norms import with_inner_norms
from compress.strategies.lowrank.latency import Timer, allocate_measured, random_chain, timed
from compress.strategies.lowrank.rank import Rank
from compress.strategies.lowrank.rebuild import Wanted, rebuild
from compress.strategies.lowrank.sensitivity import sensitivities
from compress.strategies.lowrank.units import Choice, Curve, Unit, collect, obstacle, rank_guarantee
from compress.strategies.lowrank.vbmf import vbmf_rank
from compress.strategies.options import refuse_without_effect
from compress.strategies.repair import Repair
from compress.strategies.strategy import STRICT, Context, Strategy
from compress.training import restore

VBMF = "vbmf"


def _rank(value: object) -> object:
    if value != VBMF and not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        raise ValueError(f"a whole number from 1, or {VBMF}")
    return value


_KEPT = 0.8
"""Of the parameters, where nothing says how far to go."""


@dataclass(frozen=True, config=STRICT)
class LowRank(Strategy):
    """Replace layers by chains of smaller ones where that saves, then recover.

    One of these says how far to go (if none does, 0.8 of the parameters of the layers that it may touch are kept):
        macs, params: share of the model's multiply-adds or parameters that is kept. Forms and ranks of all layers are
            chosen together, or layers left alone: the least error for the saving.
        latency: share of the latency on the board that is kept; layers that a chain makes no faster are left alone.
        energy: share of each layer's squared singular values that is kept.
        ranks: share of each layer's full rank that is kept.
        rank: the same rank for every layer; or ``vbmf``: as many as stand out from noise (variational Bayes), in the
            form that loses least at its own; a layer of which nothing stands out is left alone.

    Attributes:
        form: of convolutions; one of :mod:`compress.strategies.lowrank.forms`, or the best for each layer.
        fit: ``weights``: nearest to the kernels, without data. ``outputs``: nearest to what the layers give on
            ``images`` unlabelled samples, errors measured by the logits; each layer makes up for those before it, and
            the batch norms are measured anew, all in closed form.
        images: calibration samples of ``fit=outputs`` and ``batch_norm``.
        batch_norm: a batch norm behind every factor but the last, for the training afterwards; the export merges it.
    """

    macs: Annotated[float, Gt(0), Lt(1)] | None = None
    params: Annotated[float, Gt(0), Lt(1)] | None = None
    latency: Annotated[float, Gt(0), Lt(1)] | None = None
    energy: Annotated[float, Gt(0), Le(1)] | None = None
    ranks: Annotated[float, Gt(0), Lt(1)] | None = None
    rank: Annotated[int | Literal["vbmf"], BeforeValidator(_rank)] | None = None
    form: Literal["auto", "channel", "spatial", "tucker", "cp", "tensor_train"] = "auto"
    fit: Literal["weights", "outputs"] = "weights"
    images: Annotated[int, Ge(16), Le(1_000_000)] = 1000
    batch_norm: bool = False

    effects = frozenset({Effect.TRAIN, Effect.REPLACE})
    establishes = Rank

    def __post_init__(self) -> None:
        """Refuse several budgets at once, and fields that have no effect."""
        self._budget()
        needs_images = self.fit == "outputs" or self.batch_norm
        refuse_without_effect(self, [(needs_images, ("images",), "fit=outputs or batch_norm=true")])
        if self.rank == VBMF and self.form in ("cp", "tensor_train"):
            raise ValueError("a form that makes one matrix of a kernel (channel, spatial, tucker) with rank=vbmf")

    def targets(self, model: tf_keras.Model, selection: Selection) -> frozenset[str]:
        """Only the layers that can be factorized."""
        names = selection.names(model)
        return frozenset(k.layer.name for k in kernels(model) if k.layer.name in names and obstacle(k) is None)

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Choose form and rank for every layer, factorize, recover."""
        earlier = [found for found in candidate.guarantees if isinstance(found, Rank)]
        names = context.selection.names(candidate.model)
        whole, units, skipped = collect(candidate.model, names, earlier, self.form)
        self._require_rank(units, context)
        budget = self._budget(_part(candidate.model, names))
        units = self._costed(units, candidate.model, budget)
        again = any(unit.chain for unit in units)
        if not again and not any(len(curve.cost) for unit in units for curve in unit.curves):
            raise context.nothing_done("a layer that a factorization makes cheaper", skipped)
        repair = None
        if self.fit == "outputs":
            samples = context.calibration_samples(self.images)
            repair = Repair(whole, samples, context.seed, candidate.guarantees)
        units = self._with_errors(units, repair, context)
        choices, measured = self._choose(units, candidate, whole, context, skipped, budget)
        chosen = [(unit, choice) for unit, choice in zip(units, choices, strict=True) if choice is not None]
        # In the network's order: that of a set is another one in each process.
        taken = {unit.name for unit, _ in chosen}
        for name in dict.fromkeys(unit.name for unit in units if unit.name not in taken):
            skipped.append(Skipped(name, "no factorization of it saves under this setting", True))
        if not chosen and not again:
            raise context.nothing_done("a layer that a factorization makes cheaper", skipped)
        model, chains = self._factorized(units, choices, repair, whole, candidate)
        result = candidate.evolve(model=rewrite(model, chains), skipped=context.skip(skipped))
        if not chosen:
            return result
        if self.batch_norm:
            inner = [new.layer.name for unit, _ in chosen for new in chains[unit.name][:-1]]
            result = result.evolve(
                model=with_inner_norms(result.model, inner, context.calibration_samples(self.images))
            )
        result = result.replaced({unit.name: [new.layer.name for new in chains[unit.name]] for unit, _ in chosen})
        result = result.with_guarantee(rank_guarantee(context.stage, chosen))
        measured["macs_kept"] = count_macs(result.model) / count_macs(candidate.model)
        measured["layers_factorized"] = float(len(chosen))
        measured["layers_left_alone"] = float(len({unit.name for unit in units}) - len(chosen))
        return context.recover(result.evolve(measured=measured))

    def _budget(self, part: float = 1.0) -> Budget:
        """Return how far to go; ``part``: the layers' part in the parameters, for where nothing says it."""
        rank = self.rank if isinstance(self.rank, int) else None if self.rank is None else 0.0
        units = ("macs", "params", "latency", "energy", "ranks")
        default = Budget("params", 1.0 - (1.0 - _KEPT) * part)
        return one_budget(default, **{unit: getattr(self, unit) for unit in units}, rank=rank)

    def _require_rank(self, units: Sequence[Unit], context: Context) -> None:
        """Refuse a rank that no layer has."""
        if not isinstance(self.rank, int) or not units:
            return
        highest, name = max((unit.highest(form), unit.name) for unit in units for form in unit.forms)
        if self.rank > highest:
            raise CompressError(
                f"strategy.{context.stage}.rank",
                expected=f"at most {highest}, the highest full rank among the layers that it may touch ({name})",
                received=str(self.rank),
                fix="Lower it; a factorization saves only well below the full rank.",
            )

    def _costed(self, units: Sequence[Unit], model: tf_keras.Model, budget: Budget) -> list[Unit]:
        """Return the units with costs at the ranks of interest."""
        most = np.inf
        counted: CostUnit = "params" if budget.unit == "params" else "macs"
        if budget.unit in ("macs", "params") and self.fit == "weights":
            # No layer may cost more than all together. (Errors of outputs are measured for every budget alike.)
            most = budget.keep * _total(model, counted)
        found = []
        for unit in units:
            costs = {form: unit.paying(form, counted, most) for form in unit.forms}
            curves = tuple(Curve(form, cost, np.zeros(len(cost))) for form, cost in costs.items())
            found.append(replace(unit, cost=unit.counted(counted), curves=curves))
        return found

    def _with_errors(self, units: Sequence[Unit], repair: Repair | None, context: Context) -> list[Unit]:
        """Return the units with the errors of all forms at all ranks of interest."""
        if repair is None:
            return [
                replace(unit, curves=tuple(self._decomposed(unit, curve) for curve in unit.curves)) for unit in units
            ]
        wanted = {unit.name: {c.form: len(c.cost) for c in unit.curves if len(c.cost)} for unit in units}
        repair.measure_importance(unit.name for unit in units if is_linear(unit.kernel.layer))
        table = context.remember(
            "low-rank sensitivity",
            [{name: {form.name: most for form, most in row.items()} for name, row in wanted.items()}, self.images],
            lambda: sensitivities(repair, wanted),
        )
        key = "relative" if self.energy is not None else "change"

        def measured(unit: Unit, curve: Curve) -> Curve:
            return replace(curve, error=np.array(table[unit.name][curve.form.name][key])) if len(curve.cost) else curve

        return [replace(unit, curves=tuple(measured(unit, curve) for curve in unit.curves)) for unit in units]

    def _decomposed(self, unit: Unit, curve: Curve) -> Curve:
        most = len(curve.cost)
        if isinstance(self.rank, int):
            most = min(most, self.rank)
        if most == 0:
            return curve
        if self.rank == VBMF:
            # Noise is told from signal by the whole spectrum.
            most = unit.highest(curve.form)
        found = curve.form.decompose(unit.kernel.value, most)
        cost = curve.cost[:most]
        return replace(curve, cost=cost, error=found.errors[: len(cost)], decomposition=found)

    def _choose(
        self,
        units: Sequence[Unit],
        candidate: Candidate,
        whole: tf_keras.Model,
        context: Context,
        skipped: Sequence[Skipped],
        budget: Budget,
    ) -> tuple[list[Choice | None], dict[str, float]]:
        """Return form and rank for each unit, None for one that is left alone, and what was measured."""
        if self.rank == VBMF:
            return [_vbmf_choice(unit) for unit in units], {}
        if budget.unit == "rank":
            return [unit.at_rank(int(budget.keep)) for unit in units], {}
        if budget.unit == "ranks":
            return [unit.at_share(budget.keep) for unit in units], {}
        if budget.unit == "energy":
            return [unit.at_error(1.0 - budget.keep) for unit in units], {}
        if budget.unit != "latency":
            counted: CostUnit = "params" if budget.unit == "params" else "macs"
            return allocate(
                units, budget.keep, _total(candidate.model, counted), context.stage, budget.unit, skipped
            ), {}
        timer = Timer(candidate, context)
        total = timer.of_file(candidate)

        def share_of(choices: Sequence[Choice | None]) -> float:
            chains = {}
            for unit, choice in zip(units, choices, strict=True):
                if choice is not None:
                    chains[unit.name] = random_chain(unit, *choice)
                elif unit.chain:
                    chains[unit.name] = build(unit.forms[0], unit.kernel.layer, unit.chain)
            trial = candidate.evolve(model=rewrite(whole, chains), guarantees=())
            return timer.of_file(trial.replaced({k: [n.layer.name for n in v] for k, v in chains.items()})) / total

        choices, share = allocate_measured(timed(units, timer), budget.keep, total, share_of, context)
        return choices, {"latency_kept": share}

    def _factorized(
        self,
        units: Sequence[Unit],
        choices: Sequence[Choice | None],
        repair: Repair | None,
        whole: tf_keras.Model,
        candidate: Candidate,
    ) -> tuple[tf_keras.Model, dict[str, list[NewLayer]]]:
        """Return a model of the structure of ``whole``, and the chains that are to take the places of its layers."""
        wanted = {
            unit.name: Wanted(*choice) if choice else Wanted(unit.forms[0], unit.highest(unit.forms[0]), unit.chain)
            for unit, choice in zip(units, choices, strict=True)
            if choice or unit.chain
        }
        if repair is not None:
            model, factors = rebuild(repair, wanted)
            restore(model, candidate.guarantees)
            return model, {
                name: build(wanted[name].form, model.get_layer(name), found) for name, found in factors.items()
            }
        chains = {}
        for unit, choice in zip(units, choices, strict=True):
            if choice is not None:
                form, rank = choice
                known = next(curve.decomposition for curve in unit.curves if curve.form is form)
                assert known is not None
                chains[unit.name] = build(form, unit.kernel.layer, known.factors(rank))
            elif unit.chain:
                chains[unit.name] = build(unit.forms[0], unit.kernel.layer, unit.chain)
        return whole, chains


def _part(model: tf_keras.Model, names: Collection[str]) -> float:
    """Return the part of the kernels' parameters that these layers have."""
    sizes = [(kernel.layer.name in names, kernel.value.size) for kernel in kernels(model)]
    return sum(size for own, size in sizes if own) / max(sum(size for _, size in sizes), 1)


def _total(model: tf_keras.Model, unit: CostUnit) -> float:
    return float(count_params(model) if unit == "params" else count_macs(model))


def _vbmf_choice(unit: Unit) -> Choice | None:
    """Return the form with the least error at the rank that stands out from noise, if there is one that saves."""
    options = []
    for curve in unit.curves:
        kernel = unit.kernel.value
        found = curve.decomposition or curve.form.decompose(kernel, curve.form.highest(kernel.shape))
        rank = 0 if found.spectrum is None else vbmf_rank(found.spectrum)
        if 0 < rank <= len(curve.cost):
            options.append((float(curve.error[rank - 1]), (curve.form, rank)))
    return min(options, key=lambda option: option[0])[1] if options else None
