"""Deep mutual learning: networks that learn together teach each other; no teacher is trained beforehand.

Source: Zhang, Xiang, Hospedales, Lu (arXiv 1706.00384, equations 4 to 8): the loss of each network is the cross-entropy
with the labels and the mean of the divergences from its peers' probabilities, which count as given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Annotated

import tensorflow as tf
import tf_keras
from annotated_types import Gt, Le, MinLen
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate
from compress.data.source import Data
from compress.errors import CompressError
from compress.graph.grouped import groups_apart
from compress.graph.kernels import kernel_attributes
from compress.graph.scaling import with_fresh_weights
from compress.graph.softmax import without_softmax
from compress.strategies.distillation.student import AGAIN, StudentStrategy
from compress.strategies.strategy import STRICT, Context
from compress.training import Recovery
from compress.training_step import Batch


@dataclass(frozen=True, config=STRICT)
class Mutual(StudentStrategy):
    """Train the student together with peers, all in the same steps; the peers are thrown away afterwards.

    What ``recovery`` says of teachers has no effect here: there are none. In the paper all networks start untrained
    (``student="again"``): a trained student first loses much of what it knows to peers that know nothing.

    Attributes:
        peers: who learns along: names of ``conf/model``, or ``again``, the student's own architecture; all with
            weights as initialised, each by a seed of its own.
        weight: of the divergences, beside the labels.
    """

    peers: Annotated[tuple[str, ...], MinLen(1)] = (AGAIN,)
    weight: Annotated[float, Gt(0), Le(1e6)] = 1.0

    needs_labels = True
    own_method = "finetune"

    @property
    def if_worse(self) -> str | None:
        """A trained student learns from peers that know nothing yet, too."""
        if self.replaces:
            return None
        return "Its peers start untrained, and it learns from them all the while: write student=again, or train longer"

    def models(self) -> Mapping[str, str]:
        """Name the networks that learn."""
        return {**{name: "peers" for name in self.peers if name != AGAIN}, **super().models()}

    def require(self, data: Data, recovery: Recovery, stage: str) -> None:
        """Refuse mixed images."""
        if recovery.mixup:
            raise CompressError(
                f"strategy.{stage}.recovery.mixup",
                expected="images that are not mixed: peers learn from their labels, too",
                received=str(recovery.mixup),
                fix=f"Write strategy.{stage}.recovery.mixup=0.",
            )

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Make student and peers, and train them."""
        context.require_training(self.own_method)
        self.require(context.data, context.recovery, context.stage)
        student = self.student_of(candidate, context)
        peers = [self._peer(name, student.model, context, number) for number, name in enumerate(self.peers, start=1)]
        term = PeerTerm(peers, self.weight, context.recovery.weight_decay)
        plain = context.for_stage(context.stage, recovery=replace(context.recovery, method="finetune"))
        with ExitStack() as stack:
            for peer in peers:
                stack.enter_context(groups_apart(peer))
            return plain.recover(student, terms=[term])

    def _peer(self, name: str, student: tf_keras.Model, context: Context, number: int) -> tf_keras.Model:
        seed = (context.seed + number) % 2**31
        if name == AGAIN:
            return with_fresh_weights(student, seed)
        return context.for_stage(context.stage, seed=seed).untrained(name)


class PeerTerm:
    """The loss term of mutual learning: the student's divergence from its peers, and the whole losses of these."""

    task_weight = 1.0
    layers: Sequence[str] = ()

    def __init__(self, peers: Sequence[tf_keras.Model], weight: float, weight_decay: float) -> None:
        self._peers = self.networks = tuple(without_softmax(peer) for peer in peers)
        self._weight = weight
        self._weight_decay = weight_decay
        self.variables: Sequence[tf.Variable] = [v for peer in peers for v in peer.trainable_variables]

    def prepare(self, data: Data, batch_size: int, *, same_images: bool) -> None:
        """Nothing: the peers run inside the step."""

    def __call__(self, batch: Batch) -> tf.Tensor:
        """Return the sum of what the student's loss gets and of the peers' losses."""
        logits = [batch.logits]
        total = tf.constant(0.0)
        for peer in self._peers:
            outputs = tf.nest.flatten(peer(batch.inputs, training=True))[0]
            logits.append(outputs)
            entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=batch.labels, logits=logits[-1])
            total += tf.reduce_mean(entropy) + self._decay(peer)
            if peer.losses:
                total += tf.add_n(peer.losses)
        learned = [tf.nn.log_softmax(values) for values in logits]
        for place, own in enumerate(learned):
            others = [tf.stop_gradient(other) for index, other in enumerate(learned) if index != place]
            away = [tf.reduce_mean(tf.reduce_sum(tf.exp(other) * (other - own), axis=-1)) for other in others]
            total += self._weight * tf.add_n(away) / len(away)
        return total

    def _decay(self, peer: tf_keras.Model) -> tf.Tensor:
        """Return the term whose gradient is the weight decay of the peer's kernels: the loop does it for its model."""
        kernels = [getattr(layer, name) for layer in peer.layers for name in kernel_attributes(layer)]
        return self._weight_decay * tf.add_n([tf.nn.l2_loss(kernel) for kernel in kernels] or [tf.constant(0.0)])
