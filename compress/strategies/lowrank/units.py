"""The layers that may be factorized: what each costs, and the forms and ranks that it may have instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import tf_keras

from compress.candidate import Skipped
from compress.graph.kernels import Kernel, kernels, without_kernel
from compress.graph.rewrite import NewLayer, calls, rewrite
from compress.strategies.lowrank.chain import CostUnit, cost, fits, layer_names, read
from compress.strategies.lowrank.form import Decomposition, Form
from compress.strategies.lowrank.forms import forms
from compress.strategies.lowrank.rank import Rank, first_factor

AUTO = "auto"


@dataclass(frozen=True)
class Curve:
    """One form of a layer: ``cost[r - 1]`` at rank r, in the budget's unit, and its error.

    ``error`` is relative to the kernel's squares, or the change of the logits, as the stage measures it.
    """

    form: Form
    cost: np.ndarray
    error: np.ndarray
    decomposition: Decomposition | None = None


Choice = tuple[Form, int]


@dataclass(frozen=True)
class Unit:
    """A layer, or a chain that an earlier stage made of one: what it costs as it is, and what it can become."""

    kernel: Kernel
    """Of the layer, or of the layer that the chain multiplies out to."""
    cost: float
    forms: tuple[Form, ...]
    chain: tuple[np.ndarray, ...] = ()
    """The factors of the chain, in the only form that it may have."""
    curves: tuple[Curve, ...] = ()

    @property
    def name(self) -> str:
        """Name of the layer, the last of the chain."""
        return self.kernel.layer.name

    def highest(self, form: Form) -> int:
        """Return the full rank in a form; of a chain, the rank that it has."""
        shape = self.kernel.value.shape
        most = form.highest(shape)
        if not self.chain:
            return most
        widths = form.widths(shape, np.arange(1, most + 1))
        now: dict[str, int] = {}
        for term, factor in zip(form.terms, self.chain, strict=True):
            now |= dict(zip(term, factor.shape, strict=True))
        within = np.all([widths[letter] <= now[letter] for letter in widths], axis=0)
        return max(int(within.sum()), 1)

    def paying(self, form: Form, unit: CostUnit, most_cost: float = np.inf) -> np.ndarray:
        """Return the costs of the form at the ranks where they are below the layer's, and no more than ``most_cost``.

        The last is the highest rank that is worth a look.
        """
        costs = cost(form, self.kernel, np.arange(1, self.highest(form) + 1), unit)
        paying = costs[costs < self.counted(unit)]
        return paying[: max(1, int((paying <= most_cost).sum()))]

    def counted(self, unit: CostUnit) -> float:
        """Return the weights or multiply-adds of the layer, or chain, as it is."""
        if not self.chain:
            return float(self.kernel.size * (1.0 if unit == "params" else self.kernel.macs_per_weight))
        widths = np.array([self.highest(self.forms[0])])
        return float(cost(self.forms[0], self.kernel, widths, unit)[0])

    def at_rank(self, rank: int) -> Choice | None:
        """Return the form with the least error at ``rank``, if it saves."""
        options = [curve for curve in self.curves if len(curve.cost) >= rank and curve.cost[rank - 1] < self.cost]
        best = min(options, key=lambda curve: float(curve.error[rank - 1]), default=None)
        return None if best is None else (best.form, rank)

    def at_share(self, share: float) -> Choice | None:
        """Return the form with the least error at a share of its full rank, if it saves."""
        options = [(curve, max(1, round(share * self.highest(curve.form)))) for curve in self.curves]
        options = [(curve, rank) for curve, rank in options if rank <= len(curve.cost)]
        if not options:
            return None
        curve, rank = min(options, key=lambda option: float(option[0].error[option[1] - 1]))
        return curve.form, rank

    def at_error(self, error: float) -> Choice | None:
        """Return the cheapest form and rank whose error is at most ``error``, if it saves."""
        options = []
        for curve in self.curves:
            rank = int((curve.error > error + 1e-12).sum()) + 1
            if rank <= len(curve.cost) and curve.cost[rank - 1] < self.cost:
                options.append((float(curve.cost[rank - 1]), (curve.form, rank)))
        return min(options, key=lambda option: option[0])[1] if options else None

    def at_price(self, price: float) -> tuple[Curve, int] | None:
        """Return the curve and rank with the least error + price * relative cost; None: the layer as it is."""
        best, choice = price, None
        for curve in self.curves:
            score = np.where(curve.cost < self.cost, curve.error + price * curve.cost / self.cost, np.inf)
            if len(score) and score.min() < best:
                best, choice = float(score.min()), (curve, int(np.argmin(score)) + 1)
        return choice


def collect(
    model: tf_keras.Model, names: frozenset[str], guarantees: Sequence[Rank], form: str
) -> tuple[tf_keras.Model, list[Unit], list[Skipped]]:
    """Return the model with its chains multiplied out, what may be factorized in it, and what not, and why.

    Args:
        model: a flat model.
        names: the layers that may be touched.
        guarantees: of earlier stages of this kind.
        form: a form's name, or ``auto``.
    """
    chained = {name: found.forms.get(name) for found in guarantees for name in found.ranks}
    parts = {name: chain for name, kind in chained.items() if (chain := _chain(model, name, kind)) and name in names}
    merged: dict[str, Sequence[NewLayer]] = {}
    for name, (kind, layers) in parts.items():
        merged.update({layer.name: [] for layer in layers[:-1]})
        merged[name] = [_multiplied_out(kind, layers)]
    whole = rewrite(model, merged)
    times, units = calls(whole), []
    bound = {layer for found in guarantees for layer in found.layers} - set(chained)
    skipped = [
        Skipped(layer.name, f"weights of {type(layer).__name__} layers are not factorized")
        for layer in without_kernel(model)
        if layer.name in names
    ]
    present = {layer.name for layer in whole.layers}
    for kernel in kernels(whole):
        name, layer = kernel.layer.name, kernel.layer
        if name not in names or name in bound:
            continue
        reason = "called more than once" if times[name] > 1 else obstacle(kernel)
        if reason is None and name in chained and name not in parts:
            reason = "its factors are no longer a chain of their own"
        chosen = () if reason else (parts[name][0],) if name in parts else _forms(layer, form)
        taken = sorted({part for kind in chosen for part in layer_names(kind, name)[:-1]} & present)
        if reason or taken:
            skipped.append(Skipped(name, reason or f"the name {taken[0]} is taken"))
            continue
        unit = Unit(kernel, 0.0, chosen)
        if name in parts:
            unit = replace(unit, chain=tuple(read(*parts[name])))
        units.append(unit)
    return whole, units, skipped


def obstacle(kernel: Kernel) -> str | None:
    """Say why the layer cannot be factorized."""
    layer = kernel.layer
    if isinstance(layer, tf_keras.layers.Dense):
        return None if min(layer.kernel.shape) > 1 else "its matrix has rank 1"
    if type(layer) is not tf_keras.layers.Conv2D:
        return f"{type(layer).__name__} is not a Dense or Conv2D layer"
    if layer.groups > 1:
        return "a grouped convolution"
    if layer.data_format != "channels_last":
        return "channels first"
    return None


def _forms(layer: tf_keras.layers.Layer, name: str) -> tuple[Form, ...]:
    """Return the forms that a layer may have; one that cannot have the form that is asked for has the simplest."""
    fitting = [form for form in forms().values() if form.misfit(layer) is None]
    chosen = [form for form in fitting if (form.automatic if name == AUTO else form.name == name)]
    return tuple(chosen or [form for form in fitting if form.name in ("dense", "channel")])


def _chain(model: tf_keras.Model, name: str, kind: str | None) -> tuple[Form, list[tf_keras.layers.Layer]] | None:
    """Return the form and the layers of a chain that is still one."""
    layers = {layer.name: layer for layer in model.layers}
    form = forms().get(kind or "")
    if form is None:
        return None
    found = [layers.get(part) for part in layer_names(form, name)]
    between = [layer for layer in found[1:] if layer is not None]
    joined = all(
        [parent.layer.name for node in layer.inbound_nodes for parent in node.parent_nodes] == [before]
        for layer, before in zip(between, layer_names(form, name), strict=False)
    )
    if not fits(form, found) or not joined:
        return None
    return form, [layer for layer in found if layer is not None]


def _multiplied_out(form: Form, layers: Sequence[tf_keras.layers.Layer]) -> NewLayer:
    kernel, last = form.compose(read(form, layers)), layers[-1]
    bias = (np.asarray(last.bias),) if last.use_bias else ()
    config = last.get_config()
    if form.letters != "cf":
        moving = [layer for layer, term in zip(layers, form.terms, strict=True) if set(term) & set("yx")]
        config |= {
            "kernel_size": kernel.shape[:2],
            "strides": tuple(max(layer.strides[axis] for layer in layers) for axis in (0, 1)),
            "dilation_rate": tuple(max(layer.dilation_rate[axis] for layer in layers) for axis in (0, 1)),
            "padding": moving[0].padding if moving else last.padding,
        }
    return NewLayer(last.__class__.from_config(config), (kernel.astype(np.float32), *bias))


def widths_of(form: Form, unit: Unit, rank: int) -> Mapping[str, int]:
    """Return layer of the chain, but the last -> how many channels it writes at this rank."""
    shape = unit.kernel.value.shape
    sizes = {letter: int(size[0]) for letter, size in form.widths(shape, np.array([rank])).items()}
    names = layer_names(form, unit.name)
    return {name: sizes[term[-1]] for name, term in zip(names[:-1], form.terms[:-1], strict=True)}


def rank_guarantee(stage: str, chosen: Sequence[tuple[Unit, Choice]]) -> Rank:
    """Return what is guaranteed of the layers that were factorized."""
    every = {unit.name: dict(widths_of(form, unit, rank)) for unit, (form, rank) in chosen}
    ranks = {name: widths.pop(first_factor(name)) for name, widths in every.items()}
    inner = {name: width for widths in every.values() for name, width in widths.items()}
    return Rank(stage, ranks, {unit.name: form.name for unit, (form, _) in chosen}, inner)
