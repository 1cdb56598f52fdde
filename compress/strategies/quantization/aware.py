"""Quantization-aware training: the network learns with the rounding that its integer file will do.

Sources: Jacob et al. (arXiv 1712.05877, section 3); Esser et al., learned step size quantization (arXiv 1902.08153).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import tensorflow as tf
import tf_keras
from annotated_types import Ge, Le
from pydantic.dataclasses import dataclass

from compress.candidate import Calibration, Candidate, Effect, Skipped, Storage
from compress.data.source import Data
from compress.deploy.points import calibrated_points
from compress.errors import CompressError
from compress.graph.fold import fold_batch_norm, fold_layer_norm
from compress.graph.kernels import Kernel, get_weight, kernels, without_kernel
from compress.graph.separable import split_separable
from compress.metrics.accuracy import accuracy, keras_outputs
from compress.strategies.options import refuse_without_effect
from compress.strategies.quantization.calibration import check_activations
from compress.strategies.quantization.fake_quantization import trained_ranges, with_fake_quantization
from compress.strategies.quantization.grid import FinalGrid
from compress.strategies.quantization.layer_bits import Bits, LayerBits, bits_of_layers
from compress.strategies.quantization.quantizers import StepQuantizer, UniformQuantizer
from compress.strategies.quantization.rounding import round_layers
from compress.strategies.quantization.stored import Stored, float_only
from compress.strategies.quantization.tfmot_scheme import unwrap, wrapped_by_tfmot
from compress.strategies.quantization.unfolding import fold_grids, folded_ranges, unfold
from compress.strategies.quantization.valued import valued_layers
from compress.strategies.repair import Repair
from compress.strategies.strategy import STRICT, Context, Strategy

_JUDGED = 2000
"""Validation images that an accuracy is taken of, at most."""


@dataclass(frozen=True, config=STRICT)
class QuantizeAware(Strategy):
    """Train the network with rounded weights and activations; the file holds the very levels and ranges.

    Batch norms learn along and are folded at the end. Layers that the stage leaves out (``only``, ``skip``) keep float
    weights and compute with floats in the file.

    Args:
        bits: of a weight; one step for each output.
        packed: 4 bits and fewer are stored two weights to a byte, where LiteRT reads them so. It expands them in each
            call; false, a byte each, is faster. The ``.cmp`` is as small either way.
        layer_bits: those of single layers, by name or regular expression.
        activation_bits: of what layers compute. The file has 8 in any case: below it computes more finely than the
            network that was trained, whose accuracy the report gives as ``measured.accuracy_as_trained`` (validation
            part).
        learned_steps: train the steps with the weights (LSQ), instead of having the largest weight be the outermost
            level.
        rounding_images: below 8 bits, training starts from weights that are rounded in closed form on so many
            unlabelled images; 0: from the nearest levels.
        scheme: ``own``, which any model can be trained with, or ``tfmot``: the toolkit's layers, with ranges that are
            moving averages; for models that it takes, with 8 bits, whole, and before other stages.
        ranges: where the ranges of activations start, on ``calibration_images`` training images; they are trained, too.
    """

    bits: Bits = 8
    layer_bits: LayerBits | None = None
    packed: bool = True
    activation_bits: Annotated[int, Ge(2), Le(8)] = 8
    learned_steps: bool = False
    rounding_images: Annotated[int, Ge(0), Le(1_000_000)] = 500
    ranges: Literal["minmax", "percentile", "mse", "entropy"] = "mse"
    calibration_images: Annotated[int, Ge(1)] = 256
    scheme: Literal["own", "tfmot"] = "own"

    effects = frozenset({Effect.TRAIN, Effect.STORE, Effect.ROUND})
    establishes = FinalGrid
    needs_training = True
    stores = "int8"

    def __post_init__(self) -> None:
        """Refuse fields that TFMOT's scheme does not have."""
        own = ("bits", "layer_bits", "packed", "activation_bits", "learned_steps", "rounding_images", "ranges")
        rules = [(self.scheme == "own", own, "scheme=own"), (self._low, ("rounding_images",), "bits below 8")]
        refuse_without_effect(self, rules)

    @property
    def _low(self) -> bool:
        """Whether some weights have fewer than 8 bits."""
        return min(self.bits, *(self.layer_bits or {}).values(), 8) < 8

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Insert the rounding, train, take the rounding out again, fold."""
        context.require_training()
        check_activations(candidate, context.data, self.calibration_images)
        if self.scheme == "tfmot":
            return self._by_tfmot(candidate, context)
        chosen = context.selection.names(candidate.model)
        # What a separable layer computes between its kernels is an integer of the file, too.
        bound = frozenset().union(*(guarantee.layers for guarantee in candidate.guarantees))
        split, halves = split_separable(candidate.model, bound)
        chosen |= {depthwise for pointwise, depthwise in halves.items() if pointwise in chosen}
        model, steps = self._start(candidate.evolve(model=split), context, chosen)
        lacking = float_only(model, chosen)
        chosen -= {item.layer for item in lacking}
        wanted = [kernel for kernel in kernels(model) if kernel.layer.name in chosen]
        skipped = lacking + [
            Skipped(layer.name, f"weights of {type(layer).__name__} layers are left to the converter")
            for layer in without_kernel(model)
            if layer.name in chosen
        ]
        if not wanted:
            raise context.nothing_done("a layer with a kernel to quantize", skipped)
        left_alone = context.skip(skipped)
        if self.activation_bits < 8:
            finer = f"the file rounds them to 8 bits, not to {self.activation_bits}: LiteRT has no fewer"
            left_alone = (*left_alone, Skipped("activations", finer, by_choice=True))
        one_scale = _one_scale(candidate)
        bits = self._bits(wanted, context)
        quantizers = {k.name: self._quantizer(k, bits[k.name], steps, whole=k.name in one_scale) for k in wanted}
        calibration = Calibration(self.calibration_images, self.ranges)
        points, ranges = calibrated_points(candidate.evolve(model=model), context.data, calibration)
        rounding = with_fake_quantization(model, ranges, points.tied, self.activation_bits)
        trained = context.recover(candidate.evolve(model=rounding), quantizers=quantizers).model
        for layer in model.layers:
            layer.set_weights(trained.get_layer(layer.name).get_weights())
        found = {
            name: quantizer.steps(tf.constant(get_weight(model, name))).numpy()
            for name, quantizer in quantizers.items()
        }
        storage_ranges = folded_ranges(model, trained_ranges(trained))
        model, grids = fold_grids(model, found, bits)
        on_grid = FinalGrid.of(context.stage, model, grids)
        floats = tuple(k.layer.name for k in kernels(model) if k.layer.name not in chosen)
        storage = Storage("int8", calibration, floats, storage_ranges, self.packed)
        stored = Stored(context.stage, "int8", floats)
        measured = self._as_trained(trained, context.data)
        result = candidate.evolve(model=model, storage=storage, skipped=left_alone, measured=measured)
        return result.with_guarantee(on_grid).with_guarantee(stored)

    def _as_trained(self, trained: tf_keras.Model, data: Data) -> dict[str, float]:
        """Return the accuracy in percent of the network that was trained, where the file computes another."""
        judged = data.validation.take(_JUDGED)
        if self.activation_bits == 8 or not judged.labelled:
            return {}
        return {"accuracy_as_trained": accuracy(keras_outputs(trained, judged.x), judged.y)}

    def _by_tfmot(self, candidate: Candidate, context: Context) -> Candidate:
        bound = sorted({guarantee.stage for guarantee in candidate.guarantees})
        everything = frozenset(layer.name for layer in candidate.model.layers)
        if bound or context.selection.names(candidate.model) != everything:
            raise CompressError(
                f"strategy.{context.stage}.scheme",
                expected="scheme=own beside only, skip, or stages whose properties have to be kept",
                received=f"scheme=tfmot, whose layers know nothing of {', '.join(bound) or 'only and skip'}",
                fix=f"Write strategy.{context.stage}.scheme=own.",
            )
        wrapped, unknown = wrapped_by_tfmot(candidate.model, f"stage {context.stage}")
        left_alone = context.skip([Skipped(name, "TFMOT's registry does not know it") for name in unknown])
        context.recover(candidate.evolve(model=wrapped))
        model, grids, ranges = unwrap(wrapped, candidate.model)
        storage = Storage("int8", Calibration(self.calibration_images), (), ranges)
        result = candidate.evolve(model=model, storage=storage, skipped=left_alone)
        return result.with_guarantee(FinalGrid.of(context.stage, model, grids)).with_guarantee(
            Stored(context.stage, "int8", ())
        )

    def _start(
        self, candidate: Candidate, context: Context, chosen: frozenset[str]
    ) -> tuple[tf_keras.Model, Mapping[str, np.ndarray]]:
        """Return the model that training starts from, and the steps that are known already."""
        # One step for a whole kernel does not survive the folding.
        bound = frozenset(name.rpartition("/")[0] for name in _one_scale(candidate))
        start = fold_batch_norm(fold_layer_norm(candidate.model, valued_layers(candidate.guarantees)), bound)
        if not self._low or not self.rounding_images:
            return start, {}
        samples = context.calibration_samples(self.rounding_images)
        repair = Repair(start, samples, context.seed, candidate.guarantees)
        rounded = [kernel for kernel in kernels(repair.folded) if kernel.layer.name in chosen]
        widths = {name.rpartition("/")[0]: width for name, width in self._bits(rounded, context).items()}
        return unfold(start, *round_layers(repair, widths))

    def _bits(self, wanted: Sequence[Kernel], context: Context) -> dict[str, int]:
        """Return the bits of each kernel by name."""
        where = f"strategy.{context.stage}.layer_bits"
        of_layer = bits_of_layers((k.layer.name for k in wanted), self.bits, self.layer_bits, where)
        return {kernel.name: of_layer[kernel.layer.name] for kernel in wanted}

    def _quantizer(
        self, kernel: Kernel, bits: int, known: Mapping[str, np.ndarray], *, whole: bool
    ) -> UniformQuantizer | StepQuantizer:
        plain = UniformQuantizer(bits, () if whole else kernel.output_axes, kernel.value.ndim)
        steps = None if whole else known.get(kernel.name)
        if steps is None and not self.learned_steps:
            return plain
        if steps is None:
            steps = plain.steps(tf.constant(kernel.value)).numpy()
        return StepQuantizer(bits, steps, kernel.size, trained=self.learned_steps)


def _one_scale(candidate: Candidate) -> frozenset[str]:
    """Return the weights that earlier stages need on one integer scale for the whole tensor."""
    return frozenset().union(*(g.weights() for g in candidate.guarantees if g.one_scale_per_tensor))
