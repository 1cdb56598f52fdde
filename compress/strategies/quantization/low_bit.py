"""Training with weights of very few values: what all methods of this kind share.

Each method says how weights become levels (a quantizer); the levels are trained through, the network keeps its batch
norms, and what is left in it at the end are the levels themselves.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from typing import ClassVar, Protocol

import numpy as np
import tf_keras

from compress.candidate import Candidate, Effect, Skipped
from compress.graph.fold import fold_layer_norm
from compress.graph.kernels import Kernel, get_weight, kernels, without_kernel
from compress.graph.rewrite import calls, copy_model
from compress.strategies.quantization.levels import Levels
from compress.strategies.quantization.valued import valued_layers
from compress.strategies.strategy import Context, Strategy
from compress.training_step import WeightQuantizer


class LevelQuantizer(WeightQuantizer, Protocol):
    """A quantizer whose levels can be told."""

    def levels(self, quantized: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the levels [n], rising, and the scale of each output, which spreads over the quantized weight."""


class LowBit(Strategy):
    """Train the selected kernels as levels. Subclasses say which."""

    effects = frozenset({Effect.TRAIN, Effect.SHARE, Effect.LEVEL})
    needs_training = True
    establishes: ClassVar[type[Levels]] = Levels

    @property
    def rounds_inputs(self) -> bool:
        """Whether what the kernels are multiplied with is rounded, too."""
        return False

    @abstractmethod
    def quantizer(self, kernel: Kernel) -> LevelQuantizer:
        """Return what makes levels of a kernel."""

    def prepared(self, model: tf_keras.Model, names: Collection[str], context: Context) -> tf_keras.Model:
        """Return the copy of the model that is trained."""
        return copy_model(model)

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Train a copy behind the quantizers."""
        context.require_training()
        names = context.selection.names(candidate.model)
        folded = fold_layer_norm(candidate.model, valued_layers(candidate.guarantees))
        model = self.prepared(folded, names, context)
        skipped = [
            Skipped(layer.name, f"weights of {type(layer).__name__} layers are not quantized")
            for layer in without_kernel(model)
            if layer.name in names
        ]
        chosen = [kernel for kernel in kernels(model) if kernel.layer.name in names]
        if not chosen:
            raise context.nothing_done("a layer with a kernel to quantize", skipped)
        times = calls(model)
        skipped += [
            Skipped(kernel.layer.name, "its inputs are not rounded: it is called several times")
            for kernel in chosen
            if self.rounds_inputs and times[kernel.layer.name] > 1
        ]
        left_alone = context.skip(skipped)
        quantizers = {kernel.name: self.quantizer(kernel) for kernel in chosen}
        context.recover(candidate.evolve(model=model), quantizers=quantizers)
        found = {}
        for kernel in chosen:
            values, scales = quantizers[kernel.name].levels(kernel.value)
            spread = [
                1 if axis in kernel.inner_axes else kernel.value.shape[axis] for axis in range(-kernel.value.ndim, 0)
            ]
            found[kernel.name] = values, np.broadcast_to(scales, spread).copy()
        levels = self.establishes(
            context.stage,
            levels={name: values for name, (values, _) in found.items()},
            scales={name: scales for name, (_, scales) in found.items()},
            shapes={name: get_weight(model, name).shape for name in found},
        )
        return candidate.evolve(model=model, skipped=left_alone).with_guarantee(levels)
