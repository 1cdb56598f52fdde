"""How the samples of a batch lie to one another, from their products alone: whatever the features, it is [b, b]."""

from __future__ import annotations

import tensorflow as tf

from compress.strategies.distillation.connector import flat

_LEAST = 1e-12


def products(features: tf.Tensor) -> tf.Tensor:
    """Return the products [b, b] of features [b, ...] as vectors from their mean: distances stay as they are."""
    vectors = flat(features)
    centred = vectors - tf.reduce_mean(vectors, 0)
    return tf.matmul(centred, centred, transpose_b=True)


def distances(gram: tf.Tensor) -> tf.Tensor:
    """Return the distances [b, b] of vectors with the products ``gram``; no gradient where two are the same."""
    squares = tf.linalg.diag_part(gram)
    squared = squares[:, None] + squares[None] - 2.0 * gram
    apart = (squared > _LEAST) & ~tf.eye(tf.shape(gram)[0], dtype=tf.bool)
    return tf.where(apart, tf.sqrt(tf.where(apart, squared, 1.0)), 0.0)


def huber(difference: tf.Tensor) -> tf.Tensor:
    """Return half the square, and from 1 on the size minus a half (Park et al., arXiv 1904.05068, section 3.2)."""
    size = tf.abs(difference)
    return tf.where(size <= 1.0, 0.5 * difference**2, size - 0.5)
