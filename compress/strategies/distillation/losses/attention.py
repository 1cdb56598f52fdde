"""Attention transfer: the student looks at the places of an image that its teacher looks at.

Source: Zagoruyko and Komodakis (arXiv 1612.03928, equation 2, with the map F_sum^2 of section 3.1). As in the authors'
program, the square of the distance counts, averaged over places and batch; the weight that they give it is 1000.
"""

from __future__ import annotations

import tensorflow as tf

from compress.strategies.distillation.loss import PairLoss, compares_maps
from compress.strategies.distillation.pairing import Pair
from compress.strategies.distillation.pooling import average_pool


class Attention(PairLoss):
    """The sum over layers of ``mean((q_student - q_teacher)^2)``.

    ``q`` is the sum over the channels of the squared features, as a vector over the places divided by its length. Maps
    of different sizes are averaged to the smaller one.
    """

    name = "attention"

    def misfit(self, pair: Pair) -> str | None:
        """Maps of any sizes and channels."""
        sizes = pair.student_shape[:2], pair.teacher_shape[:2]
        unknown = sizes[0] != sizes[1] and None in (*sizes[0], *sizes[1])
        return compares_maps(pair) or ("maps of different sizes must be of fixed ones" if unknown else None)

    def between(self, student: tf.Tensor, teacher: tf.Tensor) -> tf.Tensor:
        """Return the mean square of the difference of the attention."""
        maps = [tf.reduce_sum(features**2, -1) for features in (student, teacher)]
        sizes = [tuple(found.shape[1:]) for found in maps]
        if sizes[0] != sizes[1]:
            smaller = (min(sizes[0][0], sizes[1][0]), min(sizes[0][1], sizes[1][1]))
            maps = [average_pool(found, smaller) for found in maps]
        ours, theirs = (tf.math.l2_normalize(tf.reshape(found, [tf.shape(found)[0], -1]), 1) for found in maps)
        return tf.reduce_mean((ours - theirs) ** 2)
