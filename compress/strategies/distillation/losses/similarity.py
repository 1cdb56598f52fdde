"""Similarity-preserving distillation: samples that activate the teacher alike activate the student alike.

Source: Tung and Mori (arXiv 1907.09682, equations 1 to 3). The weight that they give it is 3000.
"""

from __future__ import annotations

import tensorflow as tf

from compress.strategies.distillation.connector import flat
from compress.strategies.distillation.loss import PairLoss, has_vectors
from compress.strategies.distillation.pairing import Layers, Pair, feature_pairs, pair


class Similarity(PairLoss):
    """The sum over layers of ``|G_student - G_teacher|^2 / b^2``.

    ``G`` [b, b] are the products of the samples' features as vectors, each row divided by its length.
    """

    name = "similarity"
    samples = (2, None)

    def choose(self, teacher: Layers, student: Layers) -> list[Pair]:
        """Take the last feature maps; where a network has none, the features that the classes are told by."""
        ours, theirs = student.last_maps(), teacher.last_maps()
        if ours is None or theirs is None:
            return feature_pairs(teacher, student)
        return [pair(teacher, student, ours, theirs)]

    def misfit(self, pair: Pair) -> str | None:
        """Features of any shapes, as vectors."""
        return has_vectors(pair)

    def between(self, student: tf.Tensor, teacher: tf.Tensor) -> tf.Tensor:
        """Return the mean square of the difference of the similarities."""
        ours, theirs = (
            tf.math.l2_normalize(tf.matmul(vectors, vectors, transpose_b=True), 1)
            for vectors in (flat(student), flat(teacher))
        )
        return tf.reduce_mean((ours - theirs) ** 2)
