"""Compact filters: ordinary convolutions become cheaper kinds of convolution that start from the old ones.

The forms name their sources (:mod:`compress.strategies.compact.forms`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import tf_keras
from annotated_types import Ge, Gt, Le, Lt
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate, Effect, Guarantee, Skipped
from compress.errors import CompressError
from compress.graph.fold import fold_batch_norm
from compress.graph.kernels import Kernel, kernels
from compress.graph.rewrite import calls, rewrite
from compress.graph.selection import Selection
from compress.metrics.counts import count_macs
from compress.strategies.compact.form import Form, Parts, obstacle
from compress.strategies.compact.forms.crelu import CRelu
from compress.strategies.compact.forms.fire import Fire
from compress.strategies.compact.forms.grouped import Grouped
from compress.strategies.compact.forms.octave import Octave
from compress.strategies.compact.forms.separable import Separable
from compress.strategies.compact.guarantees import Compacted
from compress.strategies.compact.order import free_filters, ordered
from compress.strategies.compact.rebuild import changes, rebuild
from compress.strategies.goal import Goal
from compress.strategies.options import refuse_without_effect
from compress.strategies.repair import Repair, rectified
from compress.strategies.strategy import STRICT, Context, Strategy
from compress.training import restore


@dataclass(frozen=True, config=STRICT)
class Compact(Strategy):
    """Replace Conv2D layers by cheaper kinds of convolution where that saves multiply-adds, then recover.

    Attributes:
        form: one of :mod:`compress.strategies.compact.forms`.
        depth_multiplier: of ``separable``: spatial filters for each input channel.
        groups, shuffle: of ``grouped``: how many groups, and whether a channel shuffle comes before the convolution.
        squeeze: of ``fire``: channels of the squeeze layer, as a share of the fewer of inputs and filters.
        alpha: of ``octave``: share of the channels at half the resolution.
        macs: replace, the least damaging saving first, until this share of the model's multiply-adds is left; all that
            pay if null.
        fit: ``weights``: nearest to the kernels, without data. ``outputs``: nearest to what the layers give on
            ``images`` unlabelled samples, damage measured by the logits; each layer makes up for those before it.
        images: calibration samples of ``fit=outputs``.
    """

    form: Literal["separable", "grouped", "fire", "octave", "crelu"] = "separable"
    depth_multiplier: Annotated[int, Ge(1)] = 1
    groups: Annotated[int, Ge(2)] = 2
    shuffle: bool = True
    squeeze: Annotated[float, Gt(0), Lt(1)] = 0.5
    alpha: Annotated[float, Gt(0), Lt(1)] = 0.5
    macs: Annotated[float, Gt(0), Lt(1)] | None = None
    fit: Literal["weights", "outputs"] = "weights"
    images: Annotated[int, Ge(16), Le(1_000_000)] = 1000

    effects = frozenset({Effect.TRAIN, Effect.REPLACE})
    establishes = Compacted

    def __post_init__(self) -> None:
        """Refuse fields that have no effect."""
        refuse_without_effect(
            self,
            [
                (self.form == "separable", ("depth_multiplier",), "form=separable"),
                (self.form == "grouped", ("groups", "shuffle"), "form=grouped"),
                (self.form == "fire", ("squeeze",), "form=fire"),
                (self.form == "octave", ("alpha",), "form=octave"),
                (self.fit == "outputs", ("images",), "fit=outputs"),
            ],
        )

    def targets(self, model: tf_keras.Model, selection: Selection) -> frozenset[str]:
        """Only the Conv2D layers that can be replaced."""
        return frozenset(self._collect(model, selection.names(model), ())[0])

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Choose layers, replace them, recover."""
        names = context.selection.names(candidate.model)
        found, skipped = self._collect(candidate.model, names, candidate.guarantees)
        form, chosen = self._form(), list(found)
        if found:
            damage = self._damage(candidate, form, found, context)
            chosen = self._within_budget(candidate.model, form, found, damage, context.stage)
        left = sorted(set(found) - set(chosen))
        skipped += [Skipped(name, "not needed for the budget", True) for name in left]
        if not chosen:
            if any(isinstance(guarantee, Compacted) for guarantee in candidate.guarantees):
                return candidate.evolve(model=rewrite(candidate.model), skipped=context.skip(skipped))
            raise context.nothing_done(f"a Conv2D that is cheaper in the form {form.name}", skipped)
        candidate, parts = self._fitted(candidate, dict.fromkeys(chosen, form), context)
        model = candidate.model
        compacted = rewrite(model, {name: form.build(model.get_layer(name), found) for name, found in parts.items()})
        result = candidate.evolve(model=compacted, skipped=context.skip(skipped))
        result = result.replaced({name: form.added(name) for name in chosen})
        return context.recover(result.with_guarantee(form.guarantee(context.stage, chosen)))

    def _form(self) -> Form:
        match self.form:
            case "grouped":
                return Grouped(self.groups, self.shuffle)
            case "fire":
                return Fire(self.squeeze)
            case "octave":
                return Octave(self.alpha)
            case "crelu":
                return CRelu()
        return Separable(self.depth_multiplier)

    def _collect(
        self, model: tf_keras.Model, names: frozenset[str], guarantees: Sequence[Guarantee]
    ) -> tuple[dict[str, Kernel], list[Skipped]]:
        """Return the layers that can be replaced, in order, and the others with the reason."""
        form, times = self._form(), calls(model)
        done = {name for found in guarantees if isinstance(found, Compacted) for name in found.layers}
        taken = {layer.name for layer in model.layers}
        rectifying = free = None
        if form.before_relu:
            rectifying, free = rectified(fold_batch_norm(model), ()), free_filters(model, guarantees)
        found: dict[str, Kernel] = {}
        skipped: list[Skipped] = []
        for kernel in kernels(model):
            layer, name = kernel.layer, kernel.layer.name
            if name in names and isinstance(layer, (tf_keras.layers.Conv1D, tf_keras.layers.Conv3D)):
                skipped.append(Skipped(name, f"{type(layer).__name__} layers are not made {form.name}"))
            if name not in names or not isinstance(layer, tf_keras.layers.Conv2D):
                continue
            if isinstance(layer, tf_keras.layers.DepthwiseConv2D) or name in done:
                skipped.append(Skipped(name, "already separable or of another compact form", True))
                continue
            reason = obstacle(layer) or form.misfit(layer)
            if reason is None and rectifying is not None and name not in rectifying:
                reason = "no ReLU alone reads it"
            if reason is None and free is not None and name not in free:
                reason = "its filters cannot be put in another order"
            if reason is None and form.macs(kernel) >= kernel.macs:
                reason = f"a {form.name} one would not be cheaper"
            if reason is None and times[name] > 1:
                reason = "called more than once"
            clash = sorted(set(form.added(name)) & taken)
            if reason is None and clash:
                reason = f"the name {clash[0]} is taken"
            if reason is not None:
                skipped.append(Skipped(name, reason))
                continue
            found[name] = kernel
        return found, skipped

    def _samples(self, context: Context) -> np.ndarray | None:
        return context.calibration_samples(self.images) if self.fit == "outputs" else None

    def _damage(
        self, candidate: Candidate, form: Form, found: Mapping[str, Kernel], context: Context
    ) -> dict[str, float]:
        """Return what replacing each layer alone costs: of its weights' squares, or of the logits'."""
        if self.macs is None:
            return dict.fromkeys(found, 0.0)
        chosen, samples = dict.fromkeys(found, form), self._samples(context)
        candidate = ordered(candidate, chosen, samples, context.seed)
        if samples is not None:
            repair = _repair(candidate, samples, chosen, context)
            measured: dict[str, float] = context.remember(
                "compact sensitivity", [repr(form), self.images, list(found)], lambda: changes(repair, chosen)
            )
            return measured
        goals = {name: Goal(np.asarray(candidate.model.get_layer(name).kernel)) for name in found}
        return {name: form.loss(goal, form.nearest(goal)) for name, goal in goals.items()}

    def _within_budget(
        self,
        model: tf_keras.Model,
        form: Form,
        found: Mapping[str, Kernel],
        damage: Mapping[str, float],
        stage: str,
    ) -> list[str]:
        """Return the layers to replace, in the order of the model."""
        if self.macs is None:
            return list(found)
        total = count_macs(model)
        saved = {name: kernel.macs - form.macs(kernel) for name, kernel in found.items()}
        needed = total * (1 - self.macs)
        if sum(saved.values()) < needed:
            field = None if form == Separable(1) else _STRENGTH[form.name]
            advice = f" or {field[0]} strategy.{stage}.{field[1]}" if field else ""
            raise CompressError(
                f"strategy.{stage}.macs",
                expected=f"at least {1 - sum(saved.values()) / total:.3f}, what replacing every layer that pays leaves",
                received=f"{self.macs:g}",
                fix=f"Raise strategy.{stage}.macs{advice}.",
            )
        ranked = sorted(found, key=lambda name: (damage[name] / saved[name], name))
        sums = np.cumsum([saved[name] for name in ranked])
        chosen = set(ranked[: int(np.searchsorted(sums, needed)) + 1])
        return [name for name in found if name in chosen]

    def _fitted(
        self, candidate: Candidate, chosen: Mapping[str, Form], context: Context
    ) -> tuple[Candidate, dict[str, Parts]]:
        """Return a candidate of the original's structure, and the parts of what is to take its layers' places."""
        samples = self._samples(context)
        candidate = ordered(candidate, chosen, samples, context.seed)
        if samples is None:
            kernel_of = {name: np.asarray(candidate.model.get_layer(name).kernel) for name in chosen}
            return candidate, {name: form.nearest(Goal(kernel_of[name])) for name, form in chosen.items()}
        model, parts = rebuild(_repair(candidate, samples, chosen, context), chosen)
        restore(model, candidate.guarantees)
        return candidate.evolve(model=model), parts


_STRENGTH = {
    "separable": ("lower", "depth_multiplier"),
    "grouped": ("raise", "groups"),
    "fire": ("lower", "squeeze"),
    "octave": ("raise", "alpha"),
    "crelu": None,
}
"""Form -> how which field makes it cheaper."""


def _repair(candidate: Candidate, samples: np.ndarray, layers: Mapping[str, Form], context: Context) -> Repair:
    repair = Repair(candidate.model, samples, context.seed, candidate.guarantees)
    repair.measure_importance(layers)
    return repair
