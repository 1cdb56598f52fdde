"""Group sparsity: training that drives whole units of channel groups to zero before they are cut.

Both ways are projections after each optimiser step, so they hold for any optimiser and any loss. How far they go is
measured over the whole training and does not depend on how many steps it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
import tf_keras

from compress.graph.channels.groups import Channels
from compress.graph.channels.trace import WeightChannels


class GroupSparsity(ABC):
    """The projection: every unit's weights, of all layers that hold it, are scaled by one factor.

    ``model`` has the structure of ``channels.model``; its weights are changed. ``may``: the units that may go, [count].
    """

    def __init__(self, channels: Channels, model: tf_keras.Model, may: np.ndarray) -> None:
        self.may = tf.constant(np.append(may, False))
        self._holders = [
            _Holder.of(channels, weight, model) for weight in channels.trace.weights.values() if weight.trainable
        ]
        self._count = channels.count + 1
        self._before = tf.Variable(0.0, trainable=False)

    def norms(self) -> tf.Tensor:
        """Return the L2 norm of all weights of each unit: [count + 1]; the last place is for what is no channel."""
        squares = tf.zeros([self._count])
        for holder in self._holders:
            value = tf.square(holder.variable)
            for axis, units in holder.axes:
                others = [a for a in range(value.shape.rank) if a != axis]
                squares += tf.math.unsorted_segment_sum(tf.reduce_sum(value, others), units, self._count)
        return tf.sqrt(squares)

    def __call__(self, done: tf.Tensor) -> None:
        """Scale the units by what is due since the last call."""
        factors = tf.where(self.may, self.factors(self._before, done), 1.0)
        self._before.assign(done)
        for holder in self._holders:
            value = holder.variable.value()
            for axis, units in holder.axes:
                shape = [-1 if a == axis else 1 for a in range(value.shape.rank)]
                value *= tf.reshape(tf.gather(factors, units), shape)
            holder.variable.assign(value)

    @abstractmethod
    def factors(self, before: tf.Tensor, done: tf.Tensor) -> tf.Tensor:
        """Return what each unit's weights are multiplied with between two points of the training: [count + 1]."""


class GroupLasso(GroupSparsity):
    """The proximal step of the group lasso (Yuan and Lin, 2006, as in DepGraph's sparse learning).

    Without gradients, over the whole training, a unit would lose ``strength`` times the mean norm of all units.
    """

    def __init__(self, channels: Channels, model: tf_keras.Model, may: np.ndarray, strength: float) -> None:
        super().__init__(channels, model, may)
        self._whole = strength * float(np.mean(self.norms().numpy()[:-1][may]))

    def factors(self, before: tf.Tensor, done: tf.Tensor) -> tf.Tensor:
        """Take the same off every norm."""
        return tf.maximum(0.0, 1.0 - self._whole * (done - before) / tf.maximum(self.norms(), 1e-12))


class GrowingDecay(GroupSparsity):
    """A decay, of the units that will go, that grows with time (Wang et al., GReg, arXiv 2012.09243).

    Without gradients, over the whole training, their weights would shrink by exp(-``strength``).
    """

    def __init__(self, channels: Channels, model: tf_keras.Model, may: np.ndarray, strength: float) -> None:
        super().__init__(channels, model, may)
        self._strength = strength

    def factors(self, before: tf.Tensor, done: tf.Tensor) -> tf.Tensor:
        """Shrink by the integral of a rate that grows linearly."""
        return tf.fill([self._count], tf.exp(-self._strength * (done**2 - before**2)))


@dataclass(frozen=True)
class _Holder:
    """A variable and the units along its axes; what is no channel counts as the last unit."""

    variable: tf.Variable
    axes: tuple[tuple[int, np.ndarray], ...]

    @classmethod
    def of(cls, channels: Channels, weight: WeightChannels, model: tf_keras.Model) -> _Holder:
        axes = (
            (axis, np.where(units >= 0, units, channels.count))
            for axis, ids in enumerate(weight.axes)
            if ids is not None
            for units in [channels.units_of(ids).ravel()]
        )
        return cls(model.get_layer(weight.layer).weights[weight.index], tuple(axes))
