"""Plain training on the labels: the yardstick for every other kind of recovery."""

from __future__ import annotations

from dataclasses import replace

from pydantic.dataclasses import dataclass

from compress.candidate import Candidate
from compress.strategies.distillation.student import StudentStrategy
from compress.strategies.strategy import STRICT, Context


@dataclass(frozen=True, config=STRICT)
class Finetune(StudentStrategy):
    """Train the candidate, or another student, on the labels alone; every guarantee is kept.

    What ``recovery`` says of teachers has no effect here: there are none.
    """

    needs_labels = True
    own_method = "finetune"

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Train a copy."""
        context.require_training(self.own_method)
        plain = context.for_stage(context.stage, recovery=replace(context.recovery, method="finetune"))
        return plain.recover(self.student_of(candidate, context))
