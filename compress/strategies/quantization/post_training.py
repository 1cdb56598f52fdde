"""Post-training quantization by TFLite: float16, dynamic range, full int8.

Source: Jacob et al. (arXiv 1712.05877) for the int8 scheme; the TFLite quantization specification.
"""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate, Effect, Storage
from compress.errors import CompressError
from compress.graph.rewrite import copy_model
from compress.strategies.quantization.stored import Stored
from compress.strategies.strategy import STRICT, Context, Strategy


@dataclass(frozen=True, config=STRICT)
class Quantize(Strategy):
    """Write the weights in fewer bits from here on; every later stage is exported that way, too.

    ``int8``: weights and activations, ranges calibrated on ``calibration_images`` training images. ``dynamic``: int8
    weights, float activations. ``float16``: half-precision weights. No training is done.
    """

    scheme: Literal["int8", "dynamic", "float16"] = "int8"
    calibration_images: Annotated[int, Ge(1)] = 256

    effects = frozenset({Effect.STORE})
    establishes = Stored

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Set the candidate's storage."""
        for guarantee in candidate.guarantees:
            if isinstance(guarantee, Stored) and guarantee.scheme != self.scheme:
                raise CompressError(
                    f"stage {context.stage}",
                    expected=f"scheme={guarantee.scheme}, which stage {guarantee.stage} established",
                    received=f"scheme={self.scheme}",
                    fix=f"Leave one out, or write strategy.{context.stage}.release=[{guarantee.stage}].",
                )
        return candidate.evolve(
            model=copy_model(candidate.model),
            storage=Storage(self.scheme, self.calibration_images),
            skipped=(),
        ).with_guarantee(Stored(context.stage, self.scheme))

    def clashes_with(self, earlier: Strategy) -> str | None:
        """Refuse a second scheme after a first one."""
        if isinstance(earlier, Quantize) and earlier.scheme != self.scheme:
            return f"it would store the weights as {self.scheme} instead of {earlier.scheme}"
        return super().clashes_with(earlier)
