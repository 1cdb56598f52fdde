"""Structural matrices: Dense layers whose matrix is given by far fewer numbers than it has entries.

What they share: a trained matrix is projected onto the structure, the layer becomes a chain of Keras' own layers that
multiplies with the structured matrix without ever forming it (so the exported file is as small, and any runtime runs
it), and the network recovers.

Source: Cheng et al. (arXiv 1710.09282, section II.C); Sindhwani, Sainath, Kumar (arXiv 1510.01722).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tf_keras

from compress.candidate import Candidate, Effect, Guarantee, Skipped, Violation
from compress.graph.kernels import Kernel, kernel_attributes, kernels, without_kernel
from compress.graph.rewrite import NewLayer, calls, rewrite
from compress.graph.selection import Selection
from compress.metrics.tflite_file import TFLiteFile
from compress.strategies.strategy import Context, Strategy

layers = tf_keras.layers


@dataclass(frozen=True)
class Matrix:
    """A structured matrix [inputs, outputs]: the chain that multiplies with it, and how many numbers it takes."""

    chain: Sequence[tuple[tf_keras.layers.Layer, Sequence[np.ndarray]]]
    """Layers from [b, inputs] to [b, outputs], each with its weights; without names."""
    size: int


@dataclass(frozen=True)
class Structure(Guarantee):
    """Layers are products with structured matrices; ``sizes``: layer of their chains -> numbers in its kernel."""

    sizes: Mapping[str, int]

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that hold the structured matrices' numbers."""
        return frozenset(self.sizes)

    def describe(self) -> str:
        """Say how many numbers are left."""
        return f"structured matrices of {sum(self.sizes.values()):,} numbers in all"

    def check(self, model: tf_keras.Model) -> list[Violation]:
        """Look for the layers, and count the numbers in their kernels."""
        sizes = {kernel.layer.name: kernel.size for kernel in kernels(model)}
        return [
            Violation(name, "it is gone" if name not in sizes else f"{sizes[name]} numbers, at most {size}")
            for name, size in self.sizes.items()
            if sizes.get(name, size + 1) > size
        ]

    def check_file(self, file: TFLiteFile) -> list[Violation]:
        """Look for the operators that multiply with the numbers."""
        return [Violation(name, "the file does not run it") for name in self.sizes if file.operator_of(name) is None]


class Structured(Strategy):
    """Give the selected Dense layers structured matrices where that saves, then recover. Subclasses say which."""

    effects = frozenset({Effect.TRAIN, Effect.REPLACE})
    establishes = Structure

    @abstractmethod
    def project(self, matrix: np.ndarray) -> Matrix | str:
        """Return the structured matrix nearest to ``matrix`` [inputs, outputs], or why there is none."""

    def targets(self, model: tf_keras.Model, selection: Selection) -> frozenset[str]:
        """Only the layers that can be replaced."""
        names = selection.names(model)
        return frozenset(k.layer.name for k in kernels(model) if k.layer.name in names and _obstacle(k) is None)

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Project every selected matrix, put the chains in their place, recover."""
        model = candidate.model
        names, times = context.selection.names(model), calls(model)
        skipped = [
            Skipped(layer.name, f"weights of {type(layer).__name__} layers are not structured")
            for layer in without_kernel(model)
            if layer.name in names
        ]
        chains: dict[str, Sequence[NewLayer]] = {}
        for kernel in kernels(model):
            name = kernel.layer.name
            if name not in names:
                continue
            found = "called more than once" if times[name] > 1 else _obstacle(kernel) or self.project(kernel.value)
            if isinstance(found, str):
                skipped.append(Skipped(name, found))
            elif found.size + kernel.value.shape[1] >= kernel.size:
                skipped.append(Skipped(name, f"{found.size:,} numbers for {kernel.size:,} would not pay", True))
            else:
                chains[name] = _named(found, kernel.layer)
        if not chains:
            raise context.nothing_done("a Dense layer that the structure makes smaller", skipped)
        result = candidate.evolve(model=rewrite(model, chains), skipped=context.skip(skipped))
        result = result.replaced({old: [new.layer.name for new in chain] for old, chain in chains.items()})
        parts = {new.layer.name for chain in chains.values() for new in chain if kernel_attributes(new.layer)}
        sizes = {k.layer.name: k.size for k in kernels(result.model) if k.layer.name in parts}
        return context.recover(result.with_guarantee(Structure(context.stage, sizes)))


def blocks_of(matrix: np.ndarray, size: int) -> np.ndarray | str:
    """Return the blocks [rows, columns, size, size] of a matrix [inputs, outputs], or why it has none of that size."""
    inputs, outputs = matrix.shape
    if inputs % size or outputs % size:
        return f"{inputs} inputs and {outputs} outputs are not both multiples of block={size}"
    return matrix.reshape(inputs // size, size, outputs // size, size).transpose(0, 2, 1, 3)


def _obstacle(kernel: Kernel) -> str | None:
    if not isinstance(kernel.layer, layers.Dense):
        return f"{type(kernel.layer).__name__} is not a Dense layer"
    return None if len(kernel.layer.input_shape) == 2 else "it reads more than one vector of a sample"


def _named(matrix: Matrix, dense: tf_keras.layers.Dense) -> list[NewLayer]:
    """Return the chain with names after the Dense layer; the layer of scale and bias has its very name."""
    units = dense.units
    last = layers.DepthwiseConv2D(
        1, use_bias=dense.use_bias, activation=dense.activation, name=dense.name, depthwise_initializer="ones"
    )
    bias = [np.asarray(dense.bias)] if dense.use_bias else []
    chain = [
        *matrix.chain,
        (layers.Reshape((1, 1, units)), []),
        (last, [np.ones((1, 1, units, 1), np.float32), *bias]),
        (layers.Reshape((units,)), []),
    ]
    named = []
    for number, (layer, weights) in enumerate(chain):
        if layer is not last:
            layer = type(layer).from_config({**layer.get_config(), "name": f"{dense.name}_structure{number}"})
        named.append(NewLayer(layer, tuple(weights)))
    return named
