"""Post-training quantization: float16, weights only, dynamic range, full integer with 8- or 16-bit activations.

Sources: Jacob et al. (arXiv 1712.05877) for the integer scheme; the TFLite quantization specification.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Annotated, Literal

import numpy as np
import tf_keras
from annotated_types import Ge, Gt, Le, Lt
from pydantic.dataclasses import dataclass

from compress.candidate import Calibration, Candidate, Effect, Guarantee, Scheme, Skipped, Storage
from compress.deploy.conversion import one_scale_per_tensor
from compress.deploy.integer import grids_of
from compress.errors import CompressError
from compress.graph.fold import fold_batch_norm, fold_layer_norm
from compress.graph.kernels import kernels, without_kernel
from compress.graph.rewrite import copy_model
from compress.strategies.options import refuse_without_effect
from compress.strategies.quantization.bias_correction import correct_biases, correctable
from compress.strategies.quantization.calibration import check_activations
from compress.strategies.quantization.data_free import synthetic_samples
from compress.strategies.quantization.equalisation import equalise, trading_pairs
from compress.strategies.quantization.float_by_accuracy import keep_floats, require_labels
from compress.strategies.quantization.grid import FinalGrid, OnGrid
from compress.strategies.quantization.layer_bits import Bits, LayerBits, bits_of_layers
from compress.strategies.quantization.rounding import round_layers
from compress.strategies.quantization.stored import FinalStorage, Stored, float_only, refuses_floats, stays_float
from compress.strategies.quantization.valued import valued_layers
from compress.strategies.repair import Repair
from compress.strategies.strategy import STRICT, Context, Strategy

_BY_LAYER = ("int8", "weight_only")
"""Schemes whose weights are written layer by layer."""
_CALIBRATED = ("int8", "int16")
"""Schemes of integer activations."""


@dataclass(frozen=True, config=STRICT)
class FloatFallback:
    """How much accuracy an integer file may lose, in points, before layers stay floats."""

    accuracy_drop: Annotated[float, Gt(0), Lt(100)]


@dataclass(frozen=True, config=STRICT)
class Quantize(Strategy):
    """Write the weights in fewer bits from here on; every later stage is exported that way, too. No training is done.

    Layers that the stage leaves out (``only``, ``skip``) stay floats.

    Args:
        scheme: ``int8``: weights and activations; ``int16``: int8 weights, 16-bit activations; ``dynamic``: int8
            weights, activations quantized as they come; ``weight_only``: int8 weights, expanded before use;
            ``float16``: half-precision weights. (bfloat16: LiteRT has no kernels for it on any board.)
        bits: of a weight under ``int8`` and ``weight_only``.
        packed: 4 bits and fewer are stored two weights to a byte, where LiteRT reads them so. It expands them in each
            call; false, a byte each, is faster. The ``.cmp`` is as small either way.
        layer_bits: those of single layers, by name or regular expression.
        rounding: ``nearest`` level, or ``second_order``: each layer's weights make up for one another's rounding, on
            ``rounding_images`` unlabelled images. Fewer than 8 bits are always rounded so.
        ranges: how the ranges of 8-bit activations are chosen, on ``calibration_images`` training images: from the
            smallest to the largest value, without the rarest ``100 - percentile`` percent at each end, or with the
            least squared error or divergence (entropy). Those of 16 bits go from the smallest to the largest value.
        calibrate_on: the ``training`` part, or ``synthetic`` inputs, made from the statistics that batch norms of the
            reference model remember: no data at all.
        equalise: first let neighbouring layers trade scale channel by channel, so that one step suits all channels.
        bias_correction: take the mean error of rounded weights out of the biases, on ``rounding_images`` images.
        float_fallback: keep as few layers as possible in float so that the accuracy of the file (validation part)
            drops by at most ``accuracy_drop`` points.
    """

    scheme: Literal["int8", "int16", "dynamic", "weight_only", "float16"] = "int8"
    bits: Bits = 8
    layer_bits: LayerBits | None = None
    packed: bool = True
    rounding: Literal["nearest", "second_order"] = "nearest"
    rounding_images: Annotated[int, Ge(16), Le(1_000_000)] = 500
    ranges: Literal["minmax", "percentile", "mse", "entropy"] = "minmax"
    percentile: Annotated[float, Gt(50), Le(100)] = 99.99
    calibration_images: Annotated[int, Ge(1)] = 256
    calibrate_on: Literal["training", "synthetic"] = "training"
    equalise: bool = False
    bias_correction: bool = False
    float_fallback: FloatFallback | None = None

    @property
    def establishes(self) -> type[Guarantee]:  # type: ignore[override]
        """The kind of guarantee that it adds; the one that more would break, of two."""
        if self.float_fallback is not None:
            return FinalGrid if self._on_grids else FinalStorage
        return OnGrid if self._on_grids else Stored

    @property
    def stores(self) -> Scheme:  # type: ignore[override]
        """How the file is written."""
        return self.scheme

    @property
    def effects(self) -> frozenset[Effect]:  # type: ignore[override]
        """What it does to a layer: fewer bits than 8 change the weights themselves."""
        return frozenset({Effect.STORE, *((Effect.ROUND, Effect.SPREAD) if self._on_grids else ())})

    def __post_init__(self) -> None:
        """Refuse fields that have no effect beside the others."""
        refuse_without_effect(
            self,
            (
                (
                    self.scheme in _BY_LAYER,
                    ("bits", "layer_bits", "packed", "rounding"),
                    f"scheme={' or '.join(_BY_LAYER)}",
                ),
                (self.scheme == "int8", ("ranges", "percentile", "float_fallback"), "scheme=int8"),
                (self.ranges == "percentile", ("percentile",), "ranges=percentile"),
                (self._reads_samples, ("rounding_images",), "bits below 8, second_order rounding or bias_correction"),
                (self.scheme != "float16", ("bias_correction",), "schemes that round weights to integers"),
                (not self._on_grids, ("bias_correction",), "rounding=nearest; second_order corrects biases, too"),
                (
                    self.scheme in _CALIBRATED or self._reads_samples,
                    ("calibrate_on", "calibration_images"),
                    f"scheme={' or '.join(_CALIBRATED)}, bias_correction or second_order rounding, which read samples",
                ),
            ),
        )

    @property
    def _reads_samples(self) -> bool:
        return self._on_grids or self.bias_correction

    @property
    def _on_grids(self) -> bool:
        return min(self.bits, *(self.layer_bits or {}).values(), 8) < 8 or self.rounding == "second_order"

    def clashes_with(self, earlier: Strategy) -> str | None:
        """Say why it cannot keep what ``earlier`` establishes: with ``float_fallback`` layers stay floats."""
        floats = refuses_floats(earlier.stores) if self.float_fallback is not None else None
        return floats or super().clashes_with(earlier)

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Round the weights where that is asked for, and set the candidate's storage."""
        if self.float_fallback is not None:
            require_labels(context.data, context.stage)
        chosen = context.selection.names(candidate.model)
        left_out = tuple(k.layer.name for k in kernels(candidate.model) if k.layer.name not in chosen)
        if left_out and self.scheme not in _BY_LAYER:
            raise CompressError(
                f"stage {context.stage}",
                expected=f"scheme={' or '.join(_BY_LAYER)} beside only or skip",
                received=f"scheme={self.scheme}, which the converter applies to the whole file",
                fix=f"Write strategy.{context.stage}.scheme=int8, or leave only and skip out.",
            )
        if self.scheme == "float16":
            _refuse_overflow(candidate.model, context.stage)
        lacking = float_only(candidate.model, chosen) if self.scheme in (*_CALIBRATED, "dynamic") else []
        left_out += tuple(item.layer for item in lacking)
        chosen -= set(left_out)
        samples = None
        if self.calibrate_on == "synthetic":
            count = max(self.calibration_images, self.rounding_images if self._reads_samples else 0)
            samples = synthetic_samples(context.reference, count, context.seed, f"stage {context.stage}")
        if self.scheme in _CALIBRATED or self._reads_samples:
            check_activations(candidate.evolve(samples=samples), context.data, self.calibration_images)
        self._require_effect(candidate, context, left_out, chosen)
        make = functools.partial(self._quantized, candidate.evolve(samples=samples), context, left_out, chosen)
        if self.float_fallback is None:
            result = make()
        else:
            whole = fold_batch_norm(self._unrounded(candidate, context, samples, left_out)) if self._on_grids else None
            result = self._with_floats(make, whole, context, chosen, self.float_fallback.accuracy_drop)
        result = result.evolve(skipped=(*result.skipped, *context.skip(lacking)))
        kind = Stored if self.float_fallback is None else FinalStorage
        return result.with_guarantee(kind(context.stage, self.scheme, result.storage.float_layers))

    def _quantized(
        self,
        candidate: Candidate,
        context: Context,
        left_out: tuple[str, ...],
        chosen: frozenset[str],
        kept: tuple[str, ...] = (),
    ) -> Candidate:
        """Return the candidate as it is written; ``kept``: those of the chosen layers that stay floats."""
        floats = (*left_out, *kept)
        calibration = Calibration(self.calibration_images, self.ranges, self.percentile)
        storage = Storage(self.scheme, calibration, float_layers=floats, packed=self.packed)
        if self._on_grids:
            return self._rounded(candidate.evolve(storage=storage), context, left_out, chosen, kept)
        model = self._prepared(candidate, context, candidate.samples, floats)
        return candidate.evolve(model=model, storage=storage, skipped=())

    def _prepared(
        self, candidate: Candidate, context: Context, samples: np.ndarray | None, floats: Collection[str]
    ) -> tf_keras.Model:
        """Return a copy of the model, its layers equalised and its biases corrected where that is asked for."""
        if not (self.equalise or self.bias_correction):
            return copy_model(candidate.model)
        model = fold_batch_norm(candidate.model)
        if self.equalise:
            model = equalise(model, valued_layers(candidate.guarantees))
        if self.bias_correction:
            whole, rounded = one_scale_per_tensor(candidate), self._rounded_by_file(model, candidate, floats)
            model = correct_biases(model, self._rounding_samples(samples, context), rounded, per_tensor=whole)
        return model

    def _rounded_by_file(self, model: tf_keras.Model, candidate: Candidate, floats: Collection[str]) -> set[str]:
        """Return the kernels whose weights are rounded as the file is written."""
        on_grids = grids_of(candidate)
        return {
            kernel.name
            for kernel in kernels(model)
            if kernel.layer.name not in floats
            and kernel.name not in on_grids
            and not stays_float(self.scheme, kernel.size)
        }

    def _require_effect(
        self, candidate: Candidate, context: Context, left_out: Collection[str], chosen: Collection[str]
    ) -> None:
        """Refuse what is asked for and would change nothing."""
        names = [kernel.layer.name for kernel in kernels(candidate.model) if kernel.layer.name in chosen]
        bits_of_layers(names, self.bits, self.layer_bits, f"strategy.{context.stage}.layer_bits")
        if not (self.equalise or self.bias_correction):
            return
        model = fold_batch_norm(candidate.model)
        if self.equalise and not trading_pairs(model, valued_layers(candidate.guarantees)):
            raise context.nothing_done("for equalise, two layers of which one alone reads the other", ())
        if self.bias_correction and not correctable(model, self._rounded_by_file(model, candidate, left_out)):
            raise context.nothing_done("for bias_correction, a layer with a bias whose weights the file rounds", ())

    def _with_floats(
        self,
        make: Callable[[tuple[str, ...]], Candidate],
        original: tf_keras.Model | None,
        context: Context,
        chosen: frozenset[str],
        most: float,
    ) -> Candidate:
        """Return what ``make`` makes with as few layers as floats as the accuracy needs.

        ``original``: the model before its weights were rounded, where they are.
        """
        floats: tuple[str, ...] = ()
        result = make(floats)
        names = [kernel.layer.name for kernel in kernels(result.model) if kernel.layer.name in chosen]
        while more := keep_floats(result, context.data, names, most, context.stage, original):
            floats = (*floats, *more)
            result = make(floats)
            if not self._reads_samples:
                break
            # Floats have no rounding that others make up for. Without that the accuracy is another one.
            names = [name for name in names if name not in more]
        stay = (Skipped(name, "it stays a float: the accuracy needs it", by_choice=True) for name in floats)
        return result.evolve(skipped=(*result.skipped, *stay))

    def _unrounded(
        self, candidate: Candidate, context: Context, samples: np.ndarray | None, left_out: Collection[str]
    ) -> tf_keras.Model:
        model = self._prepared(candidate, context, samples, left_out)
        return fold_layer_norm(model, valued_layers(candidate.guarantees))

    def _rounded(
        self,
        candidate: Candidate,
        context: Context,
        left_out: tuple[str, ...],
        chosen: frozenset[str],
        kept: Collection[str],
    ) -> Candidate:
        samples = self._rounding_samples(candidate.samples, context)
        model = self._unrounded(candidate, context, candidate.samples, left_out)
        repair = Repair(model, samples, context.seed, candidate.guarantees)
        names = (kernel.layer.name for kernel in kernels(repair.folded) if kernel.layer.name in chosen)
        wanted = bits_of_layers(names, self.bits, self.layer_bits, f"strategy.{context.stage}.layer_bits")
        wanted = {name: bits for name, bits in wanted.items() if name not in kept}
        if kept and not wanted:
            return candidate.evolve(model=repair.folded, skipped=())
        model, grids = round_layers(repair, wanted)
        skipped = [
            Skipped(layer.name, f"weights of {type(layer).__name__} layers are left to the converter: 8 bits")
            for layer in without_kernel(model)
            if layer.name in chosen
        ] + [
            Skipped(name, "its weights are rounded to the nearest of 8 bits: it is no Dense or Conv2D called once")
            for name in wanted
            if f"{name}/kernel" not in grids
        ]
        if not grids:
            if kept:
                return candidate.evolve(model=model, skipped=context.skip(skipped))
            raise context.nothing_done("a Dense or an ordinary Conv2D, whose weights can be rounded", skipped)
        on_grid = (OnGrid if self.float_fallback is None else FinalGrid).of(context.stage, model, grids)
        return candidate.evolve(model=model, skipped=context.skip(skipped)).with_guarantee(on_grid)

    def _rounding_samples(self, synthetic: np.ndarray | None, context: Context) -> np.ndarray:
        if synthetic is None:
            return context.calibration_samples(self.rounding_images)
        return synthetic[: self.rounding_images]


def _refuse_overflow(model: tf_keras.Model, stage: str) -> None:
    """Refuse weights that half precision has no number for; the converter would write its largest one instead.

    Raises:
        CompressError: naming the layer.
    """
    most = float(np.finfo(np.float16).max)
    for layer in fold_batch_norm(model).layers:
        if isinstance(layer, tf_keras.layers.BatchNormalization):
            # The file holds what its statistics come to, not the statistics.
            continue
        largest = max((float(np.abs(weight).max(initial=0.0)) for weight in layer.get_weights()), default=0.0)
        if largest > most:
            raise CompressError(
                f"stage {stage}, layer {layer.name}",
                expected=f"weights up to {most:g}, the largest number of half precision",
                received=f"{largest:g}",
                fix=f"Write strategy.{stage}.scheme=int8 or weight_only, whose scales are floats.",
            )
