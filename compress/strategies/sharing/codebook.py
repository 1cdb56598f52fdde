"""The guarantee of sharing: a kernel holds few distinct values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import tensorflow as tf
import tf_keras

from compress.candidate import Effect, Guarantee, Violation
from compress.graph.kernels import get_weight
from compress.metrics.tflite_file import TFLiteFile
from compress.words import counted


@dataclass(frozen=True)
class Codebook(Guarantee):
    """Each kernel holds at most ``clusters`` distinct values, zero counted as one of them.

    ``labels``: weight name -> integer array of the kernel's shape, which cluster each weight belongs to.
    ``per_channel``: each channel (the last axis) of a kernel holds so many. ``values``: all kernels together do, these.
    """

    clusters: int
    labels: Mapping[str, np.ndarray]
    per_channel: bool = False
    values: Sequence[float] = ()

    broken_by: ClassVar[frozenset[Effect]] = frozenset({Effect.REPLACE, Effect.SPREAD, Effect.LEVEL})
    # Two equal weights in channels with different scales would become two different integers.
    one_scale_per_tensor: ClassVar[bool] = True

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that it binds."""
        return frozenset(name.rpartition("/")[0] for name in self.labels)

    def with_values(self, values: np.ndarray) -> Codebook:
        """Return the guarantee that all kernels together hold these values, float32 [clusters] at most."""
        return replace(self, values=tuple(map(float, values)))

    def describe(self) -> str:
        """Say how many values each kernel has."""
        number = len(self.labels)
        where = counted(number, "kernel")
        if self.values:
            where = f"all {where} together" if number > 1 else where
        elif self.per_channel:
            where = f"each channel of {where}"
        elif number > 1:
            where = f"each of {where}"
        return f"at most {self.clusters} distinct values in {where}"

    def weights(self) -> frozenset[str]:
        """Names of the shared weights."""
        return frozenset(self.labels)

    def project(self, weight: str, value: tf.Tensor) -> tf.Tensor:
        """Give every weight the mean of its cluster; zeros stay zero.

        If zeros have come in and every cluster is still in use, the cluster nearest to zero becomes zero, so that
        the number of distinct values does not grow. Where all kernels share their values, these stay as they are.
        """
        if self.values:
            shared = tf.gather(tf.constant(self.values, value.dtype), tf.constant(self.labels[weight].astype(np.int32)))
            return tf.where(tf.equal(value, 0), value, shared)
        present, inverse = np.unique(self.labels[weight], return_inverse=True)
        labels = inverse.ravel().astype(np.int32)
        # Each codebook: a channel's, or the one that there is.
        _, books = np.unique(present // self.clusters if self.per_channel else 0 * present, return_inverse=True)
        books = tf.constant(books.astype(np.int32))
        order = np.argsort(labels, kind="stable").astype(np.int32)
        flat = tf.reshape(value, [-1])
        # Sums over sorted labels take less than half the time of sums over unsorted ones.
        ordered, segments = tf.gather(flat, order), tf.constant(labels[order])
        sums = tf.math.segment_sum(ordered, segments)
        counts = tf.math.segment_sum(tf.cast(tf.not_equal(ordered, 0), flat.dtype), segments)
        used = counts > 0
        means = sums / tf.maximum(counts, 1.0)
        # A dead cluster leaves room for the zero; so does a codebook that is not full.
        full = tf.equal(tf.math.segment_sum(tf.cast(used, tf.int32), books), self.clusters)
        zeros = tf.math.segment_sum(np.bincount(labels).astype(np.float32) - counts, books) > 0
        distance = tf.where(used, tf.abs(means), tf.fill(tf.shape(means), np.float32(np.inf)))
        number = tf.range(tf.size(means))
        nearest = tf.equal(distance, tf.gather(tf.math.segment_min(distance, books), books))
        first = tf.math.segment_min(tf.where(nearest, number, tf.size(means)), books)
        pinned = tf.equal(number, tf.gather(first, books))
        means = tf.where(tf.gather(full & zeros, books) & pinned, tf.zeros_like(means), means)
        renewed = tf.where(tf.equal(flat, 0), flat, tf.gather(means, tf.constant(labels)))
        return tf.reshape(renewed, tf.shape(value))

    def check(self, model: tf_keras.Model) -> list[Violation]:
        """Count the distinct values of each kernel."""
        return self._count({name: get_weight(model, name) for name in self.labels}, "distinct values")

    def check_file(self, file: TFLiteFile) -> list[Violation]:
        """Count the distinct values stored in the file for each kernel."""
        stored = {name: file.kernel_of(name.rpartition("/")[0], labels.shape) for name, labels in self.labels.items()}
        missing = [
            Violation(name, "its weights are not in the file") for name, kernel in stored.items() if kernel is None
        ]
        return missing + self._count({k: v for k, v in stored.items() if v is not None}, "distinct values in the file")

    def _count(self, kernels: Mapping[str, np.ndarray], what: str) -> list[Violation]:
        if self.values and all(kernel.dtype.kind == "f" for kernel in kernels.values()):
            distinct = {"all kernels": len(np.unique(np.concatenate([kernel.ravel() for kernel in kernels.values()])))}
        else:
            # Integers of two kernels have two scales.
            distinct = {name: self._most(kernel) for name, kernel in kernels.items()}
        return [
            Violation(name, f"{number} {what}, at most {self.clusters}")
            for name, number in distinct.items()
            if number > self.clusters
        ]

    def _most(self, kernel: np.ndarray) -> int:
        """Return the number of distinct values of a kernel, or of that of its channels that has most."""
        if not self.per_channel:
            return len(np.unique(kernel))
        ordered = np.sort(kernel.reshape(-1, kernel.shape[-1]), axis=0)
        return int((1 + (np.diff(ordered, axis=0) != 0).sum(0)).max())
