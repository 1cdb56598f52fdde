"""Centroids that are trained: what a step of the optimiser does to weights becomes what it does to their codebook."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf


class TrainedCentroids:
    """A projection that moves each centroid by what its weights were moved by, and the weights with it.

    Source: Deep Compression (arXiv 1510.00149, section 3.3 and figure 3).

    Args:
        variables: the weights, each of which holds a value of its codebook.
        labels: for each of them, which value; unsigned integers of its shape.
        joint: whether all variables share one codebook.
        summed: a centroid moves by the sum of what its weights were moved by, else by the mean.
    """

    def __init__(
        self, variables: Sequence[tf.Variable], labels: Sequence[np.ndarray], *, joint: bool, summed: bool
    ) -> None:
        self._variables, self._summed, self._joint = list(variables), summed, joint
        self._groups = [list(range(len(labels)))] if joint else [[number] for number in range(len(labels))]
        self._labels = [tf.constant(label.ravel().astype(np.int32)) for label in labels]
        self._codebooks = [tf.Variable(self._read(group), trainable=False) for group in self._groups]

    @property
    def plain(self) -> bool:
        """Whether it does no more than a mean over each kernel's clusters."""
        return not (self._joint or self._summed)

    def values(self) -> np.ndarray:
        """Return the codebook that all variables share, float32 [clusters]."""
        return np.asarray(self._codebooks[0])

    def _size(self, group: list[int]) -> int:
        return 1 + max(int(tf.reduce_max(self._labels[number])) for number in group)

    def _read(self, group: list[int]) -> np.ndarray:
        codebook = np.zeros(self._size(group), np.float32)
        for number in group:
            codebook[np.asarray(self._labels[number])] = np.asarray(self._variables[number]).ravel()
        return codebook

    def __call__(self, done: tf.Tensor) -> None:
        """Move the centroids after a step of the optimiser."""
        for group, codebook in zip(self._groups, self._codebooks, strict=True):
            size = codebook.shape[0]
            moved, counts = tf.zeros(size), tf.zeros(size)
            for number in group:
                label, variable = self._labels[number], self._variables[number]
                change = tf.reshape(variable, [-1]) - tf.gather(codebook, label)
                moved += tf.math.unsorted_segment_sum(change, label, size)
                counts += tf.math.unsorted_segment_sum(tf.ones_like(change), label, size)
            step = moved if self._summed else moved / tf.maximum(counts, 1.0)
            # Zero is a value like any other only where no weight was zero to begin with.
            codebook.assign_add(tf.where(tf.equal(codebook, 0.0), 0.0, step))
            for number in group:
                variable = self._variables[number]
                variable.assign(tf.reshape(tf.gather(codebook, self._labels[number]), variable.shape))
