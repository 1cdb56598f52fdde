"""Plain training on the labels: the yardstick for every other kind of recovery."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from compress.candidate import Candidate
from compress.strategies.distillation.student import StudentStrategy
from compress.strategies.strategy import STRICT, Context


@dataclass(frozen=True, config=STRICT)
class Finetune(StudentStrategy):
    """Train the candidate, or another student, as ``recovery`` says; every guarantee is kept."""

    needs_labels = True

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Train a copy."""
        context.require_training()
        return context.recover(self.student_of(candidate, context))
