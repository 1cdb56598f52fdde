"""Pipelines that cannot work, refused before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import tf_keras

from compress.candidate import Candidate, Effect
from compress.data.source import Data
from compress.distribution.replicas import Distribution
from compress.errors import CompressError
from compress.graph.saved_graph import has_layers
from compress.models.source import ModelSource
from compress.pipeline.stage import Stage
from compress.strategies.distillation.recovering import AUTO
from compress.strategies.distillation.student import StudentStrategy
from compress.strategies.distillation.terms import reads_pairs, reads_temperature, require_lesson
from compress.strategies.strategy import PREVIOUS, REFERENCE, Context, require_labels, require_training
from compress.training import Recovery
from compress.words import counted

_SAME_LAYERS = {Effect.TRAIN, Effect.ZERO, Effect.FILL, Effect.SHARE, Effect.LEVEL}
"""What leaves a network with the layers that it has."""
_OF_TEACHERS = ("temperature", "soft_weight", "label_weight", "losses", "pairs", "teachers")
"""Fields of a recovery that only a distillation reads."""


def refuse_without_layers(stages: Sequence[Stage], model: tf_keras.Model) -> None:
    """Refuse stages that change layers or weights of a model that came as a graph without Keras layers.

    Raises:
        CompressError: naming the first such stage.
    """
    for stage in stages:
        changes = sorted(effect.value for effect in stage.strategy.effects - {Effect.STORE})
        if changes and not has_layers(model):
            raise CompressError(
                f"stage {stage.name}",
                expected=f"a model with Keras layers (of each, {stage.name} {' and '.join(changes)})",
                received=f"the SavedModel {model.name}, a graph without Keras layers",
                fix="Save the model with model.save('model.keras') and bring that file. A SavedModel can be quantized "
                "(strategy=quantize) and measured (strategy=none).",
            )


def refuse_clashes(stages: Sequence[Stage], model: tf_keras.Model) -> None:
    """Refuse a pipeline in which a stage cannot keep what an earlier one establishes, before anything runs.

    Raises:
        CompressError: naming both stages.
    """
    for index, later in enumerate(stages):
        unknown = set(later.release) - {stage.name for stage in stages[:index]}
        if unknown:
            raise CompressError(
                f"strategy.{later.name}.release",
                expected=f"stages before it ({', '.join(s.name for s in stages[:index]) or 'there is none'})",
                received=", ".join(sorted(unknown)),
                fix="Name a stage as it appears under strategy in the configuration.",
            )
        released = {name for stage in stages[: index + 1] for name in stage.release}
        kept = [earlier for earlier in stages[:index] if earlier.name not in released]
        for earlier in kept:
            _refuse_another_scheme(later, earlier)
        try:
            targets = later.strategy.targets(model, later.selection)
        except CompressError:
            # Its rules may mean layers that an earlier stage will make; if not, the stage itself refuses them.
            if not any(Effect.REPLACE in earlier.strategy.effects for earlier in stages[:index]):
                raise
            continue
        for earlier in kept:
            reason = later.strategy.clashes_with(earlier.strategy)
            before = earlier.strategy.targets(model, earlier.selection)
            # How a file is written is said once for all of its layers.
            both = targets | before if _both_store(later, earlier) else targets & before
            if reason is not None and both:
                raise CompressError(
                    f"stage {later.name} after stage {earlier.name}",
                    expected=f"a strategy that keeps what {earlier.name} establishes on {_few(both)}",
                    received=f"{later.name}, which cannot: {reason}",
                    fix=_instead(later, earlier),
                )


def _both_store(later: Stage, earlier: Stage) -> bool:
    return later.strategy.stores is not None and earlier.strategy.stores is not None


def _instead(later: Stage, earlier: Stage) -> str:
    """Return what to do about a stage that cannot keep what an earlier one establishes."""
    release = f"write strategy.{later.name}.release=[{earlier.name}]"
    if _both_store(later, earlier):
        return f"Leave one of the two stages out, or {release}."
    if isinstance(later.strategy, StudentStrategy) and later.strategy.replaces:
        return f"Put {later.name} before {earlier.name}, or {release}."
    apart = f"keep them on different layers with only and skip, or {release}."
    if type(later.strategy) is type(earlier.strategy) or earlier.strategy.clashes_with(later.strategy):
        return f"Leave one of the two stages out, {apart}"
    return f"Put {later.name} before {earlier.name}, {apart}"


def refuse_indivisible(stages: Sequence[Stage], model: ModelSource, samples: int, distribution: Distribution) -> None:
    """Refuse batch sizes that the replicas of ``distribution`` cannot share; ``samples``: those of the training part.

    Raises:
        CompressError: naming the first such size.
    """
    origin = model.origin()
    if origin.schedule is not None and not origin.untrained:
        distribution.require_divisible(origin.schedule.batch_size, samples, "model.train.batch_size")
    for stage in stages:
        if stage.recovery.trains:
            key = f"strategy.{stage.name}.recovery.batch_size"
            distribution.require_divisible(stage.recovery.batch_size, samples, key)


def refuse_without_labels(stages: Sequence[Stage], data: Data) -> None:
    """Refuse stages that learn from labels, or weigh them, where the training images have none.

    Raises:
        CompressError: naming the first such stage.
    """
    for stage in stages:
        weight = stage.strategy.trains_with(stage.recovery).label_weight
        if stage.method == "distill" and weight and not data.train.labelled:
            raise CompressError(
                f"strategy.{stage.name}.recovery.label_weight",
                expected="labels of the training images, which this is the weight of",
                received=f"label_weight={weight:g}, and data {data.name} without y_train",
                fix="Leave it out: the teacher is enough. Or save y_train, too.",
            )
        if stage.strategy.needs_labels:
            require_labels(data, stage.name, f"{stage.name} learns from them", "strategy=distill in its place")
        elif stage.method == "finetune":
            require_labels(data, stage.name, "recovery.method=finetune learns from nothing else")


def refuse_unfit(stages: Sequence[Stage], data: Data) -> None:
    """Refuse stages that cannot work with these data, or with what the configuration says of their recovery.

    Raises:
        CompressError: naming the first such stage.
    """
    _refuse_unheard(stages)
    _refuse_unread(stages, "pairs", reads_pairs, "a loss that compares the layers of these pairs", "hints or attention")
    _refuse_unread(
        stages, "temperature", reads_temperature, "a loss of what the teachers say about the classes", "decoupled"
    )
    for stage in stages:
        if stage.method == "distill":
            require_lesson(stage.strategy.trains_with(stage.recovery), f"strategy.{stage.name}.recovery")
    for stage in stages:
        if stage.strategy.needs_training:
            require_training(stage.recovery, stage.name, stage.strategy.own_method)
        stage.strategy.require(data, stage.recovery, stage.name)


def refuse_incomparable(stages: Sequence[Stage], context: Context) -> None:
    """Refuse students that cannot be made, and losses that cannot compare them with their teacher.

    Both are looked at where they are known before anything is trained.

    Args:
        stages: those up to the first one that makes another network are looked at.
        context: of the pipeline; its reference model need not be trained.

    Raises:
        CompressError: naming the first such stage.
    """
    if not any(
        (stage.method == "distill" and stage.recovery.losses)
        or (isinstance(stage.strategy, StudentStrategy) and stage.strategy.asks_of_student)
        for stage in stages
    ):
        return
    model = context.reference
    for stage in stages:
        recovery = stage.strategy.trains_with(stage.recovery)
        own = context.for_stage(stage.name, selection=stage.selection, recovery=recovery, previous=model)
        if isinstance(stage.strategy, StudentStrategy):
            model = stage.strategy.student_of(Candidate(model), own).model
        elif not stage.strategy.effects <= _SAME_LAYERS:
            break
        if stage.method == "distill" and recovery.losses and {*recovery.teachers} <= {REFERENCE, PREVIOUS}:
            own.distillation(model)
    # Keras numbers layers that have no name: what follows starts as if nothing had been built.
    tf_keras.backend.reset_uids()


def _refuse_unheard(stages: Sequence[Stage]) -> None:
    """Refuse settings of teachers in stages without any, unless another stage obeys them.

    ``recovery`` gives all stages the same values, so those that some stage has a use for may be meant for that one.
    """
    defaults = {item.name: item.default for item in dataclasses.fields(Recovery)}
    methods = [
        (stage.strategy.own_method or stage.recovery.method) if Effect.TRAIN in stage.strategy.effects else "none"
        for stage in stages
    ]
    heard = [stage.recovery for stage, method in zip(stages, methods, strict=True) if method in ("distill", AUTO)]
    for stage, method in zip(stages, methods, strict=True):
        # What is written for all stages may be meant for another one.
        if method in ("distill", AUTO) or (method == "none" and heard):
            continue
        for name in _OF_TEACHERS:
            value = getattr(stage.recovery, name)
            if value != defaults[name] and all(getattr(other, name) != value for other in heard):
                raise CompressError(
                    f"strategy.{stage.name}.recovery.{name}",
                    expected=f"nothing of teachers: {stage.name} "
                    + ("trains on the labels alone" if method == "finetune" else "does not train"),
                    received=f"{name}={list(value) if isinstance(value, tuple) else value}",
                    fix=f"Leave {name} out"
                    + (
                        ", or let it learn from one: recovery=distill."
                        if method == "finetune" and not stage.strategy.own_method
                        else ", or add a stage that learns from one: strategy=distill."
                    ),
                )


def _refuse_unread(
    stages: Sequence[Stage], field: str, reads: Callable[[Recovery], bool], reader: str, example: str
) -> None:
    """Refuse a field of the recovery that no loss reads, in this stage or another that has the same."""
    default = next(item.default for item in dataclasses.fields(Recovery) if item.name == field)
    recoveries = [stage.strategy.trains_with(stage.recovery) for stage in stages]
    read = [getattr(recovery, field) for recovery in recoveries if reads(recovery)]
    for stage, recovery in zip(stages, recoveries, strict=True):
        value = getattr(recovery, field)
        if value != default and value not in read:
            raise CompressError(
                f"strategy.{stage.name}.{field}"
                if getattr(stage.strategy, field, None) is not None
                else f"strategy.{stage.name}.recovery.{field}",
                expected=f"{reader}, such as {example}",
                received=f"losses={dict(recovery.losses or {})}, soft_weight={recovery.soft_weight:g}",
                fix=f"Name one, strategy.{stage.name}.recovery.losses={{{example.split()[0]}: 1}}, or leave the "
                f"{field} out.",
            )


def _refuse_another_scheme(later: Stage, earlier: Stage) -> None:
    """Refuse a stage that would write the file otherwise than an earlier one says, on whatever layers."""
    before, after = earlier.strategy.stores, later.strategy.stores
    if before is not None and after is not None and before != after:
        raise CompressError(
            f"stage {later.name} after stage {earlier.name}",
            expected=f"one way to store the weights: {before}, which {earlier.name} establishes",
            received=f"{later.name}, which would store them as {after}",
            fix=f"Leave one of the two stages out, or write strategy.{later.name}.release=[{earlier.name}].",
        )


def _few(names: frozenset[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {counted(len(listed) - 3, 'more layer')}" if len(listed) > 3 else "")
