"""The guarantee of product quantization: a kernel is put together from few distinct vectors."""

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
from compress.words import counted


@dataclass(frozen=True)
class VectorCodebook(Guarantee):
    """Each output's weights are vectors along the inputs, and those of a kernel are at most ``codewords``.

    ``labels``: weight name -> integers [groups, outputs], which codeword each vector is. ``shapes``: those of the
    kernels, whose axes but the last are the inputs, counted one row after the other.
    """

    codewords: int
    labels: Mapping[str, np.ndarray]
    shapes: Mapping[str, list[int]]

    broken_by: ClassVar[frozenset[Effect]] = frozenset(
        {
            # A zero or a level in one place of a vector, and a centroid of other weights, would make new vectors.
            *(Effect.ZERO, Effect.LEVEL, Effect.SPREAD, Effect.SHARE),
            # Without an input, vectors end in other places.
            *(Effect.CUT, Effect.REPLACE),
        }
    )
    # Two equal vectors of outputs with different scales would become two different ones.
    one_scale_per_tensor: ClassVar[bool] = True

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that it binds."""
        return frozenset(name.rpartition("/")[0] for name in self.labels)

    def describe(self) -> str:
        """Say how many vectors there are, and how long they are."""
        lengths = sorted({self._length(name) for name in self.labels})
        span = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        where = counted(len(self.labels), "kernel")
        where = where if len(self.labels) == 1 else f"each of {where}"
        return f"at most {self.codewords} distinct vectors of {span} weights in {where}"

    def weights(self) -> frozenset[str]:
        """Names of the kernels."""
        return frozenset(self.labels)

    def _length(self, weight: str) -> int:
        return int(np.prod(self.shapes[weight][:-1])) // len(self.labels[weight])

    def project(self, weight: str, value: tf.Tensor) -> tf.Tensor:
        """Give every vector the mean of its codeword's: a codeword moves by the mean of its weights' gradients."""
        labels, length = self.labels[weight], self._length(weight)
        groups, outputs = labels.shape
        _, dense = np.unique(labels, return_inverse=True)
        flat = dense.ravel().astype(np.int32)
        order = np.argsort(flat, kind="stable").astype(np.int32)
        cut = tf.transpose(tf.reshape(value, [groups, length, outputs]), [0, 2, 1])
        means = tf.math.segment_mean(tf.gather(tf.reshape(cut, [-1, length]), order), flat[order])
        renewed = tf.reshape(tf.gather(means, flat), [groups, outputs, length])
        return tf.reshape(tf.transpose(renewed, [0, 2, 1]), tf.shape(value))

    def check(self, model: tf_keras.Model) -> list[Violation]:
        """Count the distinct vectors of each kernel."""
        return self._count({name: get_weight(model, name) for name in self.labels}, "distinct vectors")

    def check_file(self, file: TFLiteFile) -> list[Violation]:
        """Count the distinct vectors stored in the file for each kernel."""
        stored = {name: file.kernel_of(name.rpartition("/")[0], tuple(shape)) for name, shape in self.shapes.items()}
        missing = [
            Violation(name, "its weights are not in the file") for name, kernel in stored.items() if kernel is None
        ]
        return missing + self._count({k: v for k, v in stored.items() if v is not None}, "distinct vectors in the file")

    def _count(self, kernels: Mapping[str, np.ndarray], what: str) -> list[Violation]:
        found = []
        for name, kernel in kernels.items():
            groups, outputs = self.labels[name].shape
            vectors = kernel.reshape(groups, -1, outputs).transpose(0, 2, 1).reshape(groups * outputs, -1)
            number = len(np.unique(vectors, axis=0))
            if number > self.codewords:
                found.append(Violation(name, f"{number} {what}, at most {self.codewords}"))
        return found
