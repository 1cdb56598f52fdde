"""The one training loop: task loss + extra loss terms + projections after every step.

Every strategy that recovers accuracy does it here. The loop is ``tf_keras``' own ``fit`` with a training
step that adds the extra terms to the loss and applies the projections to the weights, all in one compiled
function; so it costs what ``fit`` costs.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import tensorflow as tf
import tf_keras
from annotated_types import Ge, Gt, Le, Lt
from pydantic.dataclasses import dataclass as checked_dataclass

from compress.batches import mix, training_batches
from compress.candidate import Guarantee
from compress.checkpoints import Checkpoint, Resumable, draws_by_step
from compress.data.source import NO_LABEL, STRICT, Augmentation, Data
from compress.distribution.norms import refuse_own_statistics, synchronised
from compress.distribution.replicas import SINGLE, Distribution, mean_over_replicas
from compress.errors import CompressError
from compress.graph.grouped import groups_apart
from compress.graph.kernels import get_variable, kernel_attributes
from compress.graph.softmax import linear_ending, logits_tensor
from compress.progress import Progress

Projection = Callable[[tf.Tensor], None]
"""Changes weights in place after a step; receives the training done so far as a fraction in (0, 1]."""


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
class Batch:
    """What a loss term sees of one step: inputs, labels [b], the model's logits [b, classes], sample indices [b].

    A mixed sample has its own label and index here, not its partner's.
    """

    inputs: tf.Tensor
    labels: tf.Tensor
    logits: tf.Tensor
    indices: tf.Tensor
    features: Mapping[str, tf.Tensor] = field(default_factory=dict)
    """Layer -> its output, for the layers that the terms have asked for."""


class LossTerm(Protocol):
    """An extra term of the loss."""

    task_weight: float
    """What the task loss is multiplied with beside this term."""
    layers: Sequence[str]
    """Layers of the trained model whose outputs it reads."""
    variables: Sequence[tf.Variable]
    """What else training changes: those of the term's own."""

    def prepare(self, data: Data, batch_size: int, *, same_images: bool) -> None:
        """Get ready for training on ``data``: called once, outside the compiled step.

        Args:
            data: the data; a term reads its training part only.
            batch_size: samples of a step.
            same_images: whether each epoch shows the stored samples themselves, so that ``Batch.indices`` name them.
        """

    def __call__(self, batch: Batch) -> tf.Tensor:
        """Return the scalar that is added to the loss."""


class WeightQuantizer(Protocol):
    """Makes the weights that the network computes with out of the ones that training changes."""

    variables: list[tf.Variable]
    """What else training changes: steps, scales."""

    def __call__(self, latent: tf.Tensor) -> tf.Tensor:
        """Return the quantized weights; its gradients are those that training is to use."""


@dataclass(frozen=True)
class _Latent:
    """A weight under quantization: the network holds ``quantizer(value)``."""

    weight: tf.Variable
    value: tf.Variable
    quantizer: WeightQuantizer

    def gradients(self, gradient: tf.Tensor) -> list[tuple[tf.Tensor, tf.Variable]]:
        """Return the gradients of what training changes, from that of the quantized weight."""
        variables = [self.value, *self.quantizer.variables]
        with tf.GradientTape() as tape:
            quantized = self.quantizer(self.value.value())
        return list(zip(tape.gradient(quantized, variables, output_gradients=gradient), variables, strict=True))

    def write(self) -> None:
        """Quantize the value into the network."""
        self.weight.assign(self.quantizer(self.value.value()))


@dataclass(frozen=True)
class History:
    """What a training run did."""

    steps: int
    images: int
    seconds: float
    loss: float

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
        latents[name] = _Latent(weight, tf.Variable(weight, name=f"{name}_latent"), quantizer)
        latents[name].write()
    trainee = _Trainee(model.inputs, [logits_tensor(model), *tensors], name=model.name)
    trainee.setup(
        steps=steps,
        projections=[*projections, *_guarantee_projections(model, guarantees, latents)],
        labelled=bool(data.train.y.min() > NO_LABEL),
        terms=terms,
        tapped=tapped,
        latents=list(latents.values()),
        weight_decay=recovery.weight_decay,
        mixup=recovery.mixup,
        seed=seed,
        batch_size=batch_size,
        distribution=distribution,
    )
    # A compiled loss would be added to ours; the loop's loss is `_Trainee.train_step`'s own.
    trainee.compile(optimizer=_optimizer(recovery, steps))
    started = time.perf_counter()
    watch = _Watch(steps, recovery.learning_rate, progress, where, rate_key)
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


def task_loss(labels: tf.Tensor, logits: tf.Tensor, ratio: tf.Tensor | None, *, labelled: bool) -> tf.Tensor:
    """Return the mean cross-entropy with the labels [b], or of mixed samples with their own and their partners'.

    Unless all are ``labelled`` the samples without a label are left out of the mean; of none it is 0.
    Where replicas share a batch, the mean of what they return is that of the batch.
    """
    parts = [(labels, 1.0)] if ratio is None else [(labels, ratio), (labels[::-1], 1.0 - ratio)]
    if labelled:
        weights, known = [share for _, share in parts], [own for own, _ in parts]
    else:
        weights = [share * tf.cast(own > NO_LABEL, tf.float32) for own, share in parts]
        known = [tf.maximum(own, 0) for own, _ in parts]
    losses = tf.add_n(
        [
            weight * tf.nn.sparse_softmax_cross_entropy_with_logits(labels=own, logits=logits)
            for own, weight in zip(known, weights, strict=True)
        ]
    )
    if labelled:
        return tf.reduce_mean(losses)
    return tf.math.divide_no_nan(tf.reduce_sum(losses), mean_over_replicas(tf.reduce_sum(tf.add_n(weights))))


class _Trainee(tf_keras.Model):
    """The model under training: ``fit`` with our training step."""

    def setup(
        self,
        *,
        steps: int,
        projections: Sequence[Projection],
        labelled: bool,
        terms: Sequence[LossTerm],
        tapped: Sequence[str],
        latents: Sequence[_Latent],
        weight_decay: float,
        mixup: float,
        seed: int,
        batch_size: int,
        distribution: Distribution,
    ) -> None:
        """Set what the step needs; wrapped, so that Keras does not track any of it."""
        decayed = [getattr(layer, name) for layer in self.layers for name in kernel_attributes(layer)]
        self._plan: Callable[[], dict[str, Any]] = lambda: {
            "steps": steps,
            "projections": projections,
            "labelled": labelled,
            "terms": terms,
            "tapped": tapped,
            "latents": {latent.weight.ref(): latent for latent in latents},
            "decayed": decayed,
            "weight_decay": weight_decay,
            "mixup": mixup,
            "seed": seed,
            "batch_size": batch_size,
            "distribution": distribution,
        }

    def train_step(self, data: tuple[tf.Tensor, tf.Tensor, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Make one step: forward, loss, gradients, update, projections."""
        loss, *gradients = self._loss_and_gradients(data)
        self._update(gradients)
        return {"loss": loss}

    def make_train_function(self, force: bool = False) -> Callable[[Any], dict[str, tf.Tensor]]:
        """Return the compiled step; where a batch is shared, the replicas' gradients are summed before one update."""
        distribution = self._plan()["distribution"]
        if not distribution.divided:
            return super().make_train_function(force)  # type: ignore[no-any-return]

        def step(batches: Any) -> dict[str, tf.Tensor]:
            loss, *gradients = distribution.summed(self._loss_and_gradients, next(batches))
            self._update(gradients)
            self._train_counter.assign_add(1)
            return {"loss": loss}

        self.train_function = tf.function(step, reduce_retracing=True)
        return self.train_function  # type: ignore[no-any-return]

    def _loss_and_gradients(self, data: tuple[tf.Tensor, tf.Tensor, tf.Tensor]) -> list[tf.Tensor | None]:
        """Return the loss, and its gradient by each of :meth:`_trained`, of what a replica adds to the mean."""
        plan = self._plan()
        distribution = plan["distribution"]
        inputs, labels, indices = data
        ratio = None
        if plan["mixup"]:
            seed = tf.stack([tf.constant(plan["seed"], tf.int64), self.optimizer.iterations])
            inputs, ratio = mix(inputs, plan["mixup"], seed, distribution.part(plan["batch_size"]))
        with tf.GradientTape() as tape:
            outputs = tf.nest.flatten(self(inputs, training=True))
            logits, *tapped = outputs
            features = dict(zip(plan["tapped"], tapped, strict=True))
            loss = math.prod(term.task_weight for term in plan["terms"]) * task_loss(
                labels, logits, ratio, labelled=plan["labelled"]
            )
            for term in plan["terms"]:
                loss += term(Batch(inputs, labels, logits, indices, features))
            total = distribution.share(tf.add_n([loss, *self.losses]) if self.losses else loss)
        return [distribution.share(loss), *tape.gradient(total, self._trained())]

    def _trained(self) -> list[tf.Variable]:
        """Return what training changes."""
        return [*self.trainable_variables, *(variable for term in self._plan()["terms"] for variable in term.variables)]

    def _update(self, gradients: Sequence[tf.Tensor | None]) -> None:
        """Change the weights by the gradients of the whole batch, and restore what projections keep."""
        plan = self._plan()
        updates: list[tuple[tf.Tensor, tf.Variable]] = []
        decayed = {v.ref() for v in plan["decayed"]} if plan["weight_decay"] else set()
        for gradient, variable in zip(gradients, self._trained(), strict=True):
            latent = plan["latents"].get(variable.ref())
            own = [(gradient, variable)] if gradient is None or latent is None else latent.gradients(gradient)
            if gradient is not None and variable.ref() in decayed:
                (first, trained), *rest = own
                own = [(first + plan["weight_decay"] * trained, trained), *rest]
            updates += own
        # They are summed. What the optimizer would do for it keeps every compiled step alive for good: TensorFlow never
        # forgets the gradient of a reduction.
        self.optimizer.apply_gradients(updates, skip_gradients_aggregation=True)
        done = tf.cast(self.optimizer.iterations, tf.float32) / plan["steps"]
        for projection in plan["projections"]:
            projection(done)
        for latent in plan["latents"].values():
            latent.write()


def _guarantee_projections(
    model: tf_keras.Model, guarantees: Sequence[Guarantee], latents: Mapping[str, _Latent] = MappingProxyType({})
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

    def __init__(self, steps: int, rate: float, progress: Progress | None, where: str, rate_key: str) -> None:
        super().__init__()
        self._where = where
        self._advice = f"Lower the rate: {rate_key}={rate / 10:g}."
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
