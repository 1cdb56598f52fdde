"""Magnitude pruning: the smallest weights become zero, gradually while training goes on.

Sources: Han et al., Learning both Weights and Connections (arXiv 1506.02626); the gradual schedule is Zhu and
Gupta's cubic one (arXiv 1710.01878, equation 1), taken from the TensorFlow Model Optimization Toolkit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
import tensorflow as tf
import tf_keras
from annotated_types import Ge, Gt, Le, Lt
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate, Effect, Skipped
from compress.graph.kernels import Kernel, get_variable, get_weight, kernels, without_kernel
from compress.graph.rewrite import copy_model
from compress.metrics.counts import count_params
from compress.strategies.budget import Budget, one_budget, share_for_part
from compress.strategies.pruning.second_order import prune_second_order
from compress.strategies.pruning.zeros import Zeros
from compress.strategies.repair import Repair
from compress.strategies.strategy import STRICT, Context, Strategy
from compress.training import restore

_SCHEDULE_UPDATES = 50


@dataclass(frozen=True, config=STRICT)
class Prune(Strategy):
    """Set the smallest weights of every selected kernel to zero, the same share of each.

    One of these says how much (a ``sparsity`` of 0.4, if none does):
        sparsity: share of the weights that become zero.
        weights: share of the weights that is kept.
        macs: share of the model's multiply-adds that is kept, counting those with a non-zero weight.
        params: share of the model's parameters that is kept, counting the non-zero ones.

    ``criterion``: ``magnitude``, the same share of every kernel; or ``second_order``: in one shot before the recovery,
    by what a weight costs after the others have made up for it on ``images`` unlabelled samples, layers that matter
    more keeping more; see :mod:`compress.strategies.pruning.second_order`.

    ``ramp``: the sparsity grows over this part of the recovery training, then stays; 0 prunes at once.
    """

    sparsity: Annotated[float, Gt(0), Lt(1)] | None = None
    weights: Annotated[float, Gt(0), Lt(1)] | None = None
    macs: Annotated[float, Gt(0), Lt(1)] | None = None
    params: Annotated[float, Gt(0), Lt(1)] | None = None
    ramp: Annotated[float, Ge(0), Le(1)] = 0.25
    criterion: Literal["magnitude", "second_order"] = "magnitude"
    images: Annotated[int, Ge(16), Le(1_000_000)] = 1000

    effects = frozenset({Effect.TRAIN, Effect.ZERO})
    establishes = Zeros

    def __post_init__(self) -> None:
        """Refuse several budgets at once."""
        self._budget()

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Prune while recovering; every kernel ends at the same sparsity, exact to one weight."""
        model = copy_model(candidate.model)
        names = context.selection.names(model)
        chosen = [kernel for kernel in kernels(model) if kernel.layer.name in names]
        if not chosen:
            raise context.nothing_done("a layer with a kernel to prune", ())
        skipped = [
            Skipped(layer.name, f"weights of {type(layer).__name__} layers are not pruned")
            for layer in without_kernel(model)
            if layer.name in names
        ]
        sparsity = self._sparsity(model, chosen, context.stage)
        if all(round(sparsity * k.size) == 0 for k in chosen):
            raise context.nothing_done(f"a kernel of which a share of {sparsity:g} is at least one weight", skipped)
        if self.criterion == "second_order":
            return self._one_shot(candidate, context, names, sparsity).evolve(skipped=context.skip(skipped))
        gradual = [_Gradual(model, chosen, sparsity, self.ramp)] if context.recovery.trains else []
        context.recover(candidate.evolve(model=model), projections=gradual)
        _assign(model, {k.name: magnitude_mask(k.value, sparsity) for k in chosen})
        # Earlier guarantees may turn a few more weights into zeros (a codebook that keeps its size).
        restore(model, candidate.guarantees)
        zeros = Zeros(context.stage, {k.name: get_weight(model, k.name) != 0 for k in chosen})
        return candidate.evolve(model=model, skipped=context.skip(skipped)).with_guarantee(zeros)

    def _one_shot(self, candidate: Candidate, context: Context, names: frozenset[str], sparsity: float) -> Candidate:
        """Prune and repair in closed form, then recover; kernels that cannot be solved for are pruned by magnitude."""
        repair = Repair(candidate.model, context.calibration_samples(self.images), context.seed)
        model, found = prune_second_order(repair, names, 1 - sparsity, by_macs=self._budget().unit == "macs")
        masks = {
            k.name: found.get(k.layer.name, magnitude_mask(k.value, sparsity))
            for k in kernels(model)
            if k.layer.name in names
        }
        _assign(model, masks)
        restore(model, candidate.guarantees)
        masks = {name: get_weight(model, name) != 0 for name in masks}
        return context.recover(candidate.evolve(model=model).with_guarantee(Zeros(context.stage, masks)))

    def _budget(self) -> Budget:
        return one_budget(
            Budget("sparsity", 0.4), sparsity=self.sparsity, weights=self.weights, macs=self.macs, params=self.params
        )

    def _sparsity(self, model: tf_keras.Model, chosen: list[Kernel], stage: str) -> float:
        budget = self._budget()
        if budget.unit == "sparsity":
            return budget.keep
        if budget.unit == "weights":
            return 1.0 - budget.keep
        if budget.unit == "macs":
            total: float = sum(k.macs for k in kernels(model))
            part: float = sum(k.macs for k in chosen)
        else:
            total, part = count_params(model), sum(k.size for k in chosen)
        return 1.0 - share_for_part(budget.keep, total, part, stage=stage, unit=budget.unit)


def magnitude_mask(weights: np.ndarray, sparsity: float) -> np.ndarray:
    """Return a mask of the shape of ``weights`` that is false for its ``round(sparsity * size)`` smallest."""
    mask = np.ones(weights.size, bool)
    zeros = min(round(sparsity * weights.size), weights.size - 1)
    if zeros > 0:
        mask[np.argpartition(np.abs(weights).ravel(), zeros - 1)[:zeros]] = False
    return mask.reshape(weights.shape)


class _Gradual:
    """The projection that raises the sparsity along TFMOT's polynomial schedule during training."""

    def __init__(self, model: tf_keras.Model, chosen: list[Kernel], sparsity: float, ramp: float) -> None:
        from tensorflow_model_optimization.sparsity.keras import PolynomialDecay

        self._schedule = PolynomialDecay(
            initial_sparsity=0.0, final_sparsity=sparsity, begin_step=0, end_step=_SCHEDULE_UPDATES, frequency=1
        )
        self._ramp = ramp
        self._variables = [get_variable(model, kernel.name) for kernel in chosen]
        self._masks = [tf.Variable(tf.ones_like(v), trainable=False) for v in self._variables]
        self._updates = tf.Variable(0, trainable=False, dtype=tf.int64)

    def __call__(self, done: tf.Tensor) -> None:
        """Renew the masks when the schedule has moved on by one update; apply them at every step."""
        due = tf.cast(tf.minimum(done / max(self._ramp, 1e-6), 1.0) * _SCHEDULE_UPDATES, tf.int64)

        def renew() -> tf.Tensor:
            _, sparsity = self._schedule(due)
            for variable, mask in zip(self._variables, self._masks, strict=True):
                # NumPy's partition takes a tenth of the time of TensorFlow's sort.
                kept = tf.numpy_function(magnitude_mask, [variable, sparsity], tf.bool, stateful=False)
                mask.assign(tf.cast(tf.reshape(kept, variable.shape), variable.dtype))
            return self._updates.assign(due)

        tf.cond(due > self._updates, renew, lambda: self._updates.read_value())
        for variable, mask in zip(self._variables, self._masks, strict=True):
            variable.assign(variable * mask)


def _assign(model: tf_keras.Model, masks: Mapping[str, np.ndarray]) -> None:
    for name, mask in masks.items():
        get_variable(model, name).assign(get_weight(model, name) * mask)
