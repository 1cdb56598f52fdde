"""The terms of the training loss that a recovery by distillation asks for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import tensorflow as tf
import tf_keras
from pydantic import ValidationError

from compress.data.source import Data
from compress.errors import CompressError, did_you_mean
from compress.strategies.distillation.loss import LayerLoss, LogitsLoss, Loss
from compress.strategies.distillation.losses import losses
from compress.strategies.distillation.losses.soft_targets import SoftTargets
from compress.strategies.distillation.pairing import Layers, Pair, pairs_by_rule
from compress.strategies.distillation.teacher import Keep, Teacher
from compress.training import Recovery
from compress.training_step import Batch, LossTerm
from compress.words import counted

_LOG = logging.getLogger("compress")
_SETTINGS = "Give it a weight, or its settings: {weight: 1, ...}."


class LogitsTerm:
    """A weighted loss of the logits. Several teachers are an ensemble: the mean of their softened probabilities."""

    layers: Sequence[str] = ()
    variables: Sequence[tf.Variable] = ()

    def __init__(
        self, loss: LogitsLoss, teachers: Sequence[Teacher], temperature: float, task_weight: float = 1.0
    ) -> None:
        self.task_weight = task_weight
        self.teachers = tuple(teachers)
        self._loss = loss
        self._temperature = temperature

    def prepare(self, data: Data, batch_size: int, *, same_images: bool) -> None:
        """Let the teachers run, if once is enough."""
        for teacher in self.teachers:
            teacher.prepare(data, batch_size, same_images=same_images)

    def __call__(self, batch: Batch) -> tf.Tensor:
        """Return the weighted loss."""
        softened = [tf.nn.log_softmax(teacher(batch)[""] / self._temperature) for teacher in self.teachers]
        targets = tf.reduce_logsumexp(tf.stack(softened), axis=0) - float(np.log(len(softened)))
        return self._loss.weight * self._loss.value(batch.logits, targets, batch.labels, self._temperature)


class LayerTerm:
    """A weighted loss of inner layers, with what is trained beside it. Of several teachers, it knows one."""

    def __init__(
        self, loss: LayerLoss, teacher: Teacher, pairs: Sequence[Pair], seed: int = 0, task_weight: float = 1.0
    ) -> None:
        self.task_weight = task_weight
        self.pairs = tuple(pairs)
        self.layers: Sequence[str] = [pair.student for pair in pairs]
        self._loss = loss
        self._teacher = teacher
        self._connectors = [loss.connectors(pair, seed + 2 * number) for number, pair in enumerate(pairs)]
        self.variables: Sequence[tf.Variable] = [
            variable for both in self._connectors for one in both if one is not None for variable in one.variables
        ]
        self._samples = 1
        teacher.show([pair.teacher for pair in pairs])

    def prepare(self, data: Data, batch_size: int, *, same_images: bool) -> None:
        """Let the teacher run, if once is enough."""
        shown = ", ".join(f"{pair.student} with {pair.teacher}" for pair in self.pairs)
        _LOG.info("%s compares, of the student and the teacher, %s", self._loss.name, shown)
        self._samples = len(data.train)
        self._teacher.prepare(data, batch_size, same_images=same_images)

    def __call__(self, batch: Batch) -> tf.Tensor:
        """Return the weighted loss."""
        wanted = self._teacher(batch)
        student, teacher = [], []
        for pair, (own, other) in zip(self.pairs, self._connectors, strict=True):
            ours, theirs = batch.features[pair.student], wanted[pair.teacher]
            student.append(ours if own is None else own(ours))
            teacher.append(theirs if other is None else other(theirs))
        return self._loss.weight * self._loss.value(student, teacher, self._samples)


def chosen_losses(recovery: Recovery, where: str) -> list[Loss]:
    """Return the losses that ``recovery.losses`` names, with their settings, those of weight 0 left out.

    Args:
        recovery: its losses are checked.
        where: the configuration key of the recovery, for errors.

    Raises:
        CompressError: if there is no such loss, or a setting of it is unknown or out of range.
    """
    known = losses()
    found = []
    for name, settings in sorted((recovery.losses or {}).items()):
        key = f"{where}.losses.{name}"
        if name == SoftTargets.name:
            raise CompressError(
                key,
                expected="losses beside the soft targets",
                received=f"{name}={settings}",
                fix=f"Write {where}.soft_weight, a share from 0 to 1, and {where}.temperature.",
            )
        if name not in known:
            raise CompressError(
                key,
                expected="a loss that exists",
                received=name,
                fix=did_you_mean(name, set(known) - {SoftTargets.name}),
            )
        found.append(_made(known[name], settings, key))
    return [loss for loss in found if loss.weight]


def reads_pairs(recovery: Recovery) -> bool:
    """Say whether a loss compares inner layers; one of weight 0 counts, too, as it is tried beside others."""
    known = losses()
    return any(issubclass(known[name], LayerLoss) for name in recovery.losses or {} if name in known)


def reads_temperature(recovery: Recovery) -> bool:
    """Say whether a loss compares what is said about the classes; one of weight 0 counts, too, as for the pairs."""
    known = losses()
    named = (known[name] for name in recovery.losses or {} if name in known)
    return recovery.soft_weight > 0 or any(issubclass(loss, LogitsLoss) for loss in named)


def require_lesson(recovery: Recovery, where: str) -> None:
    """Refuse a distillation from which nothing, or not all that was asked for, can be learned; before any network.

    Args:
        recovery: weights, losses, batch size and names of teachers.
        where: the configuration key of the recovery, for errors.

    Raises:
        CompressError: if no loss listens to the teachers, or to one of them, or one cannot compare such batches.
    """
    chosen = _weighed(recovery, where)
    if not chosen:
        raise CompressError(
            f"{where}.soft_weight",
            expected="something to learn from the teacher: soft targets, or a loss in losses",
            received=f"soft_weight={recovery.soft_weight:g} losses={recovery.losses or {}}",
            fix=f"Give the soft targets a weight (soft_weight=0.9), name a loss ({where}.losses={{hints: 1}}), or "
            "train on the labels alone (recovery=finetune; strategy=finetune in place of distill).",
        )
    # Of two spellings of a path the file is the same.
    files = [Path(name).expanduser().resolve() for name in recovery.teachers]
    twice = [name for index, name in enumerate(recovery.teachers) if files[index] in files[:index]]
    if twice:
        raise CompressError(
            f"{where}.teachers",
            expected="each teacher once: all are heard alike",
            received=f"[{', '.join(recovery.teachers)}]",
            fix=f"Name {twice[0]} once.",
        )
    if len(recovery.teachers) > 1 and not any(isinstance(loss, LogitsLoss) for loss in chosen):
        raise CompressError(
            f"{where}.teachers",
            expected="one teacher: losses of inner layers look at the first alone",
            received=f"{counted(len(recovery.teachers), 'teacher')}, and no loss of what they say about the classes",
            fix="Name one, or give the soft targets a weight (soft_weight=0.9).",
        )
    for loss in chosen:
        _require_samples(loss, recovery.batch_size, where)


def _weighed(recovery: Recovery, where: str) -> list[Loss]:
    """Return the soft targets, if they have a weight, and the losses that the recovery names."""
    soft = [SoftTargets(weight=recovery.soft_weight)] if recovery.soft_weight else []
    return [*soft, *chosen_losses(recovery, where)]


def distillation_terms(
    recovery: Recovery, teachers: Sequence[Teacher], student: tf_keras.Model, *, seed: int, where: str, keep: Keep
) -> list[LossTerm]:
    """Return the terms of the training loss: soft targets, and the losses that the recovery names.

    The labels have what ``recovery.label_weight`` says; by default what the soft targets leave of 1.

    Args:
        recovery: weights, temperature, losses, which layers are compared.
        teachers: who teaches; losses of inner layers look at the first one.
        student: the model that will be trained.
        seed: of what the losses train beside the student.
        where: the configuration key of the recovery, for errors.
        keep: keeps the teachers' outputs on disk.

    Raises:
        CompressError: if :func:`require_lesson` refuses it, the teachers do not fit the student, or layers cannot be
            compared.
    """
    require_lesson(recovery, where)
    chosen = _weighed(recovery, where)
    for teacher in teachers:
        _require_fit(teacher.model, student, where)
        teacher.keep = keep
    layers = Layers(student)
    own = (loss.pairs for loss in chosen if isinstance(loss, LayerLoss))
    teachers[0].unfold({layer for rule in (recovery.pairs, *own) if rule is not None for layer in rule.values()})
    label_weight = 1.0 - recovery.soft_weight if recovery.label_weight is None else recovery.label_weight
    terms: list[LossTerm] = []
    for number, loss in enumerate(chosen):
        # The terms multiply what they leave to the labels.
        task_weight = 1.0 if terms else label_weight
        if isinstance(loss, LogitsLoss):
            terms.append(LogitsTerm(loss, teachers, recovery.temperature, task_weight))
        else:
            inner = cast(LayerLoss, loss)
            pairs = _pairs(inner, recovery, teachers[0].layers, layers, where)
            terms.append(LayerTerm(inner, teachers[0], pairs, seed + 1000 * number, task_weight))
    return terms


def _made(kind: type[Loss], settings: Any, where: str) -> Loss:
    scalar = not isinstance(settings, Mapping)
    values = {"weight": settings} if scalar else settings
    known = {item.name for item in fields(kind)}
    for name in values:
        if name not in known:
            raise CompressError(
                f"{where}.{name}", expected="a setting of the loss", received=name, fix=did_you_mean(name, known)
            )
        # Python counts with it as with 1.
        if isinstance(values[name], bool):
            raise CompressError(
                where if scalar else f"{where}.{name}",
                expected="a valid number",
                received=str(values[name]).lower(),
                fix=_SETTINGS,
            )
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        place = "" if scalar else ".".join(part for part in first["loc"][:1] if isinstance(part, str))
        raise CompressError(
            f"{where}.{place}" if place else where,
            expected=str(first["msg"]).removeprefix("Input should be ").removeprefix("Value error, "),
            received=repr(first["input"])[:120],
            fix=_SETTINGS,
        ) from error


def _pairs(loss: LayerLoss, recovery: Recovery, teacher: Layers, student: Layers, where: str) -> list[Pair]:
    key = f"{where}.losses.{loss.name}"
    rule = loss.pairs if loss.pairs is not None else recovery.pairs
    if rule is not None:
        key = f"{key}.pairs" if loss.pairs is not None else f"{where}.pairs"
        pairs = pairs_by_rule(rule, teacher, student, key)
    else:
        pairs = loss.choose(teacher, student)
    for pair in pairs:
        misfit = loss.misfit(pair)
        if misfit is not None:
            raise CompressError(
                key,
                expected=f"layers that {loss.name} can compare: {misfit}",
                received=f"{pair.student} {pair.student_shape} of the student {student.model.name}, "
                f"{pair.teacher} {pair.teacher_shape} of the teacher {teacher.model.name}",
                fix=f"Name others with {where}.pairs={{<student's layer>: <teacher's layer>}}, or leave the loss out.",
            )
    if len(pairs) < loss.least:
        raise CompressError(
            key,
            expected=f"at least {counted(loss.least, 'pair')} of layers of the student, "
            f"{student.model.name}, and the teacher, {teacher.model.name}, that {loss.name} can compare",
            received=", ".join(f"{pair.student}: {pair.teacher}" for pair in pairs) or "none",
            fix=f"Name them with {where}.pairs={{<student's layer>: <teacher's layer>}}, or leave the loss out.",
        )
    return pairs


def _require_fit(teacher: tf_keras.Model, student: tf_keras.Model, where: str) -> None:
    tensors = [[*model.inputs, *model.outputs] for model in (student, teacher)]
    same = len(tensors[0]) == len(tensors[1]) and all(
        one.shape[1:].is_compatible_with(other.shape[1:]) for one, other in zip(*tensors, strict=True)
    )
    if not same:
        raise CompressError(
            f"{where}.teachers",
            expected=f"teachers that read and give what the student, {student.name}, does: {_shown(student)}",
            received=f"{teacher.name}: {_shown(teacher)}",
            fix="Name models that were trained on the same inputs and classes.",
        )


def _require_samples(loss: Loss, batch_size: int, where: str) -> None:
    """Refuse batches of fewer samples than a loss compares with each other, or of more than it can hold."""
    fewest, most = loss.samples if isinstance(loss, LayerLoss) else (1, None)
    if batch_size < fewest or (most is not None and batch_size > most):
        raise CompressError(
            f"{where}.batch_size",
            expected=f"{fewest} samples of a batch or more"
            + (f", and {most} at most" if most else "")
            + f", which {loss.name} compares with each other",
            received=str(batch_size),
            fix=f"Write {where}.batch_size=128, or leave the loss out.",
        )


def _shown(model: tf_keras.Model) -> str:
    inputs, outputs = (", ".join(str(tuple(t.shape)[1:]) for t in part) for part in (model.inputs, model.outputs))
    return f"{inputs} to {outputs}"
