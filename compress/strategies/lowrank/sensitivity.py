"""What every form and rank of every layer changes, measured once: as the change of the logits.

The error of a layer's outputs, weighted by what it means for the logits, has a formula at every rank; at a few ranks
the change itself is measured with this layer alone replaced, and what lies between follows the formula.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from compress.graph.rewrite import copy_model
from compress.graph.walk import Walk
from compress.progress import progress
from compress.strategies.goal import Goal, goal_of, matrix_with
from compress.strategies.least_squares import assign_matrix, is_linear, matrix_of
from compress.strategies.lowrank.fitting import Fit
from compress.strategies.lowrank.form import Form
from compress.strategies.repair import Repair, called_once, change_of_logits, outputs_of

_SAMPLES = 128
_LEVELS = (2 / 3, 1 / 3)
_SWEEPS = 1

Table = dict[str, dict[str, dict[str, list[float]]]]
"""Layer -> form -> ``relative``: squared error of its outputs; ``change``: that of the logits; at rank 1, 2, ..."""


def sensitivities(repair: Repair, layers: Mapping[str, Mapping[Form, int]]) -> Table:
    """Return the table for these layers, each with its forms and their highest ranks of interest."""
    few = min(_SAMPLES, len(repair.samples))
    wanted = outputs_of(repair.folded, repair.samples[:few])
    found: Table = {}
    with progress("low-rank sensitivity") as shown:
        for step in (walk := Walk(repair.folded, copy_model(repair.folded), repair.samples)):
            layer = step.layer
            if layer.name not in layers or not called_once(walk, step):
                continue
            before, shape = matrix_of(layer), tuple(layer.kernel.shape)
            if is_linear(layer):
                known = repair.moments(step)
                goal = goal_of(known, before, shape, repair.metric(layer.name))
            else:
                # Too many inputs for their moments: by the weights alone.
                known, goal = None, Goal(before[:-1].reshape(shape))
            values = {key: value[:few] for key, value in walk.values.items()}
            rows = {}
            for form, most in layers[layer.name].items():
                fit = Fit(form, goal, most)
                relative = fit.decomposition.errors[:most]
                ranks = np.unique([max(1, round(level * most)) for level in _LEVELS])
                changes = []
                for rank in ranks:
                    kernel = form.compose(fit.factors(int(rank), _SWEEPS))
                    assign_matrix(layer, matrix_with(known, before, kernel))
                    final = walk.rest(step.position, walk.run(step.node, layer, values), few)
                    changes.append(change_of_logits(repair.folded, final, wanted))
                change = follow(relative, ranks, np.array(changes))
                rows[form.name] = {"relative": relative.tolist(), "change": change.tolist()}
            assign_matrix(layer, before)
            found[layer.name] = rows
            shown.advance(len(found), len(layers), layer.name)
    return found


def follow(relative: np.ndarray, ranks: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Return a curve through what was measured at some ranks that between them goes as ``relative`` does."""
    known = np.maximum(relative, 1e-12)
    ratio = np.interp(np.arange(1, len(known) + 1), ranks, np.log(np.maximum(measured, 1e-30) / known[ranks - 1]))
    return np.minimum.accumulate(known * np.exp(ratio))
