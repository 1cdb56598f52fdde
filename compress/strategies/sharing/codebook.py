"""The guarantee of sharing: a kernel holds few distinct values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import tensorflow as tf
import tf_keras

from compress.candidate import Effect, Guarantee, Violation
from compress.graph.kernels import get_weight
from compress.metrics.tflite_file import TFLiteFile


@dataclass(frozen=True)
class Codebook(Guarantee):
    """Each kernel holds at most ``clusters`` distinct values, zero counted as one of them.

    ``labels``: weight name -> integer array of the kernel's shape, which cluster each weight belongs to.
    """

    clusters: int
    labels: Mapping[str, np.ndarray]

    broken_by: ClassVar[frozenset[Effect]] = frozenset({Effect.REPLACE, Effect.SPREAD, Effect.LEVEL})
    # Two equal weights in channels with different scales would become two different integers.
    one_scale_per_tensor: ClassVar[bool] = True

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that it binds."""
        return frozenset(name.rpartition("/")[0] for name in self.labels)

    def describe(self) -> str:
        """Say how many values each kernel has."""
        return f"at most {self.clusters} distinct values in each of {len(self.labels)} kernels"

    def weights(self) -> frozenset[str]:
        """Names of the shared weights."""
        return frozenset(self.labels)

    def project(self, weight: str, value: tf.Tensor) -> tf.Tensor:
        """Give every weight the mean of its cluster; zeros stay zero.

        If zeros have come in and every cluster is still in use, the cluster nearest to zero becomes zero, so that
        the number of distinct values does not grow.
        """
        _, inverse = np.unique(self.labels[weight], return_inverse=True)
        labels = inverse.ravel().astype(np.int32)
        order = np.argsort(labels, kind="stable").astype(np.int32)
        flat = tf.reshape(value, [-1])
        # Sums over sorted labels take less than half the time of sums over unsorted ones.
        ordered, segments = tf.gather(flat, order), tf.constant(labels[order])
        sums = tf.math.segment_sum(ordered, segments)
        counts = tf.math.segment_sum(tf.cast(tf.not_equal(ordered, 0), flat.dtype), segments)
        used = counts > 0
        means = sums / tf.maximum(counts, 1.0)
        # A dead cluster leaves room for the zero; so does a codebook that is not full.
        full = tf.reduce_all(used) & (tf.size(counts) == self.clusters)
        clash = full & (tf.reduce_sum(counts) < tf.cast(tf.size(flat), counts.dtype))
        distance = tf.where(used, tf.abs(means), tf.fill(tf.shape(means), np.float32(np.inf)))
        pinned = tf.one_hot(tf.argmin(distance), tf.size(means), on_value=True, off_value=False)
        means = tf.where(clash & pinned, tf.zeros_like(means), means)
        renewed = tf.where(tf.equal(flat, 0), flat, tf.gather(means, tf.constant(labels)))
        return tf.reshape(renewed, tf.shape(value))

    def check(self, model: tf_keras.Model) -> list[Violation]:
        """Count the distinct values of each kernel."""
        return [
            violation
            for name in self.labels
            for violation in self._count(name, get_weight(model, name), "distinct values")
        ]

    def check_file(self, file: TFLiteFile) -> list[Violation]:
        """Count the distinct values stored in the file for each kernel."""
        found = []
        for name, labels in self.labels.items():
            stored = file.kernel_of(name.rpartition("/")[0], labels.shape)
            if stored is None:
                found.append(Violation(name, "its weights are not in the file"))
            else:
                found.extend(self._count(name, stored, "distinct values in the file"))
        return found

    def _count(self, name: str, values: np.ndarray, what: str) -> list[Violation]:
        distinct = len(np.unique(values))
        return [Violation(name, f"{distinct} {what}, at most {self.clusters}")] if distinct > self.clusters else []
