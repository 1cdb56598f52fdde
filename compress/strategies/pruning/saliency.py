"""Saliency of channels: criteria that score every unit of a group, each in a few lines.

A criterion is a class with ``score(group, evidence) -> [units]``; the lower, the sooner a unit goes. What several
weights of a group say about a unit is added up, as in DepGraph (arXiv 2301.12900, equation 4).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import tensorflow as tf
import tf_keras

from compress.data.source import Data
from compress.errors import CompressError
from compress.graph.channels.groups import Channels, Group, IndexMap
from compress.graph.rewrite import nodes
from compress.strategies.pruning.gradients import inputs_of, loss_gradients, squared_gradients

_BATCH = 128
_SINGLE_SAMPLES = 256
"""Looked at one by one."""


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at: weights; gradients and activations on ``images`` of the training part."""

    channels: Channels
    data: Data
    seed: int
    images: int = 1024
    where: str = "strategy.prune_channels.criterion"
    """The configuration key, for errors."""

    def weight(self, member: IndexMap) -> np.ndarray:
        """Return the weight of a member with its units along axis 0, flat behind: [places, rest]."""
        return _rows(np.asarray(self._variable(member)), member)

    def gradient(self, member: IndexMap) -> np.ndarray:
        """Return the gradient of the mean loss, laid out like :meth:`weight`."""
        return _rows(self._gradients[self._variable(member).ref()], member)

    def squared_gradient(self, member: IndexMap) -> np.ndarray:
        """Return the mean of the samples' squared gradients, laid out like :meth:`weight`."""
        return _rows(self._squares[self._variable(member).ref()], member)

    def activations(self, group: Group) -> tuple[np.ndarray, np.ndarray]:
        """Return (mean absolute value, share of exact zeros) of each unit where it is read: [units], [units]."""
        return tuple(values[group.units] for values in self._activations)  # type: ignore[return-value]

    def _variable(self, member: IndexMap) -> tf.Variable:
        return self.channels.model.get_layer(member.weight.layer).weights[member.weight.index]

    def _sample(self) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(self.seed)
        chosen = rng.permutation(len(self.data.train))[: self.images]
        return self.data.train.x[chosen].astype(np.float32), self.data.train.y[chosen]

    @cached_property
    def _variables(self) -> list[tf.Variable]:
        model = self.channels.model
        variables = [model.get_layer(w.layer).weights[w.index] for w in self.channels.trace.weights.values()]
        return [variable for variable in variables if variable.trainable]

    @cached_property
    def _gradients(self) -> dict[object, np.ndarray]:
        x, y = self._sample()
        found = loss_gradients(self.channels.model, self._variables, x, y, self.where)
        return {v.ref(): value for v, value in zip(self._variables, found, strict=True)}

    @cached_property
    def _squares(self) -> dict[object, np.ndarray]:
        x, y = (part[:_SINGLE_SAMPLES] for part in self._sample())
        found = squared_gradients(self.channels.model, self._variables, x, y, self.where)
        return {v.ref(): value for v, value in zip(self._variables, found, strict=True)}

    @cached_property
    def _activations(self) -> tuple[np.ndarray, np.ndarray]:
        channels = self.channels
        read = {(key.layer, key.index): mixings for key, mixings in channels.trace.mixing.items()}
        tensors, labels, times = [], [], {}  # type: ignore[var-annotated]
        for node in nodes(channels.model):
            index = times.get(node.layer.name, 0)
            times[node.layer.name] = index + 1
            for mixing in read.get((node.layer.name, index), ()):
                tensors.append(node.keras_inputs[mixing.input])
                labels.append(channels.units_of(mixing.ids))
        look = tf_keras.Model(channels.model.inputs, tensors)

        def moments(x: tf.Tensor) -> list[tuple[tf.Tensor, tf.Tensor]]:
            outputs = tf.nest.flatten(look(x, training=False))
            result = []
            for value, units in zip(outputs, labels, strict=True):
                # A layer inside another one (TimeDistributed) may know fewer axes; they are the last.
                outer = value.shape.rank - units.ndim
                axes = [*range(outer), *(axis + outer for axis in range(units.ndim) if units.shape[axis] == 1)]
                zero = tf.cast(tf.equal(value, 0), tf.float32)
                result.append((tf.reduce_mean(tf.abs(value), axes), tf.reduce_mean(zero, axes)))
            return result

        sums = np.zeros((2, channels.count + 1))
        counts, compiled = np.zeros(channels.count + 1), tf.function(moments)
        samples = inputs_of(channels.model, self._sample()[0], self.where)
        for x in tf.data.Dataset.from_tensor_slices(samples).batch(_BATCH):
            size = len(tf.nest.flatten(x)[0])
            for (mean, zeros), units in zip(compiled(x), labels, strict=True):
                np.add.at(sums[0], units.ravel(), np.ravel(mean) * size)
                np.add.at(sums[1], units.ravel(), np.ravel(zeros) * size)
                np.add.at(counts, units.ravel(), size)
        means = sums[:, :-1] / np.maximum(counts[:-1], 1)
        return means[0], means[1]


def _rows(value: np.ndarray, member: IndexMap) -> np.ndarray:
    moved: np.ndarray = np.moveaxis(value, member.axis, 0)[member.places]
    return moved.reshape(len(member.places), -1)


class Criterion(ABC):
    """Scores the units of a group."""

    scope: str = "group"
    """``group``: all trainable weights that hold the units have their say; ``writers``: the kernels that make them."""

    @abstractmethod
    def score(self, group: Group, evidence: Evidence) -> np.ndarray:
        """Return a score for each unit of the group: [units], the lowest goes first."""

    def members(self, group: Group) -> list[IndexMap]:
        """Return the weights that have a say."""
        kernels = [m for m in group.members if m.weight.trainable and len(m.weight.axes) > 1]
        if self.scope == "writers":
            return [m for m in kernels if not m.reads] or kernels
        return kernels


def per_unit(group: Group, members: list[IndexMap], value: Callable[[IndexMap], np.ndarray]) -> np.ndarray:
    """Add up ``value(member)`` [places] over the places of each unit and over members: [units]."""
    total = np.zeros(len(group))
    for member in members:
        total += np.bincount(member.units, value(member), minlength=len(group))
    return total


@dataclass(frozen=True)
class Norm(Criterion):
    """Sum of the ``power``-th powers of the weights: L1 (Li et al., arXiv 1608.08710, section 3.1) and L2."""

    power: int = 2
    scope: str = "group"

    def score(self, group: Group, evidence: Evidence) -> np.ndarray:
        """Add up."""
        return per_unit(group, self.members(group), lambda m: (np.abs(evidence.weight(m)) ** self.power).sum(1))


@dataclass(frozen=True)
class Gamma(Criterion):
    """Absolute scale of the batch normalisations on the way (Liu et al., arXiv 1708.06519)."""

    def members(self, group: Group) -> list[IndexMap]:
        """Only the scales."""
        return [m for m in group.members if m.weight.attribute == "gamma"]

    def score(self, group: Group, evidence: Evidence) -> np.ndarray:
        """Add up."""
        return per_unit(group, self.members(group), lambda m: np.abs(evidence.weight(m)).sum(1))


@dataclass(frozen=True)
class GeometricMedian(Criterion):
    """Distance to all other filters of the layer: the one in the middle can be replaced (FPGM, arXiv 1811.00250)."""

    scope: str = "writers"

    def score(self, group: Group, evidence: Evidence) -> np.ndarray:
        """Sum distances within each weight."""

        def distances(member: IndexMap) -> np.ndarray:
            rows = evidence.weight(member)
            squares = (rows**2).sum(1)
            apart: np.ndarray = np.sqrt(np.maximum(squares[:, None] + squares - 2 * rows @ rows.T, 0))
            return apart.sum(1)

        return per_unit(group, self.members(group), distances)


@dataclass(frozen=True)
class Taylor(Criterion):
    """Square of the first-order change of the loss (Molchanov et al., arXiv 1906.10771, equation 8). Needs labels."""

    def score(self, group: Group, evidence: Evidence) -> np.ndarray:
        """Add up weight times gradient over a unit, then square."""
        members = self.members(group)
        return per_unit(group, members, lambda m: (evidence.weight(m) * evidence.gradient(m)).sum(1)) ** 2


@dataclass(frozen=True)
class Fisher(Criterion):
    """Second-order change of the loss with the diagonal of the empirical Fisher matrix as Hessian. Needs labels."""

    def score(self, group: Group, evidence: Evidence) -> np.ndarray:
        """Add up squared weight times squared gradient."""
        members = self.members(group)
        return per_unit(group, members, lambda m: (evidence.weight(m) ** 2 * evidence.squared_gradient(m)).sum(1))


@dataclass(frozen=True)
class Activation(Criterion):
    """Mean absolute value where the channel is read."""

    def score(self, group: Group, evidence: Evidence) -> np.ndarray:
        """Look it up."""
        return evidence.activations(group)[0]


@dataclass(frozen=True)
class Apoz(Criterion):
    """Share of values that are not zero: low when a channel is mostly off (Hu et al., arXiv 1607.03250)."""

    def score(self, group: Group, evidence: Evidence) -> np.ndarray:
        """Look it up."""
        return 1.0 - evidence.activations(group)[1]


@dataclass(frozen=True)
class Random(Criterion):
    """By chance: what every other criterion must beat."""

    def score(self, group: Group, evidence: Evidence) -> np.ndarray:
        """Draw."""
        return np.random.default_rng([evidence.seed, group.number]).random(len(group))


def criteria() -> dict[str, Criterion]:
    """Return the criteria by the names that a configuration calls them."""
    return {
        "l1": Norm(1),
        "l2": Norm(2),
        "l1_filter": Norm(1, "writers"),
        "gamma": Gamma(),
        "geometric_median": GeometricMedian(),
        "taylor": Taylor(),
        "fisher": Fisher(),
        "activation": Activation(),
        "apoz": Apoz(),
        "random": Random(),
    }


def score_groups(name: str, groups: Sequence[Group], evidence: Evidence) -> list[np.ndarray]:
    """Return the scores of all units by a criterion, [units] of each group, divided by the mean of the group.

    Infinite where a unit must stay, and where the criterion says nothing of a group.

    Raises:
        CompressError: if it tells no units apart.
    """
    criterion, pinned = criteria()[name], evidence.channels.pinned
    scores = []
    for group in groups:
        score = np.where(pinned[group.units], np.inf, criterion.score(group, evidence))
        finite = score[np.isfinite(score)]
        if not criterion.members(group) and not np.any(finite):
            score = np.full(len(group), np.inf)
        scores.append(score / (np.mean(finite) or 1.0) if finite.size else score)
    # They are divided by their mean: what differs less does so by rounding.
    if not any(np.ptp(score[np.isfinite(score)]) > 1e-6 for score in scores if np.isfinite(score).any()):
        blind = not any(criterion.members(group) for group in groups)
        found = "which finds nothing to look at in the groups that may go" if blind else "whose scores are all the same"
        advice = ["choose another one (l2)"] if name != "l2" else []
        if not blind or not advice:
            advice.append("look whether the model's weights are what they should be, and trainable")
        raise CompressError(
            evidence.where,
            expected="a criterion that tells channels apart",
            received=f"{name}, {found}",
            fix=", or ".join(advice).capitalize() + ".",
        )
    return scores
