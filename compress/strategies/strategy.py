"""The contract of a strategy, and the context that it works in."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import tensorflow as tf
import tf_keras
from pydantic import ConfigDict

from compress.batches import augment
from compress.candidate import Artifact, Candidate, Effect, Guarantee, Measurement, Scheme, Skipped
from compress.checkpoints import Checkpoint
from compress.data.source import Data
from compress.deploy.files import Save, save_flat, write_files
from compress.deploy.tflite import export
from compress.distribution.replicas import SINGLE, Distribution
from compress.errors import CompressError
from compress.graph.selection import Selection
from compress.progress import progress
from compress.strategies.distillation.judging import require_same_classes
from compress.strategies.distillation.teacher import Keep, Teacher, keep_nothing
from compress.strategies.distillation.terms import distillation_terms
from compress.training import Recovery, train
from compress.training_step import LossTerm, Projection, WeightQuantizer

STRICT = ConfigDict(extra="forbid")
REFERENCE = "reference"
"""How ``recovery.teachers`` names the model that the pipeline started from."""
PREVIOUS = "previous"
"""How it names the model that the stage receives: the assistant before this one, or the generation before."""


def _not_kept() -> Checkpoint | None:
    return None


def _anew(_name: str, _settings: Sequence[Any], make: Callable[[], Any]) -> Any:
    return make()


def _nobody(_taught: bool, _seconds: float) -> None:
    """Hear nothing."""


@dataclass(frozen=True)
class Context:
    """What a strategy may use besides the candidate. Nothing else is global."""

    stage: str
    """Name of the stage, for guarantees and errors."""
    data: Data
    reference: tf_keras.Model
    """The model that the pipeline started from: the default teacher."""
    recovery: Recovery
    seed: int
    selection: Selection = field(default_factory=Selection)
    strict: bool = False
    measure: Callable[[Sequence[Artifact]], Sequence[Measurement]] | None = None
    """Runs an exported file on the target board; None if there is none."""
    remember: Callable[[str, Sequence[Any], Callable[[], Any]], Any] = _anew
    """Returns what the callable makes, in JSON's types; what it made before for the same name, settings and candidate.

    For measurements that runs with other budgets and boards share: what a board says is kept under ``board``, too.
    """
    board: str = ""
    """A digest of what the board is."""
    channel_multiple: int = 1
    """The board computes as long for fewer channels than the next multiple of this."""
    keep: Keep = keep_nothing
    """Keeps arrays on disk, for runs that would make the same."""
    other_model: Callable[[str], tf_keras.Model] | None = None
    """Returns the trained model that ``recovery.teachers`` names."""
    checkpoint: Callable[[], Checkpoint | None] = _not_kept
    """Returns where the stage's next training leaves its state."""
    previous: tf_keras.Model | None = None
    """The model as the stage received it."""
    untrained_model: Callable[[str, int], tf_keras.Model] | None = None
    """Returns the network of that name in ``conf/model`` with weights as initialised by a seed."""
    distribution: Distribution = SINGLE
    """Who computes the steps of a training."""
    on_recovery: Callable[[bool, float], None] = _nobody
    """Is told of every training whether teachers had part in it, and how many seconds it took."""
    sparse: bool = True
    """Whether the board runs files whose kernels are stored without their zeros."""
    save: Save = save_flat
    """Writes a Keras file as the pipeline delivers it: in the format that the reference came in."""

    def export(self, candidate: Candidate, path: Path) -> Artifact:
        """Write the candidate's file as the pipeline would deliver it on this board."""
        return export(candidate, self.data, path, sparse=self.sparse)

    def write_files(self, candidate: Candidate, folder: Path) -> Artifact:
        """Write the candidate's file, and the packed one beside it, as the pipeline would deliver them."""
        return write_files(candidate, self.data, folder, sparse=self.sparse, save=self.save)

    def recover(
        self,
        candidate: Candidate,
        *,
        projections: Sequence[Projection] = (),
        terms: Sequence[LossTerm] = (),
        quantizers: Mapping[str, WeightQuantizer] = MappingProxyType({}),
    ) -> Candidate:
        """Train the candidate's model in place as the stage's recovery says, keeping every guarantee.

        The model must be the strategy's own copy. With ``recovery.method=none`` or ``epochs=0`` the candidate
        comes back as it is.
        """
        if not self.recovery.trains:
            return candidate
        taught = self.recovery.method == "distill"
        if not taught:
            require_labels(self.data, self.stage, "recovery.method=finetune learns from nothing else")
        started = time.perf_counter()
        extra = [*terms, *self.distillation(candidate.model)]
        with progress(self.stage) as shown:
            history = train(
                candidate.model,
                self.data.for_distillation() if taught else self.data,
                self.recovery,
                seed=self.seed,
                guarantees=candidate.guarantees,
                projections=projections,
                terms=extra,
                quantizers=quantizers,
                progress=shown,
                where=f"stage {self.stage}, training",
                rate_key=f"strategy.{self.stage}.recovery.learning_rate",
                checkpoint=self.checkpoint(),
                distribution=self.distribution,
            )
        self.on_recovery(taught, history.seconds_before + time.perf_counter() - started)
        return candidate

    def distillation(self, student: tf_keras.Model) -> list[LossTerm]:
        """Return what a model is to learn from its teachers: nothing, unless the recovery distils."""
        if self.recovery.method != "distill":
            return []
        where = f"strategy.{self.stage}.recovery"
        return distillation_terms(self.recovery, self.teachers(), student, seed=self.seed, where=where, keep=self.keep)

    def teachers(self) -> list[Teacher]:
        """Return who teaches: what ``recovery.teachers`` names, or else the reference model.

        Raises:
            CompressError: if one does not fit the data that the model is trained on.
        """
        return [Teacher(model) for model in self.teacher_models()]

    def teacher_models(self) -> list[tf_keras.Model]:
        """Return the models of :meth:`teachers`."""
        return [self._teacher(name) for name in self.recovery.teachers or (REFERENCE,)]

    def _teacher(self, name: str) -> tf_keras.Model:
        if name == PREVIOUS and self.previous is not None:
            return self.previous
        if name in (REFERENCE, PREVIOUS) or self.other_model is None:
            return self.reference
        where = f"strategy.{self.stage}.recovery.teachers"
        model = self.other_model(name)
        require_same_classes(model, name, self.reference, where, "teacher")
        return model

    def untrained(self, name: str) -> tf_keras.Model:
        """Return a network of ``conf/model`` with weights as initialised by the seed.

        Raises:
            CompressError: if it does not read and give what the reference model does.
        """
        if self.untrained_model is None:
            raise CompressError(
                f"stage {self.stage}",
                expected="a pipeline, which knows networks by name",
                received=name,
                fix="Run one.",
            )
        model = self.untrained_model(name, self.seed)
        require_same_classes(model, name, self.reference, f"strategy.{self.stage}, {name}", "student")
        return model

    def median_latency(self, artifact: Artifact, instead: str) -> float:
        """Return the median latency of a file on the board, as :meth:`median_latencies` of one."""
        return self.median_latencies([artifact], instead)[0]

    def median_latencies(self, artifacts: Sequence[Artifact], instead: str) -> list[float]:
        """Return the median latencies of files on the board, in milliseconds; its estimates, if it runs nothing.

        Args:
            artifacts: the files, which take turns where the board's times are noisy.
            instead: the field of the stage that says how much in another unit, for the error.

        Raises:
            CompressError: if there is no board, or it gives none.
        """
        found = self.measurements(artifacts)
        costs = [measurement.cost_ms for measurement in found if measurement.cost_ms is not None]
        if not found or len(costs) < len(found):
            failure = next(
                (f"{one.board}: {one.failure or 'it gives no time'}" for one in found if one.cost_ms is None),
                "no board",
            )
            raise CompressError(
                f"strategy.{self.stage}.latency",
                expected="a board that measures latency",
                received=failure,
                fix=f"Choose another board, or give strategy.{self.stage}.{instead} instead.",
            )
        return costs

    def measurements(self, artifacts: Sequence[Artifact]) -> Sequence[Measurement]:
        """Return what the board says of each file, whether or not it gives a time; nothing, if there is no board."""
        return [] if self.measure is None else self.measure(artifacts)

    def calibration_samples(self, count: int) -> np.ndarray:
        """Return up to ``count`` samples of the training part, augmented as in training, without their labels.

        Where images are augmented, half of them are mixed with another one in a random ratio (mixup, arXiv 1710.09412):
        a network is sure of the images that it was trained on, and these say little about the ones it is unsure of.
        """
        rng = np.random.default_rng(self.seed)
        chosen = rng.permutation(len(self.data.train))[:count]
        samples = self.data.train.x[chosen].astype(np.float32)
        if self.data.augmentation:
            seed = tf.constant([self.seed, 0], tf.int64)
            samples = augment(tf.constant(samples), self.data.augmentation, seed).numpy()
            mixed = rng.permutation(len(samples))[: len(samples) // 2]
            ratio = rng.uniform(size=(len(mixed), *[1] * (samples.ndim - 1))).astype(np.float32)
            samples[mixed] = ratio * samples[mixed] + (1 - ratio) * samples[rng.permutation(len(samples))[: len(mixed)]]
        return samples

    def require_training(self, method: str | None = None) -> None:
        """Refuse a stage that does nothing but train when its recovery does not train; see :func:`require_training`."""
        require_training(self.recovery, self.stage, method)

    def skip(self, skipped: Sequence[Skipped]) -> tuple[Skipped, ...]:
        """Return the skipped layers for the report.

        Raises:
            CompressError: in strict mode, if there are layers that the strategy cannot handle.
        """
        unsupported = [item for item in skipped if not item.by_choice]
        if self.strict and unsupported:
            more = f" and {len(unsupported) - 6} more" if len(unsupported) > 6 else ""
            raise CompressError(
                f"stage {self.stage}, layer {unsupported[0].layer}",
                expected="layers that the strategy can handle (strict=true)",
                received="; ".join(f"{item.layer}: {item.reason}" for item in unsupported[:6]) + more,
                fix=f"Leave it out with strategy.{self.stage}.skip, or write strict=false.",
            )
        return tuple(skipped)

    def nothing_done(self, expected: str, skipped: Sequence[Skipped]) -> CompressError:
        """Return the error for a stage that found no layer to change."""
        reasons = "; ".join(f"{s.layer}: {s.reason}" for s in skipped[:6]) or "no layer of this kind"
        return CompressError(
            f"stage {self.stage}",
            expected=expected,
            received=f"none ({reasons})",
            fix=f"Widen strategy.{self.stage}.only and skip, or leave the stage out."
            if self.selection.only or self.selection.skip
            else "Choose settings that fit these layers, or leave the stage out."
            if skipped
            else "Leave the stage out: the model has nothing for it.",
        )

    def for_stage(self, stage: str, **changes: object) -> Context:
        """Return the context of another stage."""
        return replace(self, stage=stage, **changes)  # type: ignore[arg-type]


class Strategy(ABC):
    """A way to make a model smaller. Subclasses are frozen dataclasses; their fields are their configuration."""

    effects: ClassVar[frozenset[Effect]] = frozenset()
    """What it does to the layers that it touches."""
    establishes: ClassVar[type[Guarantee] | None] = None
    """The kind of guarantee that it adds."""
    stores: ClassVar[Scheme | None] = None
    """How the file is written from then on, if it decides that."""
    needs_labels: ClassVar[bool] = False
    """Whether it learns from labels, whatever its recovery."""
    needs_training: ClassVar[bool] = False
    """Whether it does nothing else, so that a recovery without a step is refused."""
    own_method: ClassVar[Literal["finetune", "distill"] | None] = None
    """How it trains, if it says so itself: ``recovery.method`` then says nothing but whether it trains."""

    @property
    def if_worse(self) -> str | None:
        """What to advise where the model made is worse than the one received; None where that is to be expected."""
        return None

    @abstractmethod
    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Return a new candidate; the one given, and its model, are left as they are.

        Raises:
            CompressError: if what was asked for cannot be done, naming the stage.
        """

    def require(self, data: Data, recovery: Recovery, stage: str) -> None:  # noqa: B027
        """Refuse data or a recovery that it cannot work with; asked before anything runs.

        Raises:
            CompressError: naming the key of the stage.
        """

    def trains_with(self, recovery: Recovery) -> Recovery:
        """Return the recovery that it trains with, given the stage's: fields of its own come first."""
        return recovery

    def models(self) -> Mapping[str, str]:
        """Return the networks that it builds: their names in ``conf/model``, each with the field that holds it.

        :meth:`Context.untrained` gives them.
        """
        return {}

    def targets(self, model: tf_keras.Model, selection: Selection) -> frozenset[str]:
        """Return the names of the layers that it would touch; used to refuse a pipeline before it runs."""
        return selection.names(model)

    def clashes_with(self, earlier: Strategy) -> str | None:
        """Say why it cannot keep what ``earlier`` establishes on a layer that both touch; None if it can."""
        if earlier.establishes is None:
            return None
        broken = sorted(effect.value for effect in self.effects & earlier.establishes.broken_by)
        return f"it {' and '.join(broken)}" if broken else None


def require_training(recovery: Recovery, stage: str, method: str | None) -> None:
    """Refuse a stage that does nothing but train when its recovery does not train; ``method``: its own, if it has one.

    Raises:
        CompressError: if the recovery makes no step.
    """
    if not recovery.trains:
        raise CompressError(
            f"strategy.{stage}.recovery",
            expected="some training: this stage does nothing else",
            received=f"method={recovery.method} epochs={recovery.epochs:g}",
            fix=f"Write strategy.{stage}.recovery.method={method or 'finetune'} strategy.{stage}.recovery.epochs=1, "
            "or leave the stage out.",
        )


def require_labels(data: Data, stage: str, reason: str, otherwise: str = "") -> None:
    """Refuse a stage that learns from labels where there are none; ``otherwise``: what to write to do without.

    Raises:
        CompressError: saying why it needs them.
    """
    if not data.train.labelled:
        raise CompressError(
            f"strategy.{stage}.recovery",
            expected=f"labels of the training images: {reason}",
            received=f"data {data.name} without y_train",
            fix=f"Write {otherwise or f'strategy.{stage}.recovery.method=distill (or auto)'}, which needs none, "
            "or save y_train, too.",
        )
