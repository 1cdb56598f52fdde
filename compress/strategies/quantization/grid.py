"""The guarantee of low-bit weights: each kernel lies on its grid, and the file stores the very levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import tensorflow as tf
import tf_keras

from compress.candidate import Effect, Grid, Guarantee, Violation
from compress.graph.kernels import get_weight
from compress.metrics.tflite_file import TFLiteFile
from compress.words import counted

_TOLERANCE = 0.02
"""How far from a level a value may lie, in steps: what single precision leaves."""


@dataclass(frozen=True)
class OnGrid(Guarantee):
    """Each kernel is made of whole multiples of its steps, at most ``2**(bits - 1) - 1`` to each side.

    ``steps``: weight name -> one step for each output, in a shape that spreads over the kernel's; ``bits``: the same
    names -> bits of a weight; ``shapes``: those of the kernels.
    """

    steps: Mapping[str, np.ndarray]
    bits: Mapping[str, int]
    shapes: Mapping[str, Sequence[int]]

    broken_by: ClassVar[frozenset[Effect]] = frozenset({Effect.SHARE, Effect.REPLACE, Effect.ROUND})

    @classmethod
    def of(cls, stage: str, model: tf_keras.Model, grids: Mapping[str, Grid]) -> Self:
        """Return the guarantee for kernels of ``model`` that lie on grids, by weight name."""
        steps = {name: grid.steps for name, grid in grids.items()}
        shapes = {name: get_weight(model, name).shape for name in grids}
        return cls(stage, steps, {name: grid.bits for name, grid in grids.items()}, shapes)

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that it binds."""
        return frozenset(name.rpartition("/")[0] for name in self.steps)

    def describe(self) -> str:
        """Say how many bits the kernels have."""
        widths = sorted(set(self.bits.values()))
        return f"weights of {', '.join(map(str, widths))} bits in {counted(len(self.steps), 'kernel')}"

    def weights(self) -> frozenset[str]:
        """Names of the kernels."""
        return frozenset(self.steps)

    def grids(self) -> Mapping[str, Grid]:
        """Return the grid of each kernel."""
        return {name: Grid(steps, self.bits[name]) for name, steps in self.steps.items()}

    def project(self, weight: str, value: tf.Tensor) -> tf.Tensor:
        """Return the nearest levels."""
        steps, most = tf.constant(self.steps[weight], value.dtype), 2 ** (self.bits[weight] - 1) - 1
        return tf.clip_by_value(tf.round(value / steps), -most, most) * steps

    def cut(self, left: Callable[[str, np.ndarray], np.ndarray]) -> Guarantee:
        """Return the property of the model that has lost channels: the steps of the outputs that are left."""
        cuts = {name: cut_spread(left, name, steps, self.shapes[name]) for name, steps in self.steps.items()}
        return replace(self, steps={n: c[0] for n, c in cuts.items()}, shapes={n: c[1] for n, c in cuts.items()})

    def check(self, model: tf_keras.Model) -> list[Violation]:
        """Look for weights between the levels."""
        return [v for name in self.steps for v in self._compare(name, get_weight(model, name))]

    def check_file(self, file: TFLiteFile) -> list[Violation]:
        """Look for levels beyond the grid's among the integers that the file stores.

        Their scales need not be the steps: the converter multiplies whole channels with what stands beside a layer.
        """
        found = []
        for name, bits in self.bits.items():
            stored = file.kernel_of(name.rpartition("/")[0], tuple(self.shapes[name]))
            most = 2 ** (bits - 1) - 1
            if stored is None:
                found.append(Violation(name, "its weights are not in the file"))
            elif stored.dtype != np.int8:
                found.append(Violation(name, f"stored as {stored.dtype}, expected integers of {bits} bits"))
            elif np.abs(stored.astype(int)).max(initial=0) > most:
                found.append(Violation(name, f"integers up to {np.abs(stored.astype(int)).max()}, at most {most}"))
        return found

    def _compare(self, name: str, values: np.ndarray) -> list[Violation]:
        levels, most = values / self.steps[name], 2 ** (self.bits[name] - 1) - 1
        off = (np.abs(levels - np.rint(levels)) > _TOLERANCE) | (np.abs(levels) > most + _TOLERANCE)
        return [Violation(name, f"{off.sum()} weights off the grid of {self.bits[name]} bits")] if off.any() else []


@dataclass(frozen=True)
class FinalGrid(OnGrid):
    """A grid that was trained, or chosen, together with the float layers: writing the file anew would lose those."""

    broken_by: ClassVar[frozenset[Effect]] = OnGrid.broken_by | {Effect.STORE}


def cut_spread(
    left: Callable[[str, np.ndarray], np.ndarray], weight: str, spread: np.ndarray, shape: Sequence[int]
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return what is left of an array that spreads over a weight that has lost channels, and the weight's shape.

    Args:
        left: returns, for the name of a weight and an array of its shape, what is left of the array.
        weight: its name.
        spread: the array.
        shape: of the weight before.
    """
    whole = left(weight, np.broadcast_to(spread, shape))
    once = tuple(slice(0, 1) if size == 1 else slice(None) for size in spread.shape)
    return whole[once].copy(), whole.shape
