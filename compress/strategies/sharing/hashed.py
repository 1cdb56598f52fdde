"""HashedNets: a hash of its place says which of few trained numbers a weight is.

Source: Chen, Wilson, Tyree, Weinberger, Chen, Compressing Neural Networks with the Hashing Trick (arXiv 1504.04788).
"""

from __future__ import annotations

import zlib
from functools import partial
from typing import Annotated, Literal

import numpy as np
import tensorflow as tf
from annotated_types import Ge, Gt, Le, Lt
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate, Effect, Hash, Skipped
from compress.deploy.coding.hashing import KEYS, buckets_and_signs
from compress.graph.fold import fold_batch_norm
from compress.graph.kernels import Kernel, get_variable
from compress.strategies.sharing.buckets import Buckets
from compress.strategies.sharing.chosen import choose_kernels
from compress.strategies.sharing.ties import Ties, solve_ties
from compress.strategies.strategy import STRICT, Context, Strategy
from compress.training import restore
from compress.words import counted


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
            sizes, hashes = {kernel.name: kernel.size for kernel in chosen}, guarantee.hashes()
            ties = {name: partial(ties_of, hashes[name], sizes[name]) for name in hashes}
            solve_ties(candidate, model, guarantee, ties, self.images, context)
        restore(model, result.guarantees)
        summed = chosen if self.gradient == "sum" else []
        projections = [SummedSteps(get_variable(model, kernel.name), kernel.name, guarantee) for kernel in summed]
        return context.recover(result, projections=projections)

    def _obstacle(self, kernel: Kernel) -> Skipped | None:
        buckets = self._buckets(kernel)
        return (
            Skipped(
                kernel.layer.name, f"{counted(kernel.size, 'weight')} would have {counted(buckets, 'bucket')}", True
            )
            if buckets < 2
            else None
        )

    def _buckets(self, kernel: Kernel) -> int:
        return round(self.weights * kernel.size)


def ties_of(hashing: Hash, count: int) -> Ties:
    """Return which bucket each of ``count`` weights is of, and its sign."""
    buckets, signs = buckets_and_signs(hashing, count)
    return Ties(buckets, np.where(signs, -1.0, 1.0), hashing.buckets)


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
