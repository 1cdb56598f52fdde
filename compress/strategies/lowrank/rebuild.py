"""The factorized network, layer after layer: each makes up for what those before it have lost.

Original and changed network walk side by side; the changed one holds the products of the factors, so that both have the
same structure, and the factors take the layers' places at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import tf_keras

from compress.graph.rewrite import copy_model
from compress.graph.walk import Walk
from compress.progress import progress
from compress.strategies.goal import Goal, goal_of, matrix_with
from compress.strategies.least_squares import Moments, is_linear, matrix_of
from compress.strategies.lowrank.fitting import Fit
from compress.strategies.lowrank.form import Form
from compress.strategies.repair import REPAIR_RIDGE, RIDGE, Repair, called_once

_SWEEPS, _LATER_SWEEPS = 4, 1


@dataclass(frozen=True)
class Wanted:
    """The form and rank that a layer gets; with ``factors``, those it starts from."""

    form: Form
    rank: int
    factors: tuple[np.ndarray, ...] = ()


def rebuild(repair: Repair, wanted: Mapping[str, Wanted]) -> tuple[tf_keras.Model, dict[str, list[np.ndarray]]]:
    """Return a model of the original's structure, repaired, and for each wanted layer its factors.

    The product of the factors is the layer's kernel.
    """
    found: dict[str, list[np.ndarray]] = {}
    changed = copy_model(repair.folded)
    with progress("low-rank reconstruction") as shown:
        for step in (walk := Walk(repair.folded, changed, repair.samples)):
            name = step.layer.name
            shown.advance(step.position + 1, len(walk.nodes), name)
            choice = wanted.get(name)
            if not is_linear(step.layer) or not called_once(walk, step):
                if choice is not None:
                    found[name] = _nearest(step.layer, choice)
                continue
            if choice is None and step.untouched:
                continue
            before, known = matrix_of(step.layer), repair.moments(step, repair.target(walk, step))
            if choice is None:
                repair.put(walk, step, known, before, REPAIR_RIDGE)
                continue
            solver = _Solver(repair, step.layer, choice, before)
            repair.put_solution(walk, step, known, solver.solve)
            found[name] = solver.factors
    model, gains = repair.with_norms(changed), repair.gains()
    for name, factors in found.items():
        if name in gains:
            factors[-1] = factors[-1] / gains[name]
    return model, found


def _nearest(layer: tf_keras.layers.Layer, choice: Wanted) -> list[np.ndarray]:
    """Factorize by the weights alone: the layer's inputs are too many."""
    kernel = np.asarray(layer.kernel)
    factors = list(choice.factors or choice.form.decompose(kernel, choice.rank).factors(choice.rank))
    layer.kernel.assign(choice.form.compose(factors).reshape(kernel.shape))
    return factors


class _Solver:
    """Solves for one layer again and again, as its target moves."""

    def __init__(self, repair: Repair, layer: tf_keras.layers.Layer, choice: Wanted, before: np.ndarray) -> None:
        self.factors = list(choice.factors)
        self._repair, self._layer, self._choice, self._before = repair, layer, choice, before
        self._fit: Fit | None = None

    def solve(self, known: Moments) -> np.ndarray:
        """Return kernel and bias: the product nearest to the solution of the least squares."""
        name, choice, shape = self._layer.name, self._choice, tuple(self._layer.kernel.shape)
        best = self._repair.solved(name, known, self._before, RIDGE)
        goal: Goal = goal_of(known, best, shape, self._repair.metric(name))
        if self._fit is None:
            self._fit = Fit(choice.form, goal, choice.rank)
            first = not self.factors
        else:
            self._fit, first = self._fit.towards(goal.kernel), choice.form.is_product
        if first:
            self.factors = self._fit.factors(choice.rank, _SWEEPS)
        else:
            self.factors = self._fit.improved(self.factors, goal.kernel, _LATER_SWEEPS)
        return matrix_with(known, best, choice.form.compose(self.factors))
