"""``recovery=auto``: what the data offers decides how a stage wins accuracy back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import tf_keras

from compress.data.source import Data
from compress.strategies.distillation.judging import accuracy_of, judged_part
from compress.training import Recovery
from compress.words import counted

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
            f"none, closed form only: {counted(images, 'training image is', 'training images are')} fewer than "
            f"{FEWEST} for each of {data.classes} classes",
        )
    if not data.train.labelled:
        return replace(
            recovery, method="distill"
        ), f"distill, without labels: none of {counted(images, 'training image')} has one"
    part = judged_part(data)
    if part is None:
        return replace(recovery, method="distill"), "distill, with labels: no labels of the validation part to judge by"
    theirs = accuracy_of(teachers, part)
    ours = theirs if len(teachers) == 1 and teachers[0] is student else accuracy_of([student], part)
    judged = f"{theirs:.2f} % against {ours:.2f} % of {counted(len(part), 'validation image')}"
    if theirs >= ours:
        known = "" if data.unlabelled is None else f", and {counted(len(data.unlabelled), 'image')} without labels"
        return replace(recovery, method="distill"), f"distill, with labels{known}: the teacher is as good ({judged})"
    if data.unlabelled is not None:
        return (
            replace(recovery, method="distill"),
            f"distill, with labels: {counted(len(data.unlabelled), 'image has', 'images have')} none, though the "
            f"teacher is worse ({judged})",
        )
    return replace(recovery, method="finetune"), f"finetune: the teacher is worse than the model received ({judged})"
