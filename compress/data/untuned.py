"""Datasets whose reader may stop at any time without waiting.

The tuner of ``tf.data`` sleeps twice as long each time, up to a minute, and whoever stops before the end waits until it
wakes: half of a prediction's time, or the last minute of a training.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf
import tf_keras


def untuned(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Return the same dataset without the tuner; whoever makes it has said how many calls run at once."""
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def in_batches(samples: np.ndarray, size: int) -> tf.data.Dataset:
    """Return batches [up to ``size``, ...] of samples [n, ...] in their order; floating numbers as Keras' own kind."""
    floating = np.issubdtype(samples.dtype, np.floating)
    values = tf.constant(samples, tf_keras.backend.floatx() if floating else None)
    starts = tf.data.Dataset.range(0, len(samples), size)
    return untuned(starts.map(lambda start: values[start : start + size]).prefetch(2))
