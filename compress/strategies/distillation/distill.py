"""Distillation as a strategy: train the candidate on its teacher's soft targets.

Source: Hinton, Vinyals, Dean (arXiv 1503.02531).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from annotated_types import Gt, Le
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate, Effect
from compress.graph.rewrite import copy_model
from compress.strategies.strategy import STRICT, Context, Strategy


@dataclass(frozen=True, config=STRICT)
class Distill(Strategy):
    """Train the candidate on the soft targets of the pipeline's reference model, or of ``recovery.teachers``."""

    temperature: Annotated[float, Gt(0)] = 4.0
    soft_weight: Annotated[float, Gt(0), Le(1)] = 0.9

    effects = frozenset({Effect.TRAIN})

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Train a copy."""
        context.require_training()
        student = candidate.evolve(model=copy_model(candidate.model), skipped=())
        recovery = replace(
            context.recovery, method="distill", temperature=self.temperature, soft_weight=self.soft_weight
        )
        return context.for_stage(context.stage, recovery=recovery).recover(student)
