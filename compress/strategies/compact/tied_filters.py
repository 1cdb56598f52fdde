"""The guarantee of transferred filters: each weight holds the number of a meta filter that a transformation says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import tensorflow as tf
import tf_keras

from compress.candidate import Effect, Guarantee, Transfer, Violation
from compress.deploy.coding.transfers import labels_of, numbers_of, places
from compress.graph.kernels import get_weight
from compress.metrics.tflite_file import TFLiteFile

Transform = Literal["translation", "rotation", "circulant"]


@dataclass(frozen=True)
class TiedFilters(Guarantee):
    """Each weight is zero, or the number that its label names.

    ``labels``: weight name -> integers of the kernel's shape. ``shapes``: height, width and channels of its filters as
    they were made; ``transform`` and ``size``: how, as in :class:`~compress.candidate.Transfer`.
    """

    transform: Transform
    size: int
    labels: Mapping[str, np.ndarray]
    shapes: Mapping[str, Sequence[int]]

    broken_by: ClassVar[frozenset[Effect]] = frozenset({Effect.REPLACE, Effect.SPREAD, Effect.LEVEL, Effect.SHARE})
    # Filters of one meta filter in channels with different scales would become different integers.
    one_scale_per_tensor: ClassVar[bool] = True

    @classmethod
    def of(cls, stage: str, transfers: Mapping[str, Transfer]) -> TiedFilters:
        """Return the guarantee for kernels that follow by one kind of transformation; weight name -> how."""
        one = next(iter(transfers.values()))
        labels = {name: labels_of(transfer) for name, transfer in transfers.items()}
        shapes = {name: list(transfer.shape) for name, transfer in transfers.items()}
        return cls(stage, one.transform, one.size, labels, shapes)

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that it binds."""
        return frozenset(name.rpartition("/")[0] for name in self.labels)

    def numbers(self) -> int:
        """Return how many numbers there are."""
        return sum(len(np.unique(labels)) for labels in self.labels.values())

    def describe(self) -> str:
        """Say how many numbers are left."""
        total = sum(labels.size for labels in self.labels.values())
        return f"{total:,} weights of transferred filters ({self.transform}) are {self.numbers():,} numbers"

    def weights(self) -> frozenset[str]:
        """Names of the kernels."""
        return frozenset(self.labels)

    def transfers(self) -> Mapping[str, Transfer]:
        """Return how each kernel follows from its meta filters; not of one that has lost channels since."""
        found = {name: self._transfer(name) for name in self.labels}
        return {name: transfer for name, transfer in found.items() if transfer is not None}

    def _transfer(self, name: str) -> Transfer | None:
        labels = self.labels[name]
        height, width, channels = self.shapes[name]
        if labels.shape[:3] != (height, width, channels):
            return None
        transfer = Transfer(self.transform, self.size, (height, width, channels))
        moved, size = places(transfer), numbers_of(transfer)
        meta, place = np.divmod(labels.reshape(-1, labels.shape[-1]), size)
        index = (place.T[:, None] == moved[None]).all(2).argmax(1)
        slots = tuple(map(int, meta[0] * len(moved) + index))
        transfer = Transfer(transfer.transform, transfer.size, transfer.shape, slots)
        return transfer if np.array_equal(labels_of(transfer), labels) else None

    def project(self, weight: str, value: tf.Tensor) -> tf.Tensor:
        """Give every weight its number's mean: the nearest such kernel; zeros stay zero."""
        _, dense = np.unique(self.labels[weight], return_inverse=True)
        flat = dense.ravel().astype(np.int32)
        # Sums over sorted numbers take less than half the time of sums over unsorted ones.
        order = np.argsort(flat, kind="stable").astype(np.int32)
        ordered, parts = tf.gather(tf.reshape(value, [-1]), order), tf.constant(flat[order])
        alive = tf.cast(tf.not_equal(ordered, 0), ordered.dtype)
        means = tf.math.segment_sum(ordered, parts) / tf.maximum(tf.math.segment_sum(alive, parts), 1.0)
        whole = tf.reshape(tf.gather(means, tf.constant(flat)), tf.shape(value))
        return tf.where(tf.equal(value, 0), value, whole)

    def check(self, model: tf_keras.Model) -> list[Violation]:
        """Compare each weight with its number."""
        return [found for name in self.labels for found in self._compare(name, get_weight(model, name), "")]

    def check_file(self, file: TFLiteFile) -> list[Violation]:
        """Compare each weight that the file stores with its number."""
        found = []
        for name, labels in self.labels.items():
            stored = file.kernel_of(name.rpartition("/")[0], labels.shape)
            missing = [Violation(name, "its weights are not in the file")]
            found += missing if stored is None else self._compare(name, stored, " in the file")
        return found

    def _compare(self, name: str, value: np.ndarray, where: str) -> list[Violation]:
        labels = self.labels[name]
        if value.shape != labels.shape:
            return [Violation(name, f"a kernel of shape {value.shape}, not {labels.shape}{where}")]
        alive = value != 0
        book = np.zeros(int(labels.max()) + 1, value.dtype)
        book[labels[alive]] = value[alive]
        wrong = int(np.count_nonzero(value[alive] != book[labels[alive]]))
        return [Violation(name, f"{wrong} weights that are not their meta filter's{where}")] if wrong else []
