"""``recovery=auto``: what the data offers decides how a stage wins accuracy back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import tf_keras

from compress.data.source import Data
from compress.strategies.distillation.judging import accuracy_of, judged_part
from compress.training import Recovery

FEWEST = 10
"""Training images for each class below which training would only learn them by heart."""


def choose(
    recovery: Recovery, data: Data, teachers: Sequence[tf_keras.Model], student: tf_keras.Model
) -> tuple[Recovery, str]:
    """Return the recovery that ``auto`` stands for here, and why.

    Args:
        recovery: with ``method="auto"``; all else is kept.
        data: what there is to learn from.
        teachers: who would teach.
        student: the model as the stage received it.
    """
    images = len(data.train) + (0 if data.unlabelled is None else len(data.unlabelled))
    if recovery.epochs == 0:
        return replace(recovery, method="none"), "none, closed form only: recovery.epochs is 0"
    if images < FEWEST * data.classes:
        return (
            replace(recovery, method="none"),
            f"none, closed form only: {images} training images are fewer than {FEWEST} for each of {data.classes} "
            "classes",
        )
    if not data.train.labelled:
        return replace(recovery, method="distill"), f"distill, without labels: none of {images} training images has one"
    part = judged_part(data)
    if part is None:
        return replace(recovery, method="distill"), "distill, with labels: no labels of the validation part to judge by"
    theirs = accuracy_of(teachers, part)
    ours = theirs if len(teachers) == 1 and teachers[0] is student else accuracy_of([student], part)
    judged = f"{theirs:.2f} % against {ours:.2f} % of {len(part)} validation images"
    if theirs >= ours:
        known = "" if data.unlabelled is None else f", and {len(data.unlabelled)} images without labels"
        return replace(recovery, method="distill"), f"distill, with labels{known}: the teacher is as good ({judged})"
    if data.unlabelled is not None:
        return (
            replace(recovery, method="distill"),
            f"distill, with labels: {len(data.unlabelled)} images have none, though the teacher is worse ({judged})",
        )
    return replace(recovery, method="finetune"), f"finetune: the teacher is worse than the model received ({judged})"
