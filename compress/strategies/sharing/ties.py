"""Weights that share numbers at known places: the numbers that keep what a layer computes, in closed form.

Which number each weight holds, up to its sign, is fixed by a hash, by a group of transformations, or by anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import tf_keras

from compress.candidate import Candidate, Guarantee
from compress.errors import CompressError
from compress.graph.kernels import get_variable
from compress.graph.rewrite import copy_model
from compress.graph.walk import Walk
from compress.strategies.least_squares import Moments, is_linear, matrix_of
from compress.strategies.repair import RIDGE, Repair, called_once
from compress.strategies.strategy import Context

_ITERATIONS = 20
_PRECISION = 1e-6
"""Of conjugate gradients: the part of the squared slope that may be left."""


@dataclass(frozen=True)
class Ties:
    """Which of ``count`` numbers each weight of a kernel holds, ``numbers`` [n], and with which sign, ``signs`` [n]."""

    numbers: np.ndarray
    signs: np.ndarray
    count: int


def tied_least_squares(
    known: Moments, before: np.ndarray, ties: Ties, ridge: float = RIDGE, start: np.ndarray | None = None
) -> np.ndarray:
    """Return the tied matrix with the least squared error of the outputs, by conjugate gradients.

    Args:
        known: the moments of the layer's inputs and targets.
        before: the matrix with the bias in the last row [d + 1, outputs], which the result is drawn towards; what is
            zero in it stays zero.
        ties: which numbers the weights share.
        ridge: how strongly, relative to the mean of the inputs' squares.
        start: a matrix to begin from; ``before`` if None.
    """
    kernel, guess = before[:-1], before if start is None else start
    # A place that has to be zero has no sign.
    signed = ties.signs * (kernel.reshape(-1) != 0)
    strength = ridge * max(float(np.mean(np.diag(known.inputs)[:-1])), 1e-12)
    penalty = np.append(np.full(len(kernel), strength), strength * 1e-3)[:, None]

    def spread(numbers: np.ndarray) -> np.ndarray:
        return np.vstack([(numbers[ties.numbers] * signed).reshape(kernel.shape), numbers[None, ties.count :]])

    def gathered(matrix: np.ndarray) -> np.ndarray:
        sums = np.bincount(ties.numbers, matrix[:-1].reshape(-1) * signed, ties.count)
        return np.append(sums, matrix[-1])

    scale = gathered(spread(np.ones(ties.count + kernel.shape[1])) * (np.diag(known.inputs)[:, None] + penalty))
    inverse = np.where(scale > 0, 1 / np.maximum(scale, 1e-30), 0.0)
    members = np.maximum(np.bincount(ties.numbers, signed**2, ties.count), 1)
    found = np.append(gathered(guess)[: ties.count] / members, guess[-1])
    left = gathered(known.cross + penalty * before - known.inputs @ spread(found) - penalty * spread(found))
    first = last = float(left @ (inverse * left))
    direction = inverse * left
    for _ in range(_ITERATIONS):
        if last <= _PRECISION * first:
            break
        whole = spread(direction)
        image = gathered(known.inputs @ whole + penalty * whole)
        length = last / float(direction @ image)
        found, left = found + length * direction, left - length * image
        last, previous = float(left @ (inverse * left)), last
        direction = inverse * left + last / previous * direction
    return spread(found)


def solve_ties(
    candidate: Candidate,
    model: tf_keras.Model,
    guarantee: Guarantee,
    ties: Mapping[str, Callable[[], Ties]],
    images: int,
    context: Context,
) -> None:
    """Write into ``model`` the numbers that keep what the layers compute, layer after layer.

    Args:
        candidate: whose model computes what is to be kept.
        model: the strategy's own copy of it, folded.
        guarantee: projects the kernels that cannot be solved for.
        ties: weight name -> makes its ties.
        images: unlabelled calibration images.
        context: gives them.
    """
    try:
        repair = Repair(candidate.model, context.calibration_samples(images), context.seed, candidate.guarantees)
    except CompressError as error:
        advice = f"Write strategy.{context.stage}.images=0: shared numbers are then the means of their weights."
        raise CompressError(error.where, expected=error.expected, received=error.received, fix=advice) from error
    changed = copy_model(repair.folded)
    for step in (walk := Walk(repair.folded, changed, repair.samples)):
        layer = step.layer
        if layer.name not in guarantee.layers:
            continue
        if not is_linear(layer) or not called_once(walk, step):
            weights = [name for name in ties if name.rpartition("/")[0] == layer.name]
            for name in weights:
                kernel = get_variable(changed, name)
                kernel.assign(guarantee.project(name, kernel.value()))
        else:
            known = repair.moments(step, repair.target(walk, step))
            repair.put_solution(walk, step, known, _solver(layer, ties[f"{layer.name}/kernel"]()))
        model.get_layer(layer.name).set_weights(layer.get_weights())


def _solver(layer: tf_keras.layers.Layer, ties: Ties) -> Callable[[Moments], np.ndarray]:
    """Return what solves for the layer's numbers, from wherever they are."""
    before = matrix_of(layer)
    return lambda moments: tied_least_squares(moments, before, ties, start=matrix_of(layer))
