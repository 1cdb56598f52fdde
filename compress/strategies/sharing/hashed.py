"""HashedNets: a hash of its place says which of few trained numbers a weight is.

Source: Chen, Wilson, Tyree, Weinberger, Chen, Compressing Neural Networks with the Hashing Trick (arXiv 1504.04788).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np
import tensorflow as tf
import tf_keras
from annotated_types import Ge, Gt, Le, Lt
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate, Effect, Hash, Skipped
from compress.deploy.coding.hashing import KEYS, buckets_and_signs
from compress.errors import CompressError
from compress.graph.fold import fold_batch_norm
from compress.graph.kernels import Kernel, get_variable
from compress.graph.rewrite import copy_model
from compress.graph.walk import Walk
from compress.strategies.least_squares import Moments, is_linear, matrix_of
from compress.strategies.repair import RIDGE, Repair, called_once
from compress.strategies.sharing.buckets import Buckets
from compress.strategies.sharing.chosen import choose_kernels
from compress.strategies.strategy import STRICT, Context, Strategy
from compress.training import restore

_ITERATIONS = 20
_PRECISION = 1e-6
"""Of conjugate gradients: the part of the squared slope that may be left."""


@dataclass(frozen=True, config=STRICT)
class Hashed(Strategy):
    """Let the weights of each selected kernel share the numbers of few buckets, which are trained.

    Batch norms that follow a selected layer are folded into it first: the exported file holds the folded kernel. A
    kernel that would have fewer than two buckets is left alone, and one into which the export merges a normalisation
    that could not be folded. The packed file holds the buckets alone; all else computes with the whole kernel.

    Args:
        weights: buckets of a kernel, as part of its weights.
        gradient: a bucket learns from the ``mean`` of its weights' gradients, or from their ``sum``, which is the
            paper's and asks for a lower learning rate.
        images: unlabelled calibration images, on which buckets are solved for in closed form; 0: they start from the
            means of their weights.
    """

    weights: Annotated[float, Gt(0), Lt(1)] = 0.125
    gradient: Literal["mean", "sum"] = "mean"
    images: Annotated[int, Ge(0), Le(100_000)] = 500

    effects = frozenset({Effect.TRAIN, Effect.SHARE, Effect.LEVEL})
    establishes = Buckets

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Fold, project each kernel onto its buckets, and train these."""
        names = context.selection.names(candidate.model)
        model = fold_batch_norm(candidate.model, names)
        chosen, skipped = choose_kernels(model, names, "hashed", self._obstacle)
        if not chosen:
            raise context.nothing_done("a kernel with at least two buckets", skipped)
        guarantee = Buckets(
            context.stage,
            keys={kernel.name: _key(kernel, context.seed) for kernel in chosen},
            counts={kernel.name: self._buckets(kernel) for kernel in chosen},
            shapes={kernel.name: list(kernel.value.shape) for kernel in chosen},
        )
        result = candidate.evolve(model=model, skipped=context.skip(skipped)).with_guarantee(guarantee)
        if self.images:
            self._solve(candidate, model, guarantee, context)
        restore(model, result.guarantees)
        summed = chosen if self.gradient == "sum" else []
        projections = [SummedSteps(get_variable(model, kernel.name), kernel.name, guarantee) for kernel in summed]
        return context.recover(result, projections=projections)

    def _solve(self, candidate: Candidate, model: tf_keras.Model, guarantee: Buckets, context: Context) -> None:
        """Write into ``model`` the buckets that keep what the layers compute, layer after layer."""
        try:
            repair = Repair(
                candidate.model, context.calibration_samples(self.images), context.seed, candidate.guarantees
            )
        except CompressError as error:
            advice = f"Write strategy.{context.stage}.images=0: buckets are then the means of their weights."
            raise CompressError(error.where, expected=error.expected, received=error.received, fix=advice) from error
        changed = copy_model(repair.folded)
        hashes = guarantee.hashes()
        for step in (walk := Walk(repair.folded, changed, repair.samples)):
            layer = step.layer
            if layer.name not in guarantee.layers:
                continue
            if not is_linear(layer) or not called_once(walk, step):
                weights = [name for name in hashes if name.rpartition("/")[0] == layer.name]
                for name in weights:
                    kernel = get_variable(changed, name)
                    kernel.assign(guarantee.project(name, kernel.value()))
            else:
                known = repair.moments(step, repair.target(walk, step))
                repair.put_solution(walk, step, known, _solver(layer, hashes[f"{layer.name}/kernel"]))
            model.get_layer(layer.name).set_weights(layer.get_weights())

    def _obstacle(self, kernel: Kernel) -> Skipped | None:
        buckets = self._buckets(kernel)
        return (
            Skipped(kernel.layer.name, f"{kernel.size} weights would have {buckets} buckets", True)
            if buckets < 2
            else None
        )

    def _buckets(self, kernel: Kernel) -> int:
        return round(self.weights * kernel.size)


def _solver(layer: tf_keras.layers.Layer, hashing: Hash) -> Callable[[Moments], np.ndarray]:
    """Return what solves for the layer's buckets, from wherever they are."""
    before = matrix_of(layer)
    return lambda moments: hashed_least_squares(moments, before, hashing, start=matrix_of(layer))


def hashed_least_squares(
    known: Moments, before: np.ndarray, hashing: Hash, ridge: float = RIDGE, start: np.ndarray | None = None
) -> np.ndarray:
    """Return the hashed matrix with the least squared error of the outputs, by conjugate gradients.

    Args:
        known: the moments of the layer's inputs and targets.
        before: the matrix with the bias in the last row [d + 1, outputs], which the result is drawn towards; what is
            zero in it stays zero.
        hashing: the hash of the kernel.
        ridge: how strongly, relative to the mean of the inputs' squares.
        start: a matrix to begin from; ``before`` if None.
    """
    kernel, guess = before[:-1], before if start is None else start
    buckets, signs = buckets_and_signs(hashing, kernel.size)
    # A place that has to be zero has no sign.
    signed = np.where(signs, -1.0, 1.0) * (kernel.reshape(-1) != 0)
    strength = ridge * max(float(np.mean(np.diag(known.inputs)[:-1])), 1e-12)
    penalty = np.append(np.full(len(kernel), strength), strength * 1e-3)[:, None]

    def spread(numbers: np.ndarray) -> np.ndarray:
        return np.vstack([(numbers[buckets] * signed).reshape(kernel.shape), numbers[None, hashing.buckets :]])

    def gathered(matrix: np.ndarray) -> np.ndarray:
        sums = np.bincount(buckets, matrix[:-1].reshape(-1) * signed, hashing.buckets)
        return np.append(sums, matrix[-1])

    scale = gathered(spread(np.ones(hashing.buckets + kernel.shape[1])) * (np.diag(known.inputs)[:, None] + penalty))
    inverse = np.where(scale > 0, 1 / np.maximum(scale, 1e-30), 0.0)
    members = np.maximum(np.bincount(buckets, signed**2, hashing.buckets), 1)
    found = np.append(gathered(guess)[: hashing.buckets] / members, guess[-1])
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


class SummedSteps:
    """A projection that moves each bucket by the sum of what its weights were moved by, not by their mean."""

    def __init__(self, variable: tf.Variable, name: str, guarantee: Buckets) -> None:
        self._variable, self._name, self._guarantee = variable, name, guarantee
        self._before = tf.Variable(variable, trainable=False)
        buckets, _ = buckets_and_signs(guarantee.hashes()[name], int(tf.size(variable)))
        alive = np.asarray(variable).reshape(-1) != 0
        members = np.bincount(buckets[alive], minlength=guarantee.counts[name])
        self._factors = (members[buckets] * alive).reshape(variable.shape).astype(np.float32)

    def __call__(self, done: tf.Tensor) -> None:
        """Move the buckets after a step of the optimiser."""
        before = self._before.value()
        moved = before + tf.constant(self._factors) * (self._variable.value() - before)
        self._variable.assign(self._guarantee.project(self._name, moved))
        self._before.assign(self._variable)


def _key(kernel: Kernel, seed: int) -> int:
    """Return the key of a kernel's hash: another one for each seed and each kernel."""
    return zlib.crc32(f"{seed}:{kernel.name}".encode()) % KEYS
