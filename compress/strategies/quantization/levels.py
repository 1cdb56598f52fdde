"""The guarantee of weights with few levels of any value: binary, ternary, powers of two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import tensorflow as tf
import tf_keras

from compress.candidate import Effect, Guarantee, Violation
from compress.graph.kernels import get_weight
from compress.metrics.tflite_file import TFLiteFile
from compress.strategies.quantization.grid import cut_spread
from compress.words import counted

_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Levels(Guarantee):
    """Each weight is one of its kernel's levels times its output's scale.

    ``levels``: weight name -> the levels [n], rising; ``scales``: the scales, in a shape that spreads over the
    kernel's; ``shapes``: those of the kernels.
    """

    levels: Mapping[str, np.ndarray]
    scales: Mapping[str, np.ndarray]
    shapes: Mapping[str, Sequence[int]]

    broken_by: ClassVar[frozenset[Effect]] = frozenset({Effect.SHARE, Effect.REPLACE, Effect.ROUND})

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that it binds."""
        return frozenset(name.rpartition("/")[0] for name in self.levels)

    def describe(self) -> str:
        """Say how many levels the kernels have."""
        counts = sorted({len(levels) for levels in self.levels.values()})
        return f"weights of {', '.join(map(str, counts))} levels in {counted(len(self.levels), 'kernel')}"

    def weights(self) -> frozenset[str]:
        """Names of the kernels."""
        return frozenset(self.levels)

    def project(self, weight: str, value: tf.Tensor) -> tf.Tensor:
        """Return the nearest levels."""
        levels, scales = tf.constant(self.levels[weight], value.dtype), tf.constant(self.scales[weight], value.dtype)
        borders = (levels[1:] + levels[:-1]) / 2
        flat = tf.reshape(value / scales, [-1])
        return tf.reshape(tf.gather(levels, tf.searchsorted(borders, flat)), tf.shape(value)) * scales

    def cut(self, left: Callable[[str, np.ndarray], np.ndarray]) -> Guarantee:
        """Return the property of the model that has lost channels: the scales of the outputs that are left."""
        cuts = {name: cut_spread(left, name, scales, self.shapes[name]) for name, scales in self.scales.items()}
        return replace(self, scales={n: c[0] for n, c in cuts.items()}, shapes={n: c[1] for n, c in cuts.items()})

    def check(self, model: tf_keras.Model) -> list[Violation]:
        """Look for weights between the levels."""
        found = []
        for name, levels in self.levels.items():
            relative = get_weight(model, name) / self.scales[name]
            nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, relative)]
            off = np.abs(relative - nearest) > _TOLERANCE * np.abs(levels).max()
            if off.any():
                found.append(Violation(name, f"{off.sum()} weights off its {len(levels)} levels"))
        return found

    def check_file(self, file: TFLiteFile) -> list[Violation]:
        """Count the distinct values of each output among those that the file stores.

        They need not be the levels: the converter multiplies whole outputs with what stands beside a layer.
        """
        found = []
        for name, levels in self.levels.items():
            stored = file.kernel_of(name.rpartition("/")[0], tuple(self.shapes[name]))
            if stored is None:
                found.append(Violation(name, "its weights are not in the file"))
                continue
            most = int(_count_distinct(stored, self.scales[name].shape).max())
            if most > len(levels):
                found.append(Violation(name, f"{most} distinct values in an output, at most {len(levels)}"))
        return found


@dataclass(frozen=True)
class NonzeroLevels(Levels):
    """Levels of which none is zero."""

    broken_by: ClassVar[frozenset[Effect]] = Levels.broken_by | {Effect.ZERO}


def _count_distinct(values: np.ndarray, spread: Sequence[int]) -> np.ndarray:
    """Return how many distinct values each output has, up to rounding; ``spread`` is 1 except along the outputs."""
    inner = [axis for axis, size in enumerate(spread) if size == 1]
    outputs = np.moveaxis(values.astype(np.float64), inner, range(len(inner)))
    rows = outputs.reshape(int(np.prod(outputs.shape[: len(inner)])), -1)
    rises = np.diff(np.sort(rows, axis=0), axis=0) > 1e-5 * np.abs(rows).max(0, initial=1e-30)
    return np.asarray(1 + rises.sum(0))
