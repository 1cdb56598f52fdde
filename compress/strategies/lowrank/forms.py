"""The ways to write a Dense or Conv2D layer as a product of two smaller ones, by singular value decomposition.

Sources: Denton et al. (arXiv 1404.0736) for Dense layers and the channel form; Jaderberg et al. (arXiv 1405.3866,
scheme 2) and Tai et al. (arXiv 1511.06067) for the spatial form, whose closed-form optimum is an SVD.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import tf_keras

from compress.graph.kernels import Kernel
from compress.graph.rewrite import NewLayer
from compress.strategies.lowrank.rank import first_factor

Form = Literal["auto", "spatial", "channel"]
CostUnit = Literal["macs", "params"]


@dataclass(frozen=True)
class FactorForm:
    """One way to write a layer as a product: its error and its cost at every rank.

    ``error[r - 1]`` is the relative squared error at rank r, ``cost[r - 1]`` what both factors cost together, in the
    unit of the budget.
    """

    name: str
    error: np.ndarray
    cost: np.ndarray
    build: Callable[[int], list[NewLayer]]


@dataclass(frozen=True)
class Unit:
    """A layer, or a pair made by an earlier stage: what it costs as it is, and the forms it can take."""

    name: str
    cost: float
    forms: tuple[FactorForm, ...]
    replaces: tuple[str, ...]

    def factors(self, form: FactorForm, rank: int) -> dict[str, Sequence[NewLayer]]:
        """Return the replacements in the graph."""
        layers = form.build(rank)
        if len(self.replaces) == 1:
            return {self.replaces[0]: layers}
        return {old: [new] for old, new in zip(self.replaces, layers, strict=True)}

    def at_rank(self, rank: int) -> tuple[FactorForm, int] | None:
        """Return the form with the least error at ``rank``, if it saves."""
        options = [(f, min(rank, len(f.error))) for f in self.forms]
        options = [(f, r) for f, r in options if f.cost[r - 1] < self.cost]
        return min(options, key=lambda o: float(o[0].error[o[1] - 1]), default=None)

    def at_error(self, error: float) -> tuple[FactorForm, int] | None:
        """Return the cheapest form and rank whose error is at most ``error``, if it saves."""
        options = [(f, min(int((f.error > error + 1e-12).sum()) + 1, len(f.error))) for f in self.forms]
        options = [(f, r) for f, r in options if f.cost[r - 1] < self.cost]
        return min(options, key=lambda o: float(o[0].cost[o[1] - 1]), default=None)

    def at_price(self, price: float) -> tuple[FactorForm, int] | None:
        """Return the form and rank with the least error + price * relative cost; None: the layer as it is."""
        best, choice = price, None
        for form in self.forms:
            score = form.error + price * form.cost / self.cost
            rank = int(np.argmin(score)) + 1
            if score[rank - 1] < best and form.cost[rank - 1] < self.cost:
                best, choice = float(score[rank - 1]), (form, rank)
        return choice


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


def _svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return (left * sqrt(s), sqrt(s) * right, error by rank, s) with the error relative to the whole energy."""
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    energy = values**2
    error = 1.0 - np.cumsum(energy) / energy.sum() if energy.sum() > 0 else np.zeros_like(energy)
    root = np.sqrt(values)
    return left * root, root[:, None] * right, np.maximum(error, 0.0), values


def single_unit(kernel: Kernel, form: Form, unit: CostUnit) -> Unit:
    """Return the unit of one layer with the forms that ``form`` allows it, costs counted in ``unit``."""
    layer = kernel.layer
    if isinstance(layer, tf_keras.layers.Dense):
        forms = [_dense_form(layer, _positions(kernel, unit))]
    else:
        height, width = layer.kernel.shape[:2]
        forms = []
        if form != "spatial" or height == 1 or width == 1:
            forms.append(_channel_form(layer, _positions(kernel, unit)))
        if form != "channel" and height > 1 and width > 1:
            forms.append(_spatial_form(layer, kernel, unit))
    return Unit(layer.name, kernel.size * _positions(kernel, unit), tuple(forms), (layer.name,))


def _positions(kernel: Kernel, unit: CostUnit) -> float:
    """Return what one weight of the kernel costs: the positions it is applied at, or 1 if weights are counted."""
    return kernel.macs_per_weight if unit == "macs" else 1.0


def _bias(layer: tf_keras.layers.Layer) -> tuple[np.ndarray, ...]:
    return (np.asarray(layer.bias),) if layer.use_bias else ()


def _dense_form(layer: tf_keras.layers.Dense, positions: float) -> FactorForm:
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

    return FactorForm("dense", error, ranks * positions * float(sum(matrix.shape)), build)


def _channel_form(layer: tf_keras.layers.Conv2D, positions: float) -> FactorForm:
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

    return FactorForm("channel", error, ranks * positions * float(height * width * channels + filters), build)


def _spatial_form(layer: tf_keras.layers.Conv2D, kernel_info: Kernel, unit: CostUnit) -> FactorForm:
    kernel = np.asarray(layer.kernel)
    height, width, channels, filters = kernel.shape
    left, right, error, _ = _svd(kernel.transpose(0, 2, 1, 3).reshape(height * channels, width * filters))
    ranks = np.arange(1, len(error) + 1)
    positions = _positions(kernel_info, unit)
    first_positions = positions
    if unit == "macs":
        # The first factor runs before the horizontal convolution: at the input's width, not the output's.
        before, after = layer.input_shape[2], layer.output_shape[2]
        first_positions *= before / after if before and after else layer.strides[1]
    cost = ranks * (first_positions * height * channels + positions * width * filters)

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

    return FactorForm("spatial", error, cost, build)


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


def pair_unit(first: Kernel, last: Kernel, unit: CostUnit) -> Unit | None:
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
    per_rank = left_matrix.shape[0] * _positions(first, unit) + right_matrix.shape[1] * _positions(last, unit)

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

    form = FactorForm("pair", error, ranks * per_rank, build)
    return Unit(last.layer.name, per_rank * between, (form,), (first.layer.name, last.layer.name))
