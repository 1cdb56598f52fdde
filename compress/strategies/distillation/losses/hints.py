"""Hints: the student's inner layers learn to give what the teacher's do.

Source: Romero et al., FitNets (arXiv 1412.6550, equation 3). Where the shapes differ, a regressor maps the student's
features: 1 x 1 where only the channels do, larger where the student's maps are larger (section 2.2: no padding, so that
what comes out has the teacher's size).
"""

from __future__ import annotations

import tensorflow as tf

from compress.distribution.replicas import mean_over_replicas
from compress.strategies.distillation.connector import Connector
from compress.strategies.distillation.loss import PairLoss
from compress.strategies.distillation.pairing import Layers, Pair, same_layers, stage_pairs


class Hints(PairLoss):
    """The sum over layers of ``|student - teacher|^2 / variance of the teacher``, both means over the elements.

    The paper has half the sum of squares of one layer; here each layer counts alike, whatever its size and the size of
    its values.
    """

    name = "hints"

    def choose(self, teacher: Layers, student: Layers) -> list[Pair]:
        """Take the layers that both have, with one shape; without any, the ends of the stages."""
        return same_layers(teacher, student) or stage_pairs(teacher, student)

    def misfit(self, pair: Pair) -> str | None:
        """Maps with maps that are not larger, vectors with vectors; or the same shape, whatever it is."""
        ours, theirs = pair.student_shape, pair.teacher_shape
        if ours == theirs:
            return None
        if len(ours) != len(theirs) or len(ours) not in (1, 3) or ours[-1] is None:
            return "a regressor maps vectors to vectors, or feature maps to feature maps"
        if ours[:-1] != theirs[:-1] and None in (*ours, *theirs):
            return "a regressor needs maps whose size is fixed"
        if any(own < other for own, other in zip(ours[:-1], theirs[:-1], strict=True)):  # type: ignore[operator]
            return "a regressor makes maps smaller, not larger"
        return None

    def connectors(self, pair: Pair, seed: int) -> tuple[Connector | None, Connector | None]:
        """Return the regressor, where one is needed."""
        ours, theirs = pair.student_shape, pair.teacher_shape
        if ours == theirs:
            return None, None
        sizes = zip(ours[:-1], theirs[:-1], strict=True)
        kernel = [1 if own == other else own - other + 1 for own, other in sizes]  # type: ignore[operator]
        return Connector(int(ours[-1] or 0), int(theirs[-1] or 0), seed, kernel=kernel), None

    def between(self, student: tf.Tensor, teacher: tf.Tensor) -> tf.Tensor:
        """Return the mean square of the difference, relative to how much the teacher's channels vary.

        A single vector does not vary: there, relative to its size.
        """
        axes = list(range(teacher.shape.rank - 1))
        mean = mean_over_replicas(tf.reduce_mean(teacher, axes))
        spread = tf.reduce_mean(mean_over_replicas(tf.reduce_mean((teacher - mean) ** 2, axes)))
        size = tf.reduce_mean(mean_over_replicas(tf.reduce_mean(teacher**2, axes)))
        spread = tf.where(spread > 0.0, spread, size)
        return tf.reduce_mean((student - teacher) ** 2) / tf.maximum(spread, 1e-12)
