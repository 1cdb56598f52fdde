"""A strategy with the wrappers around it, and what a finished one is told by."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from compress.candidate import Allocated, Candidate, Effect, Guarantee, Numbers, Recovered, Skipped, Storage, Violation
from compress.deploy.noise import Noise
from compress.deploy.verification import Agreement
from compress.errors import CompressError
from compress.graph.selection import Selection
from compress.strategies.distillation.recovering import Recovering
from compress.strategies.quantization.stored import Stored
from compress.strategies.strategy import Context, Strategy
from compress.training import Recovery


@dataclass(frozen=True)
class Stage(Strategy):
    """A strategy in a pipeline, with the wrappers around it: which layers, how often, what recovery."""

    name: str
    strategy: Strategy
    selection: Selection = field(default_factory=Selection)
    recovery: Recovery = field(default_factory=Recovery)
    repeat: int = 1
    release: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        """How it trains: ``finetune``, ``distill``, or ``auto``, which decides later; ``none`` if it does not."""
        if not self.recovery.trains or Effect.TRAIN not in self.strategy.effects:
            return "none"
        return self.strategy.own_method or self.recovery.method

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Apply the strategy ``repeat`` times to the selected layers, and check every guarantee afterwards."""
        gone = [guarantee for guarantee in candidate.guarantees if guarantee.stage in self.release]
        left = tuple(guarantee for guarantee in candidate.guarantees if guarantee.stage not in self.release)
        notes = (f"{guarantee.stage}: {guarantee.describe()} (released by {self.name})" for guarantee in gone)
        candidate = candidate.evolve(guarantees=left, released=(*candidate.released, *notes))
        if any(isinstance(g, Stored) for g in gone) and not any(isinstance(g, Stored) for g in left):
            candidate = candidate.evolve(storage=Storage(), samples=None)
        inner = context.for_stage(self.name, selection=self.selection, recovery=self.recovery)
        recovering = Recovering(inner, candidate.model)
        candidate = candidate.evolve(skipped=(), measured={}, allocation=(), recovered=None)
        for turn in range(self.repeat):
            inner = recovering.context(candidate.model, turn, self.strategy)
            candidate = self.strategy.apply(candidate, inner)
        for guarantee in candidate.guarantees:
            require_kept(guarantee, guarantee.check(candidate.model), self.name, "the model")
        recovered = recovering.done(candidate.model)
        return candidate.evolve(lineage=(*candidate.lineage, self.name), recovered=recovered)

    def config(self) -> dict[str, Any]:
        """Return everything that decides what the stage does, as plain values."""
        return {
            "strategy": f"{type(self.strategy).__module__}.{type(self.strategy).__qualname__}",
            **dataclasses.asdict(self.strategy),  # type: ignore[call-overload]
            "only": [_plain(rule) for rule in self.selection.only],
            "skip": [_plain(rule) for rule in self.selection.skip],
            "recovery": dataclasses.asdict(self.recovery),
            "repeat": self.repeat,
            "release": list(self.release),
        }


@dataclass(frozen=True)
class StageResult:
    """A finished stage: its numbers, measured on the exported file, and what is to be said about it."""

    name: str
    config: dict[str, Any]
    numbers: Numbers
    seconds: float
    skipped: tuple[Skipped, ...]
    guarantees: tuple[str, ...]
    released: tuple[str, ...]
    layers: dict[str, dict[str, int]]
    """The :func:`layer_table` of the stage's model."""
    cached: bool = False
    measured: dict[str, float] = field(default_factory=dict)
    """What the stage has measured of its own work."""
    allocation: tuple[Allocated, ...] = ()
    """What a search has chosen for each layer."""
    noise: tuple[Noise, ...] = ()
    """What each tensor of an integer file has lost against the float one."""
    agreement: Agreement | None = None
    """How the exported file's outputs agree with those of its Keras model."""
    recovered: Recovered | None = None
    """How the stage has won accuracy back."""


def require_kept(guarantee: Guarantee, violations: Sequence[Violation], stage: str, where: str) -> None:
    """Raise if a guarantee does not hold.

    Raises:
        CompressError: naming the stage that broke it and the one that established it.
    """
    if violations:
        first = violations[0]
        raise CompressError(
            f"stage {stage}, {first.layer}",
            expected=f"what stage {guarantee.stage} established ({guarantee.describe()}), in {where}",
            received=f"{first.found}" + (f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""),
            fix=f"Leave the layer out with strategy.{stage}.skip."
            if guarantee.stage == stage
            else f"Skip the layer in one of the two stages, or write strategy.{stage}.release=[{guarantee.stage}].",
        )


def _plain(rule: Any) -> Any:
    return rule if isinstance(rule, str) else dataclasses.asdict(rule)


def result_to_json(result: StageResult) -> dict[str, Any]:
    """Return the result in JSON's types."""
    return dataclasses.asdict(result)


def result_from_json(value: dict[str, Any], *, cached: bool) -> StageResult:
    """Return the result that :func:`result_to_json` made; ``cached``: whether it was made by an earlier run."""
    return StageResult(
        **{
            **value,
            "numbers": Numbers.from_json(value["numbers"]),
            "skipped": tuple(Skipped(**item) for item in value["skipped"]),
            "guarantees": tuple(value["guarantees"]),
            "released": tuple(value["released"]),
            "allocation": tuple(Allocated(**{**row, "chosen": tuple(row["chosen"])}) for row in value["allocation"]),
            "noise": tuple(Noise(**item) for item in value["noise"]),
            "agreement": None if value["agreement"] is None else Agreement(**value["agreement"]),
            "recovered": Recovered.from_json(value["recovered"]) if value.get("recovered") else None,
            "cached": cached,
        }
    )
