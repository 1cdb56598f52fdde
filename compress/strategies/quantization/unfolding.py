"""Between a network with its batch norms and the folded one that the file computes.

Rounding a kernel to one grid for each output and folding a batch norm into it may be done in either order: folding
multiplies whole outputs, and their steps with them. So a network can learn with its batch norms what it will compute
without them. (Without batch norms, a learning rate of 0.001 spoils even a float ResNet-20 within 60 steps.)
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tf_keras

from compress.candidate import Grid
from compress.graph.fold import fold_batch_norm, foldable_pairs, folding_gains
from compress.graph.kernels import get_variable, get_weight
from compress.graph.rewrite import copy_model

_LEAST_GAIN = 1e-3
_LEAST_STEP = 1e-30


def unfold(
    model: tf_keras.Model, rounded: tf_keras.Model, grids: Mapping[str, Grid]
) -> tuple[tf_keras.Model, dict[str, np.ndarray]]:
    """Return a copy of ``model`` that computes what its folded, rounded copy does, and the steps of its kernels.

    Args:
        model: with its batch norms.
        rounded: the same, folded, its weights changed since.
        grids: those of kernels of ``rounded``, by weight name.
    """
    result, folded = copy_model(model), fold_batch_norm(model)
    gains, pairs = folding_gains(model), foldable_pairs(model)
    steps = {name: grid.steps for name, grid in grids.items()}
    for layer in rounded.layers:
        if layer.name not in pairs:
            result.get_layer(layer.name).set_weights(layer.get_weights())
    for name in (name for name in grids if name.rpartition("/")[0] in pairs):
        layer, norm = name.rpartition("/")[0], result.get_layer(pairs[name.rpartition("/")[0]])
        gain = gains[layer]
        # An output that its batch norm has nearly switched off cannot take the change back.
        usable = np.abs(gain) > _LEAST_GAIN * np.median(np.abs(gain))
        safe = np.where(usable, gain, 1)
        most = 2 ** (grids[name].bits - 1) - 1
        before = get_weight(result, name)
        own = np.maximum(np.abs(before).max(tuple(range(before.ndim - gain.ndim)), keepdims=True), 1e-12) / most
        steps[name] = np.where(usable, steps[name] / np.abs(safe), own)
        get_variable(result, name).assign(np.where(usable, get_weight(rounded, name) / safe, before))
        shift = np.asarray(rounded.get_layer(layer).bias) - np.asarray(folded.get_layer(layer).bias)
        if norm.center:
            norm.beta.assign_add(shift)
    return result, steps


def fold_grids(
    model: tf_keras.Model, steps: Mapping[str, np.ndarray], bits: Mapping[str, int]
) -> tuple[tf_keras.Model, dict[str, Grid]]:
    """Return ``model``, folded, and the grids of its kernels; ``steps`` (those before) and ``bits``: by weight name."""
    gains = folding_gains(model)
    grids = {}
    for name, step in steps.items():
        gain = np.abs(gains.get(name.rpartition("/")[0], np.float32(1)))
        # An output that its batch norm has switched off is made of zeros, which lie on any grid but that of step zero.
        grids[name] = Grid(np.maximum(np.asarray(step * gain, np.float32), _LEAST_STEP), bits[name])
    return fold_batch_norm(model), grids


def folded_ranges(model: tf_keras.Model, ranges: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Return the ranges of the folded model's layers: a batch norm's is that of the layer it is folded into."""
    linear = {norm: layer for layer, norm in foldable_pairs(model).items()}
    return {linear.get(name, name): found for name, found in ranges.items()}
