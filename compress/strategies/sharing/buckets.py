"""The guarantee of hashed sharing: a hash of its place says which bucket's number a weight holds, up to its sign."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np
import tensorflow as tf
import tf_keras

from compress.candidate import Effect, Guarantee, Hash, Violation
from compress.deploy.coding.hashing import buckets_and_signs
from compress.graph.kernels import get_weight
from compress.metrics.tflite_file import TFLiteFile


@dataclass(frozen=True)
class Buckets(Guarantee):
    """Each weight is zero, or its bucket's number with the sign of its place.

    Weight name -> ``keys``: of its hash; ``counts``: its buckets; ``shapes``: the kernel's shape.
    """

    keys: Mapping[str, int]
    counts: Mapping[str, int]
    shapes: Mapping[str, Sequence[int]]

    broken_by: ClassVar[frozenset[Effect]] = frozenset(
        {Effect.REPLACE, Effect.SPREAD, Effect.LEVEL, Effect.SHARE, Effect.CUT}
    )
    # Two weights of one bucket in channels with different scales would become two different integers.
    one_scale_per_tensor: ClassVar[bool] = True

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that it binds."""
        return frozenset(name.rpartition("/")[0] for name in self.keys)

    def describe(self) -> str:
        """Say how many numbers are left."""
        total = sum(prod(shape) for shape in self.shapes.values())
        return f"{total:,} weights share {sum(self.counts.values()):,} numbers by a hash"

    def weights(self) -> frozenset[str]:
        """Names of the hashed weights."""
        return frozenset(self.keys)

    def hashes(self) -> Mapping[str, Hash]:
        """Return the hash of each weight."""
        return {name: Hash(key, self.counts[name], self.shapes[name][-1]) for name, key in self.keys.items()}

    def project(self, weight: str, value: tf.Tensor) -> tf.Tensor:
        """Give every weight its bucket's mean: the nearest such kernel; zeros stay zero."""
        buckets, signs = buckets_and_signs(self.hashes()[weight], prod(self.shapes[weight]))
        # Sums over sorted numbers take less than half the time of sums over unsorted ones.
        order = np.argsort(buckets, kind="stable").astype(np.int32)
        _, segments = np.unique(buckets[order], return_inverse=True)
        back = np.empty_like(order)
        back[order] = np.arange(len(order), dtype=np.int32)
        sorted_signs = tf.constant(np.where(signs[order], -1, 1).astype(np.float32))
        ordered = tf.gather(tf.reshape(value, [-1]), order)
        parts = tf.constant(segments.astype(np.int32))
        alive = tf.not_equal(ordered, 0)
        sums = tf.math.segment_sum(ordered * sorted_signs, parts)
        means = sums / tf.maximum(tf.math.segment_sum(tf.cast(alive, ordered.dtype), parts), 1.0)
        renewed = tf.where(alive, tf.gather(means, parts) * sorted_signs, tf.zeros_like(ordered))
        return tf.reshape(tf.gather(renewed, back), tf.shape(value))

    def check(self, model: tf_keras.Model) -> list[Violation]:
        """Compare each weight with its bucket's number."""
        return [found for name in self.keys for found in self._compare(name, get_weight(model, name), "")]

    def check_file(self, file: TFLiteFile) -> list[Violation]:
        """Compare each weight that the file stores with its bucket's number."""
        found = []
        for name, shape in self.shapes.items():
            stored = file.kernel_of(name.rpartition("/")[0], tuple(shape))
            missing = [Violation(name, "its weights are not in the file")]
            found += missing if stored is None else self._compare(name, stored, " in the file")
        return found

    def _compare(self, name: str, value: np.ndarray, where: str) -> list[Violation]:
        if tuple(value.shape) != tuple(self.shapes[name]):
            return [Violation(name, f"a kernel of shape {tuple(value.shape)}, not {tuple(self.shapes[name])}{where}")]
        buckets, signs = buckets_and_signs(self.hashes()[name], value.size)
        flat = value.reshape(-1)
        signed, alive = np.where(signs, -flat, flat), flat != 0
        book = np.zeros(self.counts[name], value.dtype)
        book[buckets[alive]] = signed[alive]
        wrong = int(np.count_nonzero(signed[alive] != book[buckets[alive]]))
        return [Violation(name, f"{wrong} weights that are not their bucket's number{where}")] if wrong else []
