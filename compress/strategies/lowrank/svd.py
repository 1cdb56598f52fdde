"""Low-rank factorization of Dense and Conv2D layers by singular value decomposition.

Sources: Denton et al. (arXiv 1404.0736) for Dense layers and the channel form; Jaderberg et al. (arXiv 1405.3866,
scheme 2) and Tai et al. (arXiv 1511.06067) for the spatial form, whose closed-form optimum is an SVD.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np
import tf_keras
from annotated_types import Ge, Gt, Le, Lt
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate, Effect, Skipped
from compress.errors import CompressError
from compress.graph.kernels import Kernel, kernels
from compress.graph.rewrite import NewLayer, calls, rewrite
from compress.graph.selection import Selection
from compress.metrics.counts import count_params
from compress.strategies.budget import Budget, one_budget
from compress.strategies.lowrank.rank import Rank, first_factor
from compress.strategies.strategy import STRICT, Context, Strategy

Form = Literal["auto", "spatial", "channel"]


@dataclass(frozen=True, config=STRICT)
class LowRank(Strategy):
    """Replace layers by products of two smaller ones where that saves, then recover.

    One of these says how far to go (``macs`` of 0.7, if none does):
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

    def targets(self, model: tf_keras.Model, selection: Selection) -> frozenset[str]:
        """Only the layers that can be factorized."""
        names = selection.names(model)
        return frozenset(k.layer.name for k in kernels(model) if k.layer.name in names and _obstacle(k) is None)

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Choose form and rank for every layer, factorize, recover."""
        budget = one_budget(
            context.stage, Budget("macs", 0.7), macs=self.macs, params=self.params, energy=self.energy, rank=self.rank
        )
        model = candidate.model
        pairs = {name for g in candidate.guarantees if isinstance(g, Rank) for name in g.ranks}
        units, skipped = self._units(model, context.selection.names(model), pairs)
        total = sum(k.macs for k in kernels(model)) if budget.unit == "macs" else count_params(model)
        choices = self._choose(units, budget, float(total), context.stage)
        for unit, choice in zip(units, choices, strict=True):
            if choice is None:
                skipped.append(Skipped(unit.name, "no factorization of it saves under this setting"))
        chosen = [(unit, choice) for unit, choice in zip(units, choices, strict=True) if choice is not None]
        if not chosen:
            if pairs:
                return candidate.evolve(model=rewrite(model), skipped=context.skip(skipped))
            raise context.nothing_done("a layer that a factorization makes cheaper", skipped)
        replacements: dict[str, Sequence[NewLayer]] = {}
        for unit, (form, rank) in chosen:
            replacements.update(unit.factors(form, rank))
        result = candidate.evolve(model=rewrite(model, replacements), skipped=context.skip(skipped))
        ranks = {unit.name: rank for unit, (_, rank) in chosen}
        return context.recover(result.with_guarantee(Rank(context.stage, ranks)))

    def _units(
        self, model: tf_keras.Model, names: frozenset[str], pairs: set[str]
    ) -> tuple[list[_Unit], list[Skipped]]:
        """Return what can be factorized: single layers, and pairs that an earlier stage made."""
        times = calls(model)
        by_layer = {k.layer.name: k for k in kernels(model)}
        reduced = {first_factor(name) for name in pairs}
        units: list[_Unit] = []
        skipped: list[Skipped] = []
        for name, kernel in by_layer.items():
            if name not in names or name in reduced:
                continue
            reason = "called more than once" if times[name] > 1 else _obstacle(kernel)
            if name in pairs:
                first = by_layer[first_factor(name)]
                pair = None if reason else _pair_unit(first, kernel)
                if pair is None:
                    skipped.append(Skipped(name, reason or "a factor has been replaced since it was factorized"))
                else:
                    units.append(pair)
            elif reason is not None:
                skipped.append(Skipped(name, reason))
            else:
                units.append(_single_unit(kernel, self.form))
        return units, skipped

    def _choose(self, units: list[_Unit], budget: Budget, total: float, stage: str) -> list[tuple[_Form, int] | None]:
        if budget.unit == "rank":
            return [unit.at_rank(int(budget.keep)) for unit in units]
        if budget.unit == "energy":
            return [unit.at_error(1.0 - budget.keep) for unit in units]
        cost = (lambda u: u.macs_per_weight) if budget.unit == "macs" else (lambda u: 1.0)
        return _allocate(units, cost, budget.keep, total, stage, budget.unit)


@dataclasses.dataclass(frozen=True)
class _Form:
    """One way to write a layer as a product: its singular values and what a rank costs.

    ``error[r - 1]`` is the relative squared error at rank r, ``weights[r - 1]`` the number of weights of both
    factors in units of the layer's own multiply-adds per weight.
    """

    name: str
    error: np.ndarray
    weights: np.ndarray
    build: Callable[[int], list[NewLayer]]


@dataclasses.dataclass(frozen=True)
class _Unit:
    """A layer, or a pair made by an earlier stage, and the forms it can take."""

    name: str
    size: int
    macs_per_weight: float
    forms: tuple[_Form, ...]
    replaces: tuple[str, ...]

    def factors(self, form: _Form, rank: int) -> dict[str, Sequence[NewLayer]]:
        """Return the replacements in the graph."""
        layers = form.build(rank)
        if len(self.replaces) == 1:
            return {self.replaces[0]: layers}
        return {old: [new] for old, new in zip(self.replaces, layers, strict=True)}

    def at_rank(self, rank: int) -> tuple[_Form, int] | None:
        """Return the form with the least error at ``rank``, if it saves."""
        options = [(f, min(rank, len(f.error))) for f in self.forms]
        options = [(f, r) for f, r in options if f.weights[r - 1] < self.size]
        return min(options, key=lambda o: float(o[0].error[o[1] - 1]), default=None)

    def at_error(self, error: float) -> tuple[_Form, int] | None:
        """Return the cheapest form and rank whose error is at most ``error``, if it saves."""
        options = [(f, min(int((f.error > error + 1e-12).sum()) + 1, len(f.error))) for f in self.forms]
        options = [(f, r) for f, r in options if f.weights[r - 1] < self.size]
        return min(options, key=lambda o: float(o[0].weights[o[1] - 1]), default=None)

    def at_price(self, price: float) -> tuple[_Form, int] | None:
        """Return the form and rank with the least error + price * relative cost; None: the layer as it is."""
        best, choice = price, None
        for form in self.forms:
            score = form.error + price * form.weights / self.size
            rank = int(np.argmin(score)) + 1
            if score[rank - 1] < best and form.weights[rank - 1] < self.size:
                best, choice = float(score[rank - 1]), (form, rank)
        return choice


def _allocate(
    units: list[_Unit],
    cost: Callable[[_Unit], float],
    keep: float,
    total: float,
    stage: str,
    unit_name: str,
) -> list[tuple[_Form, int] | None]:
    """Choose all ranks together: least sum of relative errors for the saving (Lagrange multiplier, bisected)."""

    def weight(unit: _Unit) -> float:
        return cost(unit) * unit.size / total

    def choose(multiplier: float) -> list[tuple[_Form, int] | None]:
        return [unit.at_price(multiplier * weight(unit)) for unit in units]

    def kept(choices: list[tuple[_Form, int] | None]) -> float:
        saved = sum(
            cost(unit) * (unit.size - float(choice[0].weights[choice[1] - 1]))
            for unit, choice in zip(units, choices, strict=True)
            if choice is not None
        )
        return 1.0 - saved / total

    low, high = 0.0, 1e9
    if kept(choose(high)) > keep:
        raise CompressError(
            f"strategy.{stage}.{unit_name}",
            expected=f"at least {kept(choose(high)):.3f}, what rank 1 in every layer it may touch leaves",
            received=f"{keep:g}",
            fix=f"Raise strategy.{stage}.{unit_name} or widen strategy.{stage}.only.",
        )
    for _ in range(100):
        middle = float(np.sqrt(max(low, 1e-9) * high))
        low, high = (low, middle) if kept(choose(middle)) <= keep else (middle, high)
        if high / max(low, 1e-9) < 1 + 1e-9:
            break
    choices = choose(high)
    _spend(units, choices, cost, (keep - kept(choices)) * total)
    return choices


def _spend(
    units: list[_Unit], choices: list[tuple[_Form, int] | None], cost: Callable[[_Unit], float], rest: float
) -> None:
    """Raise ranks in ``choices`` while the rest of the budget lasts, the largest fall of the error first.

    One price for all layers can only reach points of the convex hull, and may stop well short of the budget.
    """
    while True:
        best: tuple[float, int, int, float] | None = None
        for index, (unit, choice) in enumerate(zip(units, choices, strict=True)):
            if choice is None:
                continue
            form, rank = choice
            limit = min(unit.size, float(form.weights[rank - 1]) + rest / cost(unit))
            highest = int((form.weights < limit).sum())
            if highest > rank:
                fall = float(form.error[rank - 1] - form.error[highest - 1])
                price = cost(unit) * float(form.weights[highest - 1] - form.weights[rank - 1])
                if best is None or fall > best[0]:
                    best = (fall, index, highest, price)
        if best is None:
            return
        _, index, highest, price = best
        choices[index] = (choices[index][0], highest)  # type: ignore[index]
        rest -= price


def _obstacle(kernel: Kernel) -> str | None:
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


def _svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return (left * sqrt(s), sqrt(s) * right, error by rank, s) with the error relative to the whole energy."""
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    energy = values**2
    error = 1.0 - np.cumsum(energy) / energy.sum() if energy.sum() > 0 else np.zeros_like(energy)
    root = np.sqrt(values)
    return left * root, root[:, None] * right, np.maximum(error, 0.0), values


def _single_unit(kernel: Kernel, form: Form) -> _Unit:
    layer = kernel.layer
    if isinstance(layer, tf_keras.layers.Dense):
        forms = [_dense_form(layer)]
    else:
        height, width = layer.kernel.shape[:2]
        forms = []
        if form in ("auto", "channel"):
            forms.append(_channel_form(layer))
        if form in ("auto", "spatial") and height > 1 and width > 1:
            forms.append(_spatial_form(layer))
        if not forms:
            forms.append(_channel_form(layer))
    return _Unit(layer.name, kernel.size, kernel.macs_per_weight, tuple(forms), (layer.name,))


def _bias(layer: tf_keras.layers.Layer) -> tuple[np.ndarray, ...]:
    return (np.asarray(layer.bias),) if layer.use_bias else ()


def _dense_form(layer: tf_keras.layers.Dense) -> _Form:
    matrix = np.asarray(layer.kernel)
    left, right, error, _ = _svd(matrix)
    ranks = np.arange(1, len(error) + 1)

    def build(rank: int) -> list[NewLayer]:
        first = tf_keras.layers.Dense(rank, use_bias=False, name=first_factor(layer.name))
        last = tf_keras.layers.Dense.from_config(layer.get_config())
        return [
            NewLayer(first, (left[:, :rank].astype(matrix.dtype),)),
            NewLayer(last, (right[:rank].astype(matrix.dtype), *_bias(layer))),
        ]

    return _Form("dense", error, ranks * float(sum(matrix.shape)), build)


def _channel_form(layer: tf_keras.layers.Conv2D) -> _Form:
    kernel = np.asarray(layer.kernel)
    height, width, channels, filters = kernel.shape
    left, right, error, _ = _svd(kernel.reshape(-1, filters))
    ranks = np.arange(1, len(error) + 1)

    def build(rank: int) -> list[NewLayer]:
        first = _conv(layer, first_factor(layer.name), rank, (height, width), layer.strides)
        last = _last_conv(layer, kernel_size=(1, 1), strides=(1, 1), padding="valid", dilation_rate=(1, 1))
        return [
            NewLayer(first, (left[:, :rank].reshape(height, width, channels, rank).astype(kernel.dtype),)),
            NewLayer(last, (right[:rank].reshape(1, 1, rank, filters).astype(kernel.dtype), *_bias(layer))),
        ]

    return _Form("channel", error, ranks * float(height * width * channels + filters), build)


def _spatial_form(layer: tf_keras.layers.Conv2D) -> _Form:
    kernel = np.asarray(layer.kernel)
    height, width, channels, filters = kernel.shape
    left, right, error, _ = _svd(kernel.transpose(0, 2, 1, 3).reshape(height * channels, width * filters))
    ranks = np.arange(1, len(error) + 1)
    # The first factor runs before the horizontal stride, so it is applied at that many times more positions.
    weights = ranks * float(height * channels * layer.strides[1] + width * filters)

    def build(rank: int) -> list[NewLayer]:
        first = _conv(
            layer, first_factor(layer.name), rank, (height, 1), (layer.strides[0], 1), (layer.dilation_rate[0], 1)
        )
        last = _last_conv(
            layer,
            kernel_size=(1, width),
            strides=(1, layer.strides[1]),
            dilation_rate=(1, layer.dilation_rate[1]),
        )
        columns = left[:, :rank].reshape(height, 1, channels, rank)
        rows = right[:rank].reshape(rank, width, filters).transpose(1, 0, 2)[None]
        return [
            NewLayer(first, (columns.astype(kernel.dtype),)),
            NewLayer(last, (rows.astype(kernel.dtype), *_bias(layer))),
        ]

    return _Form("spatial", error, weights, build)


def _conv(
    layer: tf_keras.layers.Conv2D,
    name: str,
    filters: int,
    kernel_size: tuple[int, int],
    strides: tuple[int, int],
    dilation_rate: tuple[int, int] | None = None,
) -> tf_keras.layers.Conv2D:
    return tf_keras.layers.Conv2D(
        filters,
        kernel_size,
        strides=strides,
        padding=layer.padding,
        dilation_rate=dilation_rate or layer.dilation_rate,
        use_bias=False,
        name=name,
    )


def _last_conv(layer: tf_keras.layers.Conv2D, **changes: object) -> tf_keras.layers.Conv2D:
    """Return a convolution with the old layer's name, bias and activation."""
    return tf_keras.layers.Conv2D.from_config({**layer.get_config(), **changes})


def _pair_unit(first: Kernel, last: Kernel) -> _Unit | None:
    """Return the unit of two factors: their product, truncated further.

    The product is that of the two kernels as matrices over the channels between them, whatever the form.
    """
    one, two = first.value, last.value
    between = one.shape[-1]
    if type(first.layer) is not type(last.layer) or two.shape[-2] != between:
        return None
    left_matrix = one.reshape(-1, between)
    right_matrix = np.moveaxis(two, -2, 0).reshape(between, -1)
    # SVD of a product through the QR of its factors: never forms the product itself.
    q_left, r_left = np.linalg.qr(left_matrix.astype(np.float64))
    q_right, r_right = np.linalg.qr(right_matrix.T.astype(np.float64))
    core_left, core_right, error, _ = _svd(r_left @ r_right.T)
    left, right = q_left @ core_left, core_right @ q_right.T
    ranks = np.arange(1, len(error) + 1)
    per_rank = float(left_matrix.shape[0] * first.macs_per_weight / last.macs_per_weight + right_matrix.shape[1])

    def build(rank: int) -> list[NewLayer]:
        config = first.layer.get_config()
        config["units" if isinstance(first.layer, tf_keras.layers.Dense) else "filters"] = rank
        new_first = first.layer.__class__.from_config(config)
        new_last = last.layer.__class__.from_config(last.layer.get_config())
        columns = left[:, :rank].reshape(*one.shape[:-1], rank)
        moved = (rank, *two.shape[:-2], two.shape[-1])
        rows = np.moveaxis(right[:rank].reshape(moved), 0, -2)
        return [
            NewLayer(new_first, (columns.astype(one.dtype), *_bias(first.layer))),
            NewLayer(new_last, (rows.astype(two.dtype), *_bias(last.layer))),
        ]

    size = per_rank * between
    form = _Form("pair", error, ranks * per_rank, build)
    return _Unit(last.layer.name, int(size), last.macs_per_weight, (form,), (first.layer.name, last.layer.name))
