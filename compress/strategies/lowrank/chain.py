"""The chain of layers that a form puts in a layer's place: what it costs at each rank, and how it is built and read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import tf_keras

from compress.graph.kernels import Kernel
from compress.graph.rewrite import NewLayer
from compress.strategies.lowrank.form import Form
from compress.strategies.lowrank.rank import first_factor

CostUnit = Literal["macs", "params"]


def layer_names(form: Form, name: str) -> list[str]:
    """Return the names of the chain's layers; the last has the old layer's own."""
    inner = len(form.terms) - 2
    middle = [f"{name}_core{number or ''}" for number in range(inner)]
    return [first_factor(name), *middle, name]


def cost(form: Form, kernel: Kernel, ranks: np.ndarray, unit: CostUnit) -> np.ndarray:
    """Return the weights or multiply-adds of the whole chain at each rank."""
    shape = kernel.value.shape
    sizes: Mapping[str, np.ndarray | int] = {
        **dict(zip(form.letters, shape, strict=True)),
        **form.widths(shape, ranks),
    }
    total = np.zeros(len(ranks))
    passed = ""
    for term in form.terms:
        passed += term
        weights = np.prod(np.broadcast_arrays(*(np.asarray(sizes[letter], float) for letter in term)), axis=0)
        total = total + weights * (1.0 if unit == "params" else kernel.macs_per_weight * _places(kernel.layer, passed))
    return total


def _places(layer: tf_keras.layers.Layer, passed: str) -> float:
    """Return how often a layer of the chain is applied, relative to the old one: before the strides it is more often.

    ``passed``: letters of this and all earlier layers; the layer with an axis takes over that axis' stride.
    """
    if not isinstance(layer, tf_keras.layers.Conv2D):
        return 1.0
    factor = 1.0
    for letter, axis in (("y", 0), ("x", 1)):
        if letter not in passed:
            before, after = layer.input_shape[1 + axis], layer.output_shape[1 + axis]
            factor *= before / after if before and after else layer.strides[axis]
    return factor


def build(form: Form, layer: tf_keras.layers.Layer, factors: Sequence[np.ndarray]) -> list[NewLayer]:
    """Return the layers with the factors as kernels; the last has the old layer's name, bias and activation."""
    names = layer_names(form, layer.name)
    chain = []
    for number, (term, factor, name) in enumerate(zip(form.terms, factors, names, strict=True)):
        last = number == len(names) - 1
        bias = (np.asarray(layer.bias),) if last and layer.use_bias else ()
        if isinstance(layer, tf_keras.layers.Dense):
            new = (
                tf_keras.layers.Dense.from_config(layer.get_config())
                if last
                else tf_keras.layers.Dense(factor.shape[1], use_bias=False, name=name)
            )
            weights = factor
        else:
            new = _convolution(layer, term, factor, name, last)
            weights = factor.reshape(_kernel_shape(term, factor))
        chain.append(NewLayer(new, (weights.astype(np.float32), *bias)))
    return chain


def _kernel_shape(term: str, factor: np.ndarray) -> tuple[int, ...]:
    sizes = dict(zip(term, factor.shape, strict=True))
    channels = [sizes[letter] for letter in term if letter not in "yx"]
    return sizes.get("y", 1), sizes.get("x", 1), *channels, *([1] if len(channels) == 1 else [])


def _convolution(
    layer: tf_keras.layers.Conv2D, term: str, factor: np.ndarray, name: str, last: bool
) -> tf_keras.layers.Layer:
    height, width, *_, filters = _kernel_shape(term, factor)
    has = ["y" in term, "x" in term]
    how = {
        "kernel_size": (height, width),
        "strides": tuple(step if own else 1 for step, own in zip(layer.strides, has, strict=True)),
        "dilation_rate": tuple(rate if own else 1 for rate, own in zip(layer.dilation_rate, has, strict=True)),
        "padding": layer.padding if any(has) else "valid",
    }
    if last:
        return tf_keras.layers.Conv2D.from_config({**layer.get_config(), **how})
    if len(term.replace("y", "").replace("x", "")) == 1:
        return tf_keras.layers.DepthwiseConv2D(use_bias=False, name=name, **how)
    return tf_keras.layers.Conv2D(filters, use_bias=False, name=name, **how)


def read(form: Form, layers: Sequence[tf_keras.layers.Layer]) -> list[np.ndarray]:
    """Return the factors that the layers of a chain hold."""
    factors = []
    for term, layer in zip(form.terms, layers, strict=True):
        depthwise = isinstance(layer, tf_keras.layers.DepthwiseConv2D)
        kernel = np.asarray(layer.depthwise_kernel if depthwise else layer.kernel)
        if kernel.ndim == 2:
            factors.append(kernel)
            continue
        axes = ["y", "x", "in", "out"]
        kept = [axis for axis in axes[:2] if axis in term] + (["in"] if depthwise else ["in", "out"])
        factors.append(kernel.reshape([kernel.shape[axes.index(axis)] for axis in kept]))
    return factors


def fits(form: Form, layers: Sequence[tf_keras.layers.Layer | None]) -> bool:
    """Say whether these are still the layers of such a chain: of the kinds it has, without bias but for the last."""
    for term, layer in zip(form.terms, layers, strict=True):
        if layer is None:
            return False
        single = len([letter for letter in term if letter not in "yx"]) == 1
        kinds = tf_keras.layers
        kind = kinds.DepthwiseConv2D if single else kinds.Dense if form.letters == "cf" else kinds.Conv2D
        if type(layer) is not kind or (kind is kinds.Conv2D and layer.groups > 1):
            return False
    return not any(layer.use_bias for layer in layers[:-1] if layer is not None)
