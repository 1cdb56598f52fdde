"""Plain training on the labels: the yardstick for every other kind of recovery."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from compress.candidate import Candidate, Effect
from compress.graph.rewrite import copy_model
from compress.strategies.strategy import STRICT, Context, Strategy


@dataclass(frozen=True, config=STRICT)
class Finetune(Strategy):
    """Train the candidate as ``recovery`` says; every guarantee is kept."""

    effects = frozenset({Effect.TRAIN})
    needs_labels = True

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Train a copy."""
        context.require_training()
        return context.recover(candidate.evolve(model=copy_model(candidate.model), skipped=()))
