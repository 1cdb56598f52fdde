"""Rounding of a linear layer's weights to a grid, the others making up for each rounding at once.

Sources: Frantar et al., GPTQ (arXiv 2210.17323, algorithm 1), for the order and the updates; coordinate descent on the
same quadratic error after it (as in Zhang et al., COMQ, arXiv 2403.07134), until nothing changes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tf_keras
from scipy.linalg import cholesky

from compress.candidate import Grid
from compress.graph.rewrite import copy_model
from compress.graph.walk import Walk
from compress.progress import progress
from compress.strategies.least_squares import Moments, assign_matrix, is_linear, matrix_of
from compress.strategies.repair import REPAIR_RIDGE, RIDGE, Repair, called_once

_SHRINKS = tuple(np.linspace(0.4, 1.0, 13))
"""A grid may end before the largest weight: its scale is one of these parts of the smallest that clips nothing."""
_SWEEPS = 8
_BLOCK = 32
"""So many inputs are rounded before the others learn of it, by one matrix product."""


def round_layers(repair: Repair, bits: Mapping[str, int]) -> tuple[tf_keras.Model, dict[str, Grid]]:
    """Round the kernels of linear layers to grids, layer after layer, each making up for those before it.

    Args:
        repair: the model, made ready.
        bits: layer name -> bits of a weight; those that are no Dense or ordinary Conv2D are left alone.

    Returns:
        The folded model with its new weights, and the grid of each rounded kernel by weight name.
    """
    repair.measure_importance(bits)
    changed = copy_model(repair.folded)
    grids: dict[str, Grid] = {}
    with progress("rounding") as shown:
        for step in (walk := Walk(repair.folded, changed, repair.samples)):
            shown.advance(step.position + 1, len(walk.nodes), step.layer.name)
            layer = step.layer
            if layer.name not in bits or not is_linear(layer) or not called_once(walk, step):
                continue
            before, known = matrix_of(layer), repair.moments(step, repair.target(walk, step))
            repair.put(walk, step, known, before, REPAIR_RIDGE)
            alive = repair.alive.get(layer.name)
            rounded, steps = round_to_grid(known, matrix_of(layer), bits[layer.name], RIDGE, alive)
            assign_matrix(layer, rounded)
            spread = [1] * (len(layer.kernel.shape) - 1)
            grids[f"{layer.name}/kernel"] = Grid(steps.astype(np.float32).reshape(*spread, -1), bits[layer.name])
    return changed, grids


def round_to_grid(
    known: Moments, matrix: np.ndarray, bits: int, ridge: float, alive: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights on a symmetric grid for each output, chosen for the least squared error of the outputs.

    Args:
        known: the moments of the layer's inputs.
        matrix: the weights with the bias in the last row [d + 1, outputs]; the bias stays free.
        bits: of a weight; the grid has ``2**bits - 1`` levels.
        ridge: relative to the mean of the inputs' squares.
        alive: which weights may be other than zero [d, outputs]; all if None.

    Returns:
        The matrix [d + 1, outputs], and the grid's step for each output [outputs].
    """
    size, outputs = len(matrix) - 1, matrix.shape[1]
    most = 2 ** (bits - 1) - 1
    strength = ridge * max(float(np.mean(np.diag(known.inputs)[:-1])), 1e-12)
    penalty = np.append(np.full(size, strength), strength * 1e-3)
    gram = known.inputs + np.diag(penalty)
    tries = len(_SHRINKS)
    wanted = np.tile(matrix, tries)
    free = np.ones((size, outputs * tries), bool) if alive is None else np.tile(alive, tries)
    widest = np.maximum(np.abs(matrix[:-1]).max(0), 1e-12) / most
    steps = (np.array(_SHRINKS)[:, None] * widest).reshape(-1)
    nearest = np.vstack([np.clip(np.rint(wanted[:-1] / steps), -most, most) * steps * free, wanted[-1:]])
    starts = (_propagate(gram, wanted, steps, most, free), nearest)
    rounded = np.concatenate([_descend(gram, wanted, start, steps, most, free) for start in starts], 1)
    error = rounded - np.tile(wanted, 2)
    costs = np.einsum("io,io->o", error, gram @ error).reshape(2 * tries, outputs)
    best, every = costs.argmin(0), np.arange(outputs)
    return rounded.reshape(-1, 2 * tries, outputs)[:, best, every], steps.reshape(tries, outputs)[best % tries, every]


def _propagate(gram: np.ndarray, wanted: np.ndarray, steps: np.ndarray, most: int, free: np.ndarray) -> np.ndarray:
    """Round input after input, the most active first; the inputs that follow make up for each rounding."""
    size = len(gram) - 1
    order = np.append(np.argsort(-np.diag(gram)[:-1], kind="stable"), size)
    upper = cholesky(np.linalg.inv(gram[np.ix_(order, order)]), lower=False)
    left, result = wanted[order].copy(), np.empty_like(wanted)
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        errors = np.empty((stop - start, wanted.shape[1]))
        for position in range(start, stop):
            value = left[position]
            level = np.clip(np.rint(value / steps), -most, most) * free[order[position]]
            errors[position - start] = error = (value - level * steps) / upper[position, position]
            left[position + 1 : stop] -= upper[position, position + 1 : stop, None] * error
            result[order[position]] = level * steps
        left[stop:] -= upper[start:stop, stop:].T @ errors
    result[size] = left[size]
    return result


def _descend(
    gram: np.ndarray, wanted: np.ndarray, start: np.ndarray, steps: np.ndarray, most: int, free: np.ndarray
) -> np.ndarray:
    """Set each weight to the level that is best given all others, over and over; the bias to its best value."""
    size = len(gram) - 1
    result = start.copy()
    moving = np.arange(result.shape[1])
    for sweep in range(_SWEEPS):
        weights, step, may = result[:, moving], steps[moving], free[:, moving]
        slope = gram @ (wanted[:, moving] - weights)
        changed = np.zeros(len(moving), bool)
        for first in range(0, size, _BLOCK):
            block = slice(first, min(first + _BLOCK, size))
            inner, near, before = gram[block, block], slope[block].copy(), weights[block].copy()
            for row in range(len(inner)):
                ideal = before[row] + near[row] / inner[row, row]
                weights[first + row] = np.clip(np.rint(ideal / step), -most, most) * step * may[first + row]
                near[row + 1 :] -= inner[row + 1 :, row, None] * (weights[first + row] - before[row])
            moved = weights[block] - before
            if moved.any():
                changed |= moved.any(0)
                slope -= gram[:, block] @ moved
        weights[size] += slope[size] / gram[size, size]
        result[:, moving] = weights
        # The first sweep may have moved the bias alone, to which the weights have not yet answered.
        moving = moving[changed | (sweep == 0)]
        if not len(moving):
            break
    return result
