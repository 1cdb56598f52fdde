"""One step of the one training loop: forward pass, losses, gradients, update, projections, in one compiled function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import tensorflow as tf
import tf_keras

from compress.batches import mix
from compress.data.source import NO_LABEL, Data
from compress.distribution.replicas import Distribution, mean_over_replicas
from compress.graph.kernels import kernel_attributes

Projection = Callable[[tf.Tensor], None]
"""Changes weights in place after a step; receives the training done so far as a fraction in (0, 1]."""


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


@runtime_checkable
class BoundedQuantizer(WeightQuantizer, Protocol):
    """A quantizer of weights that are clipped after every step."""

    limit: float
    """How far from zero they may be."""


@dataclass(frozen=True)
class Latent:
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
        """Quantize the value into the network, clipped where the quantizer wants it."""
        if isinstance(self.quantizer, BoundedQuantizer):
            self.value.assign(tf.clip_by_value(self.value, -self.quantizer.limit, self.quantizer.limit))
        self.weight.assign(self.quantizer(self.value.value()))


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


class Trainee(tf_keras.Model):
    """The model under training: ``fit`` with our training step."""

    def setup(
        self,
        *,
        steps: int,
        projections: Sequence[Projection],
        labelled: bool,
        terms: Sequence[LossTerm],
        tapped: Sequence[str],
        latents: Sequence[Latent],
        weight_decay: float,
        clip_norm: float | None,
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
            "clip_norm": clip_norm,
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
        if plan["clip_norm"] is not None:
            # Where factors follow each other without a batch norm one long step leads to a longer one.
            # Source: Pascanu et al. (arXiv 1211.5063), algorithm 1.
            gradients, _ = tf.clip_by_global_norm(gradients, plan["clip_norm"])
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
