"""Relational knowledge distillation by distances: samples that are near for the teacher are near for the student.

Source: Park et al. (arXiv 1904.05068, section 3.2.1). As in the authors' program the mean over all pairs of the
batch counts; the weight that they give it is 25.
"""

from __future__ import annotations

import tensorflow as tf

from compress.strategies.distillation.loss import PairLoss, has_vectors
from compress.strategies.distillation.pairing import Layers, Pair, feature_pairs
from compress.strategies.distillation.relations import distances, huber, products


class RelationalDistance(PairLoss):
    """The mean over all pairs of samples of Huber's loss between their distances.

    These are relative to the mean distance in the batch, for each network apart.
    """

    name = "relational_distance"
    samples = (2, None)

    def choose(self, teacher: Layers, student: Layers) -> list[Pair]:
        """Take the features that the classes are told by."""
        return feature_pairs(teacher, student)

    def misfit(self, pair: Pair) -> str | None:
        """Features of any shapes, as vectors."""
        return has_vectors(pair)

    def between(self, student: tf.Tensor, teacher: tf.Tensor) -> tf.Tensor:
        """Return the loss of the distances."""
        ours, theirs = (_relative(distances(products(features))) for features in (student, teacher))
        return tf.reduce_mean(huber(ours - theirs))


def _relative(found: tf.Tensor) -> tf.Tensor:
    count = tf.cast(tf.shape(found)[0], found.dtype)
    mean = tf.reduce_sum(found) / tf.maximum(count * (count - 1.0), 1.0)
    return found / tf.maximum(mean, 1e-12)
