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

    broken_by: ClassVar[frozenset[Effect]] = frozenset({Effect.REPLACE})
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
        labels = tf.constant(self.labels[weight].ravel().astype(np.int32))
        flat = tf.reshape(value, [-1])
        nonzero = tf.cast(tf.not_equal(flat, 0), flat.dtype)
        sums = tf.math.unsorted_segment_sum(flat, labels, self.clusters)
        counts = tf.math.unsorted_segment_sum(nonzero, labels, self.clusters)
        used = counts > 0
        means = sums / tf.maximum(counts, 1.0)
        full = tf.reduce_all(used) & tf.reduce_any(tf.equal(nonzero, 0))
        distance = tf.where(used, tf.abs(means), tf.fill(tf.shape(means), np.float32(np.inf)))
        pinned = tf.one_hot(tf.argmin(distance), self.clusters, on_value=True, off_value=False)
        means = tf.where(full & pinned, tf.zeros_like(means), means)
        return tf.reshape(tf.gather(means, labels) * nonzero, tf.shape(value))

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
