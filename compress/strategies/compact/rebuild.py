"""The network with compact layers, fitted to outputs: each makes up for what those before it have lost.

Original and changed network walk side by side; in the changed one, layers of the same kernel shapes stand in for the
compact ones, which take their places at the end.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tf_keras

from compress.graph.rewrite import NewLayer, copy_model, rewrite
from compress.graph.walk import Step, Walk
from compress.progress import progress
from compress.strategies.compact.form import Form, Parts
from compress.strategies.goal import Goal
from compress.strategies.least_squares import assign_matrix, is_linear, matrix_of
from compress.strategies.repair import REPAIR_RIDGE, Repair, called_once, change_of_logits, outputs_of

_SAMPLES = 128


def changes(repair: Repair, forms: Mapping[str, Form]) -> dict[str, float]:
    """Return the mean squared change of the logits if one layer alone is replaced, for each of these layers."""
    few = min(_SAMPLES, len(repair.samples))
    wanted = outputs_of(repair.folded, repair.samples[:few])
    found: dict[str, float] = {}
    with progress("compact sensitivity") as shown:
        for step in (walk := Walk(repair.folded, copy_model(repair.folded), repair.samples)):
            form = forms.get(step.layer.name)
            if form is None:
                continue
            trial = form.stand_in(step.layer)
            trial.build(step.layer.input_shape)
            assign_matrix(trial, _solved(form, repair, step)[0])
            values = {key: value[:few] for key, value in walk.values.items()}
            final = walk.rest(step.position, walk.run(step.node, trial, values), few)
            found[step.layer.name] = change_of_logits(repair.folded, final, wanted)
            shown.advance(len(found), len(forms), step.layer.name)
    return found


def _solved(form: Form, repair: Repair, step: Step) -> tuple[np.ndarray, Parts]:
    """Return kernel and bias, and the parts; by the weights alone where the layer's inputs are too many."""
    if is_linear(step.node.layer):
        solver = form.solver(repair, step)
        return solver.solve(None), solver.parts
    matrix = matrix_of(step.node.layer)
    parts = form.nearest(Goal(matrix[:-1].reshape(step.node.layer.kernel.shape)))
    matrix[:-1] = form.kernel(parts).reshape(len(matrix) - 1, -1)
    return matrix, parts


def rebuild(repair: Repair, forms: Mapping[str, Form]) -> tuple[tf_keras.Model, dict[str, Parts]]:
    """Return a model of the original's structure, repaired, and for each of these layers its parts."""
    found: dict[str, Parts] = {}
    changed = rewrite(repair.folded, {name: [_stand_in(repair.folded, name, form)] for name, form in forms.items()})
    with progress("compact reconstruction") as shown:
        for step in (walk := Walk(repair.folded, changed, repair.samples)):
            name, form = step.layer.name, forms.get(step.layer.name)
            shown.advance(step.position + 1, len(walk.nodes), name)
            linear = is_linear(step.node.layer) and called_once(walk, step)
            if form is not None and linear:
                solver = form.solver(repair, step)
                assign_matrix(step.layer, solver.solve(repair.target(walk, step)))
                for target in repair.rectified_targets(walk, step):
                    assign_matrix(step.layer, solver.solve(target))
                found[name] = solver.parts
            elif form is not None:
                matrix, found[name] = _solved(form, repair, step)
                assign_matrix(step.layer, matrix)
            elif linear and not step.untouched:
                known = repair.moments(step, repair.target(walk, step))
                repair.put(walk, step, known, matrix_of(step.layer), REPAIR_RIDGE)
    model, gains = repair.with_norms(changed), repair.gains()
    return model, {
        name: (*parts[:-1], parts[-1] / gains[name]) if name in gains else parts for name, parts in found.items()
    }


def _stand_in(model: tf_keras.Model, name: str, form: Form) -> NewLayer:
    layer = model.get_layer(name)
    return NewLayer(form.stand_in(layer), tuple(layer.get_weights()))
