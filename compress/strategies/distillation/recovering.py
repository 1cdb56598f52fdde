"""How a stage recovers: what ``auto`` stands for, who the previous model is, and what the report says of teachers."""

from __future__ import annotations

import dataclasses

import numpy as np
import tf_keras

from compress.candidate import Effect, Recovered
from compress.data.source import Split
from compress.strategies.distillation.automatic import choose
from compress.strategies.distillation.judging import judged_part, probabilities
from compress.strategies.strategy import REFERENCE, Context, Strategy
from compress.words import counted

AUTO = "auto"


class Recovering:
    """Follows one stage from what it receives to what it makes."""

    def __init__(self, context: Context, received: tf_keras.Model) -> None:
        self._stage = self._context = context
        self._received = received
        self._why: str | None = None
        self._if_worse: str | None = None
        self._own_method: str | None = None
        self._trained = False
        self._taught = False
        self._seconds = 0.0

    def context(self, previous: tf_keras.Model, turn: int, strategy: Strategy) -> Context:
        """Return what the strategy works in.

        Args:
            previous: the model that it is given.
            turn: how often it was applied before, in this stage.
            strategy: what will be done.
        """
        seed = (self._stage.seed + turn) % 2**31
        context = dataclasses.replace(self._stage, previous=previous, on_recovery=self._heard, seed=seed)
        if context.recovery.method == AUTO:
            recovery = dataclasses.replace(context.recovery, method="distill")
            if Effect.TRAIN in strategy.effects and strategy.own_method is None:
                recovery, self._why = choose(context.recovery, context.data, context.teacher_models(), previous)
            context = dataclasses.replace(context, recovery=recovery)
        self._context, self._received, self._if_worse = context, previous, strategy.if_worse
        self._own_method = strategy.own_method
        return context

    def _heard(self, taught: bool, seconds: float) -> None:
        self._trained = True
        self._seconds += seconds
        self._taught = self._taught or taught

    def done(self, made: tf_keras.Model) -> Recovered | None:
        """Return what the report says, with a warning if a teacher knew less than its student."""
        if not self._trained and self._why is None:
            return None
        found = self._found(made)
        return dataclasses.replace(found, seconds=self._seconds) if self._trained else found

    def _found(self, made: tf_keras.Model) -> Recovered:
        """Return it without the time."""
        method = "distill" if self._taught else "finetune" if self._trained else "none"
        part = judged_part(self._context.data)
        names = (self._context.recovery.teachers or (REFERENCE,)) if self._taught else ()
        if self._trained and not self._taught and part is not None and self._if_worse is not None:
            return self._judged(Recovered(method, self._why), made, part, self._if_worse)
        if not self._taught or part is None:
            return Recovered(method, self._why, names)
        teachers = self._context.teacher_models()
        right = {
            "teacher": _right(teachers, part.x, part.y),
            "received": _right([self._received], part.x, part.y),
            "student": _right([made], part.x, part.y),
        }
        accuracies = {name: float(100 * values.mean()) for name, values in right.items()}
        found = Recovered(
            method,
            self._why,
            names,
            accuracies["teacher"],
            accuracies["received"],
            accuracies["student"],
            len(part),
        )
        return dataclasses.replace(found, warning=self._warning(found, right))

    def _judged(self, found: Recovered, made: tf_keras.Model, part: Split, advice: str) -> Recovered:
        """Say so if the model made is clearly worse than the one received."""
        before, after = (_right([model], part.x, part.y) for model in (self._received, made))
        received, student = (float(100 * right.mean()) for right in (before, after))
        found = dataclasses.replace(found, received_accuracy=received, student_accuracy=student, images=len(part))
        if not _clearly_more(before, after):
            return found
        said = f"The model that the stage made is worse than the one that it received: {student:.2f} against "
        said += f"{received:.2f} % of {counted(len(part), 'validation image')} (Keras models). {advice}."
        return dataclasses.replace(found, warning=said)

    def _warning(self, found: Recovered, right: dict[str, np.ndarray]) -> str | None:
        """Say so if the teacher is worse than the model received, or clearly worse than what was made."""
        teacher, received, student = found.teacher_accuracy, found.received_accuracy, found.student_accuracy
        if teacher is None or received is None or student is None:
            return None
        said = f"The teacher ({', '.join(found.teachers)}) is worse than"
        otherwise = "recovery=finetune" if self._own_method is None else "strategy=finetune in its place"
        advice = f"Name a better one in strategy.{self._context.stage}.recovery.teachers, or write {otherwise}."
        where = f"of {counted(found.images, 'validation image')} (Keras models)"
        if teacher < received:
            return f"{said} the model that the stage received: {teacher:.2f} against {received:.2f} % {where}. {advice}"
        # A student may outgrow its teacher by a little, or by chance.
        if _clearly_more(right["student"], right["teacher"]):
            return f"{said} its student: {teacher:.2f} against {student:.2f} % {where}. {advice}"
        return None


def _clearly_more(one: np.ndarray, other: np.ndarray) -> bool:
    """Say whether more is right in one than in the other, by two standard errors of the paired difference."""
    apart = int((one & ~other).sum()), int((other & ~one).sum())
    return bool(apart[0] - apart[1] > 2 * np.sqrt(sum(apart)))


def _right(models: list[tf_keras.Model], x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return whether each image is classified rightly: [n]."""
    return np.asarray(probabilities(models, x).argmax(axis=1) == labels)
