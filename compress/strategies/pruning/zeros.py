"""The guarantee of pruning: certain weights are exactly zero."""

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
class Zeros(Guarantee):
    """The weights where ``masks`` is false are zero. Weight name -> boolean mask of the kernel's shape."""

    masks: Mapping[str, np.ndarray]

    broken_by: ClassVar[frozenset[Effect]] = frozenset({Effect.REPLACE, Effect.FILL})
    comes_first: ClassVar[bool] = True

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that it binds."""
        return frozenset(name.rpartition("/")[0] for name in self.masks)

    def describe(self) -> str:
        """Say how much is zero."""
        zeros = sum(int(mask.size - np.count_nonzero(mask)) for mask in self.masks.values())
        total = sum(mask.size for mask in self.masks.values())
        return f"{zeros / total:.1%} of {total} weights in {counted(len(self.masks), 'kernel')} are zero"

    def weights(self) -> frozenset[str]:
        """Names of the masked weights."""
        return frozenset(self.masks)

    def project(self, weight: str, value: tf.Tensor) -> tf.Tensor:
        """Set the masked weights to zero."""
        return tf.where(tf.constant(self.masks[weight]), value, tf.zeros_like(value))

    def check(self, model: tf_keras.Model) -> list[Violation]:
        """Count masked weights that are not zero."""
        found = []
        for name, mask in self.masks.items():
            wrong = int(np.count_nonzero(get_weight(model, name)[~mask]))
            if wrong:
                found.append(Violation(name, f"{wrong} pruned weights are not zero"))
        return found

    def check_file(self, file: TFLiteFile) -> list[Violation]:
        """Compare the zeros stored in the file with the mask's, position by position."""
        found = []
        for name, mask in self.masks.items():
            stored = file.kernel_of(name.rpartition("/")[0], mask.shape)
            if stored is None:
                found.append(Violation(name, "its weights are not in the file"))
                continue
            wrong = int(np.count_nonzero(stored[~mask]))
            if wrong:
                found.append(Violation(name, f"{wrong} pruned weights are not zero in the file"))
        return found


@dataclass(frozen=True)
class PatternedZeros(Zeros):
    """Zeros in a pattern along the channels (N:M, blocks), which a cut would break."""

    broken_by: ClassVar[frozenset[Effect]] = frozenset({Effect.REPLACE, Effect.FILL, Effect.CUT})
