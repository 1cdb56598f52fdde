"""Contrastive representation distillation: a sample's features are told from other samples' by the teacher's.

Source: Tian, Krishnan, Isola (arXiv 1910.10699, section 3.1: the critic h and its
objective). The other samples are those of the batch, not of a
memory bank as in the paper: what the teacher gives for them is up to date under augmentation, nothing has to be kept
for each image, and their number, b - 1, is the N of the formula. The weight in the paper is 0.8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import tensorflow as tf
from annotated_types import Ge, Gt, Le
from pydantic.dataclasses import dataclass

from compress.data.source import STRICT
from compress.strategies.distillation.connector import Connector
from compress.strategies.distillation.loss import LayerLoss, has_vectors
from compress.strategies.distillation.pairing import Layers, Pair, feature_pairs


@dataclass(frozen=True, config=STRICT)
class Contrastive(LayerLoss):
    """``-mean(log h(i, i) + sum over j != i of log(1 - h(i, j)))``.

    ``h(i, j) = e / (e + N / M)`` with ``e = exp(teacher_i . student_j / temperature)``, N other samples of the batch
    and M samples in the training part. Both features are mapped by a matrix of their own, which is trained, and divided
    by their lengths.

    Attributes:
        dimensions: of the space in which features are compared.
        temperature: what the products are divided by; 0.07 in the authors' program.
    """

    dimensions: Annotated[int, Ge(1), Le(100_000)] = 128
    temperature: Annotated[float, Gt(0), Le(1e3)] = 0.07

    name = "contrastive"
    samples = (2, None)

    def choose(self, teacher: Layers, student: Layers) -> list[Pair]:
        """Take the features that the classes are told by."""
        return feature_pairs(teacher, student)

    def misfit(self, pair: Pair) -> str | None:
        """Features of any shapes, as vectors."""
        return has_vectors(pair)

    def connectors(self, pair: Pair, seed: int) -> tuple[Connector, Connector]:
        """Return the two maps into the common space."""
        ours, theirs = (_length(shape) for shape in (pair.student_shape, pair.teacher_shape))
        return Connector(ours, self.dimensions, seed), Connector(theirs, self.dimensions, seed + 1)

    def value(self, student: Sequence[tf.Tensor], teacher: Sequence[tf.Tensor], samples: int) -> tf.Tensor:
        """Return the sum over the pairs of layers."""
        total = tf.constant(0.0)
        for own, other in zip(student, teacher, strict=True):
            ours, theirs = (tf.math.l2_normalize(features, 1) for features in (own, other))
            exponents = tf.matmul(theirs, ours, transpose_b=True) / self.temperature
            count = tf.shape(exponents)[0]
            others = tf.maximum(tf.cast(count - 1, tf.float32), 1.0)
            # log h = log sigmoid(exponent - log(N / M)); log(1 - h) is the same of the negative.
            scores = exponents - tf.math.log(others / float(samples))
            same = tf.eye(count, dtype=tf.bool)
            logs = tf.where(same, tf.math.log_sigmoid(scores), tf.math.log_sigmoid(-scores))
            total -= tf.reduce_mean(tf.reduce_sum(logs, 1))
        return total


def _length(shape: Sequence[int | None]) -> int:
    length = 1
    for size in shape:
        length *= size or 1
    return length
