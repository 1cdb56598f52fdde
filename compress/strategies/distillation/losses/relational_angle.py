"""Relational knowledge distillation by angles: three samples form the same angle for student and teacher.

Source: Park et al. (arXiv 1904.05068, section 3.2.2). As in the authors' program the mean over all triplets of the
batch counts; the weight that they give it is 50.
"""

from __future__ import annotations

import tensorflow as tf

from compress.strategies.distillation.loss import PairLoss, has_vectors
from compress.strategies.distillation.pairing import Layers, Pair, feature_pairs
from compress.strategies.distillation.relations import distances, huber, products


class RelationalAngle(PairLoss):
    """The mean over all triplets (i, j, k) of Huber's loss between the cosines of their angles at j."""

    name = "relational_angle"
    samples = (3, 512)
    """It holds the cosines of all triplets: half a gigabyte for 512 samples."""

    def choose(self, teacher: Layers, student: Layers) -> list[Pair]:
        """Take the features that the classes are told by."""
        return feature_pairs(teacher, student)

    def misfit(self, pair: Pair) -> str | None:
        """Features of any shapes, as vectors."""
        return has_vectors(pair)

    def between(self, student: tf.Tensor, teacher: tf.Tensor) -> tf.Tensor:
        """Return the loss of the angles."""
        return tf.reduce_mean(huber(_cosines(student) - _cosines(teacher)))


def _cosines(features: tf.Tensor) -> tf.Tensor:
    """Return [j, i, k]: the cosine of the angle between the ways from sample j to i and to k; 0 where one is no way."""
    gram = products(features)
    lengths = distances(gram)
    ways = gram[None] - gram[:, :, None] - gram[:, None] + tf.linalg.diag_part(gram)[:, None, None]
    inverse = tf.math.divide_no_nan(1.0, lengths)
    return ways * inverse[:, :, None] * inverse[:, None]
