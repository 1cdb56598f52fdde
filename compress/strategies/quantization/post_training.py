"""Post-training quantization: float16, weights only, dynamic range, full integer with 8- or 16-bit activations.

Sources: Jacob et al. (arXiv 1712.05877) for the integer scheme; the TFLite quantization specification.
"""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic.dataclasses import dataclass

from compress.candidate import Calibration, Candidate, Effect, Skipped, Storage
from compress.errors import CompressError
from compress.graph.kernels import get_weight, kernels
from compress.graph.rewrite import copy_model
from compress.strategies.quantization.grid import OnGrid
from compress.strategies.quantization.rounding import round_layers
from compress.strategies.quantization.stored import Stored
from compress.strategies.repair import Repair
from compress.strategies.strategy import STRICT, Context, Strategy

_ON_GRIDS = ("int8", "weight_only")
"""Schemes whose weights are written layer by layer."""


@dataclass(frozen=True, config=STRICT)
class Quantize(Strategy):
    """Write the weights in fewer bits from here on; every later stage is exported that way, too. No training is done.

    Layers that the stage leaves out (``only``, ``skip``) stay floats.

    Args:
        scheme: ``int8``: weights and activations; ``int16``: int8 weights, 16-bit activations; ``dynamic``: int8
            weights, activations quantized as they come; ``weight_only``: int8 weights, expanded before use;
            ``float16``: half-precision weights.
        bits: of a weight under ``int8`` and ``weight_only``; 4 and fewer are packed where LiteRT reads them so.
        rounding: ``nearest`` level, or ``second_order``: each layer's weights make up for one another's rounding, on
            ``rounding_images`` unlabelled images. Fewer than 8 bits are always rounded so.
        ranges: how the ranges of integer activations are chosen, on ``calibration_images`` training images: from the
            smallest to the largest value, without the rarest ``100 - percentile`` percent at each end, or with the
            least squared error or divergence (entropy).
    """

    scheme: Literal["int8", "int16", "dynamic", "weight_only", "float16"] = "int8"
    bits: Annotated[int, Ge(2), Le(8)] = 8
    rounding: Literal["nearest", "second_order"] = "nearest"
    rounding_images: Annotated[int, Ge(16), Le(1_000_000)] = 500
    ranges: Literal["minmax", "percentile", "mse", "entropy"] = "minmax"
    percentile: Annotated[float, Gt(50), Le(100)] = 99.99
    calibration_images: Annotated[int, Ge(1)] = 256

    effects = frozenset({Effect.STORE})
    establishes = Stored

    def __post_init__(self) -> None:
        """Refuse fields that only the other schemes have."""
        finer = {"bits": self.bits < 8, "rounding": self.rounding != "nearest"}
        if any(finer.values()) and self.scheme not in _ON_GRIDS:
            named = next(name for name, given in finer.items() if given)
            raise ValueError(f"{named}={getattr(self, named)} goes with scheme={' or '.join(_ON_GRIDS)} only")

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Round the weights where that is asked for, and set the candidate's storage."""
        for guarantee in candidate.guarantees:
            if isinstance(guarantee, Stored) and guarantee.scheme != self.scheme:
                raise CompressError(
                    f"stage {context.stage}",
                    expected=f"scheme={guarantee.scheme}, which stage {guarantee.stage} established",
                    received=f"scheme={self.scheme}",
                    fix=f"Leave one out, or write strategy.{context.stage}.release=[{guarantee.stage}].",
                )
        chosen = context.selection.names(candidate.model)
        left_out = tuple(k.layer.name for k in kernels(candidate.model) if k.layer.name not in chosen)
        if left_out and self.scheme not in _ON_GRIDS:
            raise CompressError(
                f"stage {context.stage}",
                expected=f"scheme={' or '.join(_ON_GRIDS)} beside only or skip",
                received=f"scheme={self.scheme}, which the converter applies to the whole file",
                fix=f"Write strategy.{context.stage}.scheme=int8, or leave only and skip out.",
            )
        calibration = Calibration(self.calibration_images, self.ranges, self.percentile)
        result = candidate.evolve(
            model=copy_model(candidate.model),
            storage=Storage(self.scheme, calibration, float_layers=left_out),
            skipped=(),
        ).with_guarantee(Stored(context.stage, self.scheme, left_out))
        if self.bits == 8 and self.rounding == "nearest":
            return result
        return self._rounded(result, context, chosen)

    def _rounded(self, candidate: Candidate, context: Context, chosen: frozenset[str]) -> Candidate:
        samples = context.calibration_samples(self.rounding_images)
        repair = Repair(candidate.model, samples, context.seed, candidate.guarantees)
        wanted = {kernel.layer.name: self.bits for kernel in kernels(repair.folded) if kernel.layer.name in chosen}
        model, grids = round_layers(repair, wanted)
        skipped = [
            Skipped(name, "its weights are rounded to the nearest of 8 bits: it is no Dense or ordinary Conv2D")
            for name in wanted
            if f"{name}/kernel" not in grids
        ]
        if not grids:
            raise context.nothing_done("a Dense or an ordinary Conv2D, whose weights can be rounded", skipped)
        on_grid = OnGrid(
            context.stage,
            steps={name: grid.steps for name, grid in grids.items()},
            bits={name: grid.bits for name, grid in grids.items()},
            shapes={name: get_weight(model, name).shape for name in grids},
        )
        return candidate.evolve(model=model, skipped=context.skip(skipped)).with_guarantee(on_grid)

    def clashes_with(self, earlier: Strategy) -> str | None:
        """Refuse a second scheme after a first one."""
        if isinstance(earlier, Quantize) and earlier.scheme != self.scheme:
            return f"it would store the weights as {self.scheme} instead of {earlier.scheme}"
        return super().clashes_with(earlier)
