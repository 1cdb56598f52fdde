"""The one training loop: task loss + extra loss terms + projections after every step.

Every strategy that recovers accuracy does it here. The loop is ``tf_keras``' own ``fit`` with a training
step that adds the extra terms to the loss and applies the projections to the weights, all in one compiled
function; so it costs what ``fit`` costs.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, Any, Literal

import numpy as np
import tensorflow as tf
import tf_keras
from annotated_types import Ge, Gt, Le, Lt
from pydantic.dataclasses import dataclass as checked_dataclass

from compress.batches import training_batches
from compress.candidate import Guarantee
from compress.checkpoints import Checkpoint, Resumable, draws_by_step
from compress.data.source import NO_LABEL, STRICT, Augmentation, Data
from compress.distribution.norms import refuse_own_statistics, synchronised
from compress.distribution.replicas import SINGLE, Distribution
from compress.errors import CompressError
from compress.graph.grouped import groups_apart
from compress.graph.kernels import get_variable
from compress.graph.softmax import linear_ending, logits_tensor
from compress.progress import Progress
from compress.training_step import Latent, LossTerm, Projection, Trainee, WeightQuantizer


@checked_dataclass(frozen=True, config=STRICT)
class Recovery:
    """How a stage wins accuracy back (``conf/recovery``)."""

    method: Literal["finetune", "distill", "none", "auto"] = "finetune"
    epochs: Annotated[float, Ge(0), Le(1e6)] = 1.0
    learning_rate: Annotated[float, Gt(0), Lt(float("inf"))] = 0.01
    optimizer: Literal["sgd", "adam"] = "sgd"
    schedule: Literal["cosine", "constant"] = "cosine"
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    weight_decay: Annotated[float, Ge(0), Le(1e3)] = 1e-4
    batch_size: Annotated[int, Gt(0), Le(1_000_000)] = 128
    temperature: Annotated[float, Gt(0), Le(1e6)] = 4.0
    soft_weight: Annotated[float, Ge(0), Le(1)] = 0.9
    label_weight: Annotated[float, Ge(0), Le(1e6)] | None = None
    """What the loss of the labels is multiplied with beside a teacher; None: what ``soft_weight`` leaves of 1."""
    clip_norm: Annotated[float, Gt(0), Lt(float("inf"))] | None = None
    """A longer gradient, of all weights together, is shortened to this norm at every step; None: never."""
    losses: Mapping[str, Any] | None = None
    """Further losses between student and teacher: name -> weight, or its settings, the weight among them."""
    pairs: Mapping[str, str] | None = None
    """Student's layer -> the teacher's layer that losses of inner layers compare it with; None: they choose."""
    teachers: tuple[str, ...] = ()
    """Names or files of models that teach together; the pipeline's reference model alone if there are none."""
    mixup: Annotated[float, Ge(0), Le(1)] = 0.0
    augment: bool = True
    """Whether training images are changed as the data say; the teacher may have learned from changed ones anyway."""

    def part(self, share: float) -> Recovery:
        """Return the same with ``share`` of the epochs."""
        return replace(self, epochs=self.epochs * share)

    @property
    def trains(self) -> bool:
        """Whether any training step is made."""
        return self.method != "none" and self.epochs > 0


@dataclass(frozen=True)
class History:
    """What a training run did."""

    steps: int
    images: int
    seconds: float
    loss: float
    seconds_before: float = 0.0
    """That the steps took which were made before it was stopped; ``images`` and ``seconds`` are those since."""

    @property
    def images_per_second(self) -> float:
        """Training throughput."""
        return self.images / self.seconds if self.seconds else 0.0


def train(
    model: tf_keras.Model,
    data: Data,
    recovery: Recovery,
    *,
    seed: int,
    guarantees: Sequence[Guarantee] = (),
    projections: Sequence[Projection] = (),
    terms: Sequence[LossTerm] = (),
    quantizers: Mapping[str, WeightQuantizer] = MappingProxyType({}),
    progress: Progress | None = None,
    where: str = "training",
    rate_key: str = "recovery.learning_rate",
    checkpoint: Checkpoint | None = None,
    distribution: Distribution = SINGLE,
) -> History:
    """Train ``model`` in place on the training part and return what was done.

    Args:
        model: a model of the caller's own; it is changed.
        data: the data; only its training part is read. Samples of the label ``NO_LABEL`` have no part in the task loss.
        recovery: epochs, optimiser, schedule.
        seed: of the order of the samples, the augmentation and dropout.
        guarantees: properties restored after every step.
        projections: further changes of the weights after every step, made before the guarantees are restored.
        terms: extra terms of the loss.
        quantizers: weight name -> its quantizer. Training changes copies of these weights, on which guarantees are
            restored, too; the model computes with the quantized ones, and is left with them.
        progress: where the progress is shown.
        where: what an error says it happened in.
        rate_key: the configuration key of the learning rate, for the error about a loss that is no number.
        checkpoint: where the state is left at the ends of epochs; a training that finds its own there goes on from it,
            and ends with the same weights as one that was not stopped. Not used where replicas share a batch.
        distribution: who computes. Replicas share each batch, with the gradients that one alone would have; but for
            dropout, and for losses between the samples of a batch, which see those of their own replica.

    Raises:
        CompressError: if the loss becomes NaN or infinite, the batch cannot be divided among the replicas, or workers
            are about to train something else than others, or are gone.
    """
    batch_size = min(recovery.batch_size, len(data.train))
    key = rate_key.rpartition(".")[0]
    distribution.require_divisible(recovery.batch_size, len(data.train), f"{key}.batch_size")
    refuse_own_statistics(model, distribution, where)
    steps = max(1, round(recovery.epochs * len(data.train) / batch_size))
    tf_keras.utils.set_random_seed(seed)
    augmentation = data.augmentation if recovery.augment else Augmentation()
    for term in terms:
        # Mixed images are new at every step, as augmented ones are.
        term.prepare(data, batch_size, same_images=not (augmentation or recovery.mixup))
    tapped = list(dict.fromkeys(name for term in terms for name in term.layers))
    tensors = [model.get_layer(name).output for name in tapped]
    latents = {}
    for name, quantizer in quantizers.items():
        weight = get_variable(model, name)
        latents[name] = Latent(weight, tf.Variable(weight, name=f"{name}_latent"), quantizer)
        latents[name].write()
    trainee = Trainee(model.inputs, [logits_tensor(model), *tensors], name=model.name)
    trainee.setup(
        steps=steps,
        projections=[*projections, *_guarantee_projections(model, guarantees, latents)],
        labelled=bool(data.train.y.min() > NO_LABEL),
        terms=terms,
        tapped=tapped,
        latents=list(latents.values()),
        weight_decay=recovery.weight_decay,
        clip_norm=recovery.clip_norm,
        mixup=recovery.mixup,
        seed=seed,
        batch_size=batch_size,
        distribution=distribution,
    )
    # A compiled loss would be added to ours; the loop's loss is `Trainee.train_step`'s own.
    trainee.compile(optimizer=_optimizer(recovery, steps))
    started, before = time.perf_counter(), 0.0
    also = f", or the weights in {key}.losses" if recovery.losses else ""
    watch = _Watch(steps, recovery.learning_rate, progress, where, rate_key, also)
    callbacks: list[tf_keras.callbacks.Callback] = [watch]
    # A term that trains networks of its own names them.
    drawing = [model, *(network for term in terms for network in getattr(term, "networks", ()))]
    state = [variable for network in drawing for variable in network.weights]
    state += [variable for term in terms for variable in term.variables]
    state += [variable for latent in latents.values() for variable in (latent.value, *latent.quantizer.variables)]
    distribution.require_same(state, (recovery, seed, data.identity, len(data.train)), where)
    with (
        groups_apart(model),
        linear_ending(model),
        _settling_statistics(model, steps),
        draws_by_step(drawing, seed, trainee.optimizer.iterations),
        synchronised(drawing, distribution),
        distribution.watched(where),
    ):
        batches = functools.partial(training_batches, data.train, batch_size, steps, seed, augmentation)
        if checkpoint is not None and not distribution.divided:
            settings = (recovery, seed, data.identity, where)
            epoch = max(1, round(len(data.train) / batch_size))
            resumable = Resumable(trainee, batches(), checkpoint, settings, steps=steps, epoch=epoch)
            watch.start, watch.loss = resumable.done, resumable.loss
            before = resumable.seconds
            callbacks.append(resumable)
        left = steps - watch.start
        if left:
            read = (
                distribution.batches(lambda rows: batches(parts=rows), batch_size)
                if distribution.divided
                else batches(start=watch.start)
            )
            trainee.fit(read, epochs=1, steps_per_epoch=left, verbose=0, callbacks=callbacks)
        distribution.adopt_chief(state)
    return History(
        steps=steps,
        images=left * batch_size,
        seconds=time.perf_counter() - started,
        loss=watch.loss,
        seconds_before=before,
    )


@contextmanager
def _settling_statistics(model: tf_keras.Model, steps: int) -> Iterator[None]:
    """Let batch norms forget the statistics from before a short training: they would describe another network.

    With a momentum of 0.99 a training of 30 steps would leave three quarters of the old ones in place.
    """
    norms = [layer for layer in model.layers if isinstance(layer, tf_keras.layers.BatchNormalization)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = min(norm.momentum, max(0.3, 1.0 - 3.5 / steps))
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum


def _guarantee_projections(
    model: tf_keras.Model, guarantees: Sequence[Guarantee], latents: Mapping[str, Latent] = MappingProxyType({})
) -> list[Projection]:
    by_weight: dict[str, list[Guarantee]] = {}
    for guarantee in sorted(guarantees, key=lambda g: not g.comes_first):
        for name in guarantee.weights():
            by_weight.setdefault(name, []).append(guarantee)

    def make(name: str, bound: list[Guarantee]) -> Projection:
        variable = latents[name].value if name in latents else get_variable(model, name)

        def project(done: tf.Tensor) -> None:
            value = variable.value()
            for guarantee in bound:
                value = guarantee.project(name, value)
            variable.assign(value)

        return project

    return [make(name, bound) for name, bound in sorted(by_weight.items())]


def restore(model: tf_keras.Model, guarantees: Sequence[Guarantee]) -> None:
    """Project the weights of ``model``, in place, back to where every guarantee holds."""
    for projection in _guarantee_projections(model, guarantees):
        projection(tf.constant(1.0))


def _optimizer(recovery: Recovery, steps: int) -> tf_keras.optimizers.Optimizer:
    rate: Any = recovery.learning_rate
    if recovery.schedule == "cosine":
        rate = tf_keras.optimizers.schedules.CosineDecay(recovery.learning_rate, steps)
    if recovery.optimizer == "adam":
        return tf_keras.optimizers.Adam(rate)
    return tf_keras.optimizers.SGD(rate, momentum=recovery.momentum, nesterov=recovery.momentum > 0)


class _Watch(tf_keras.callbacks.Callback):
    """Shows progress and stops a training whose loss is no longer a number."""

    def __init__(
        self, steps: int, rate: float, progress: Progress | None, where: str, rate_key: str, also: str
    ) -> None:
        """Begin; ``also``: what else to lower besides the rate, or nothing."""
        super().__init__()
        self._where = where
        self._advice = f"Lower the rate: {rate_key}={rate / 10:g}{also}."
        self.loss = float("nan")
        self.start = 0
        """Steps that were made before."""
        self._steps = steps
        self._progress = progress
        # Reading the loss waits for the step, so it is done a hundred times in all, not at every step.
        self._every = max(1, steps // 100)
        self._supports_tf_logs = True

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        step = self.start + batch + 1
        if step % self._every and step != self._steps:
            return
        self.loss = float((logs or {}).get("loss", float("nan")))
        if not np.isfinite(self.loss):
            raise CompressError(
                self._where,
                expected="a finite loss",
                received=f"{self.loss} at step {step} of {self._steps}",
                fix=self._advice,
            )
        if self._progress is not None:
            self._progress.advance(step, self._steps, f"loss {self.loss:.4f}")
