"""Second-order pruning: single weights go, and the others make up for it at once, without labels or gradient steps.

Sources: Frantar and Alistarh, Optimal Brain Compression (arXiv 2208.11580, section 4): every output's weights are
eliminated one after the other by what that costs after a re-solve, and a layer's budget goes to the outputs that need
it. The targets are those of :mod:`compress.strategies.repair`: each layer also makes up for all layers before it. How
much each layer keeps follows from the measured change of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tf_keras
from scipy.interpolate import PchipInterpolator

from compress.graph.kernels import Kernel, kernels
from compress.graph.rewrite import calls, copy_model
from compress.graph.walk import Walk
from compress.progress import progress
from compress.strategies.least_squares import Moments, assign_matrix, is_linear, matrix_of
from compress.strategies.pruning.reconstruction import Curve, allocate
from compress.strategies.repair import REPAIR_RIDGE, RIDGE, Repair, called_once, change_of_logits, outputs_of

_LEVELS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
_STEPS = 100
"""A layer keeps so many hundredths of its weights."""
_SENSITIVITY_SAMPLES = 256
_CHUNK_BYTES = 2**21
"""Of a few inverses: as much as a processor keeps at hand."""
_COMPACT = 0.85
_MOST_OPERATIONS = 2e11
"""Layers that would take more (many minutes) are left to magnitude."""


@dataclass(frozen=True)
class Elimination:
    """The order in which the weights of each output go: [outputs, weights], and the error that each adds."""

    order: np.ndarray
    added: np.ndarray

    def left(self, keep: int) -> np.ndarray:
        """Return which weights are left, [weights, outputs], when ``keep`` of the layer's weights are, or fewer."""
        outputs, weights = self.order.shape
        gone = max(outputs * weights - keep, int((self.added < 0).sum()))
        # Within an output a weight goes only after those before it: its price is the highest so far.
        prices = np.maximum.accumulate(self.added, axis=1)
        first = np.argsort(prices, axis=None, kind="stable")[:gone]
        counts = np.bincount(first // weights, minlength=outputs)
        mask = np.ones((outputs, weights), bool)
        for output, count in enumerate(counts):
            mask[output, self.order[output, :count]] = False
        return mask.T


def prune_second_order(
    repair: Repair, names: frozenset[str], keep: float, by_macs: bool
) -> tuple[tf_keras.Model, dict[str, np.ndarray]]:
    """Prune the linear layers in ``names`` so that ``keep`` of their weights are left, and repair the network.

    Args:
        repair: the model, made ready.
        names: layers that may be pruned; those that are no Dense or ordinary Conv2D, or too large, are left alone.
        keep: share of the weights that is left, over all these layers.
        by_macs: count multiply-adds instead of weights.

    Returns:
        The repaired model, and for each pruned layer which weights are left, in the kernel's shape.
    """
    table = {k.layer.name: k for k in kernels(repair.folded) if k.layer.name in names and is_linear(k.layer)}
    times = calls(repair.folded)
    chosen = [name for name, kernel in table.items() if times[name] == 1 and _operations(kernel) <= _MOST_OPERATIONS]
    if not chosen:
        return copy_model(repair.model), {}
    repair.measure_importance(chosen)
    weights = np.array([table[name].macs if by_macs else table[name].size for name in chosen], float)

    def cost(hundredths: Sequence[int]) -> float:
        return float(np.dot(hundredths, weights) / _STEPS / weights.sum())

    curves = _curves(repair, chosen)
    shares = allocate(curves, [_STEPS] * len(chosen), cost, keep, [1] * len(chosen))
    counts = {n: max(1, int(share * table[n].size / _STEPS)) for n, share in zip(chosen, shares, strict=True)}
    changed = copy_model(repair.folded)
    masks: dict[str, np.ndarray] = {}
    with progress("second-order pruning") as shown:
        for step in (walk := Walk(repair.folded, changed, repair.samples)):
            shown.advance(step.position + 1, len(walk.nodes), step.layer.name)
            name = step.layer.name
            if not is_linear(step.layer) or not called_once(walk, step) or (step.untouched and name not in counts):
                continue
            before, known = matrix_of(step.layer), repair.moments(step, repair.target(walk, step))
            if name not in counts:
                repair.put(walk, step, known, before, REPAIR_RIDGE)
                continue
            left = eliminate_each(known, alive=repair.alive.get(name)).left(counts[name])
            repair.put(walk, step, known, before, RIDGE, left)
            masks[name] = left.reshape(step.layer.kernel.shape)
    return repair.with_norms(changed), masks


def _operations(kernel: Kernel) -> float:
    """Return about how many operations the elimination of a layer's weights takes."""
    outputs = kernel.value.shape[-1]
    return float(outputs) * (kernel.size / outputs) ** 3


def _curves(repair: Repair, chosen: Sequence[str]) -> list[Curve]:
    """Return, for each layer, the change of the logits when it alone keeps 1, 2, ... hundredths of its weights."""
    found: dict[str, Curve] = {}
    few = min(_SENSITIVITY_SAMPLES, len(repair.samples))
    wanted = outputs_of(repair.folded, repair.samples[:few])
    walk = Walk(repair.folded, copy_model(repair.folded), repair.samples)
    with progress("weight sensitivity") as shown:
        for step in walk:
            name = step.layer.name
            if name not in chosen:
                continue
            known, before = repair.moments(step), matrix_of(step.layer)
            elimination = eliminate_each(known, alive=repair.alive.get(name))
            size = elimination.order.size
            points = {_STEPS: 0.0}
            for level in _LEVELS:
                left = elimination.left(max(1, int(level * size)))
                assign_matrix(step.layer, repair.solved(name, known, before, RIDGE, left))
                values = {key: value[:few] for key, value in walk.values.items()}
                final = walk.rest(step.position, walk.run(step.node, step.layer, values), few)
                points[round(level * _STEPS)] = change_of_logits(repair.folded, final, wanted)
            assign_matrix(step.layer, before)
            at = sorted(points)
            errors = np.minimum.accumulate([points[p] for p in at])
            curve = PchipInterpolator(at, errors, extrapolate=False)(np.arange(1, _STEPS + 1))
            # Below the lowest level nobody has looked: the slope goes on.
            curve[: at[0] - 1] = errors[0] + (errors[0] - errors[1]) / (at[1] - at[0]) * np.arange(at[0] - 1, 0, -1)
            found[name] = Curve(np.maximum(curve, 0.0))
            shown.advance(len(found), len(chosen), name)
    return [found[name] for name in chosen]


def eliminate_each(known: Moments, ridge: float = RIDGE, alive: np.ndarray | None = None) -> Elimination:
    """Eliminate the weights of every output one after the other; the bias (the last row) stays.

    ``alive`` [weights, outputs]: the others are gone already; they go first and cost nothing.
    """
    size, outputs = known.cross.shape
    strength = ridge * max(float(np.mean(np.diag(known.inputs)[:-1])), 1e-12)
    # In double precision: hundreds of updates of a nearly singular inverse overflow in single.
    inverse = np.linalg.inv(known.inputs + strength * np.eye(size))
    solution = (inverse @ known.cross).T
    # In exact arithmetic no diagonal element of the inverse falls below this while others are eliminated.
    least = 0.5 / float(np.diag(known.inputs).max() + strength)
    order = np.empty((outputs, size - 1), np.int64)
    added = np.empty((outputs, size - 1), np.float64)
    chunk = max(1, _CHUNK_BYTES // (inverse.itemsize * size * size))
    for start in range(0, outputs, chunk):
        part = slice(start, min(start + chunk, outputs))
        gone = np.zeros((0, 0), bool) if alive is None else ~alive.T[part]
        order[part], added[part] = _eliminate_chunk(inverse, solution[part].copy(), least, gone)
    return Elimination(order, added)


def _eliminate_chunk(
    inverse: np.ndarray, solution: np.ndarray, least: float, gone_before: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (order, added error) of a few outputs at once: [outputs, weights] each.

    ``least``: what a diagonal element of the inverse cannot fall below but by rounding. ``gone_before`` [outputs,
    weights]: these go first, for less than nothing; empty if there are none.
    """
    count, size = solution.shape
    every = np.arange(count)
    inverses = np.repeat(inverse[None], count, 0)
    outer = np.empty_like(inverses)
    places = np.tile(np.arange(size), (count, 1))
    alive = np.ones((count, size), bool)
    alive[:, -1] = False
    first = np.zeros((count, size), bool)
    if gone_before.size:
        first[:, :-1] = gone_before
    order, added = np.empty((count, size - 1), np.int64), np.empty((count, size - 1))
    for step in range(size - 1):
        if size - step < _COMPACT * places.shape[1]:
            # Every output has lost as many weights; what has gone need not be carried along.
            kept = np.nonzero(alive | (places == size - 1))[1].reshape(count, -1)
            rows = every[:, None]
            inverses = inverses[rows[:, :, None], kept[:, :, None], kept[:, None, :]]
            outer = np.empty_like(inverses)
            solution, places, first, alive = (part[rows, kept] for part in (solution, places, first, alive))
        diagonal = np.maximum(np.einsum("oii->oi", inverses), least)
        prices = np.where(alive, np.where(first, -1.0, solution**2 / diagonal), np.inf)
        gone = prices.argmin(1)
        order[:, step], added[:, step] = places[every, gone], prices[every, gone]
        columns = inverses[every, :, gone]
        pivot = np.maximum(columns[every, gone], least)
        solution -= columns * (solution[every, gone] / pivot)[:, None]
        np.multiply(columns[:, :, None], (columns / pivot[:, None])[:, None, :], out=outer)
        inverses -= outer
        solution[every, gone] = 0
        alive[every, gone] = False
    return order, added
