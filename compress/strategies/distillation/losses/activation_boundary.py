"""Activation boundaries: which neurons are active at all matters more than how much.

Source: Heo et al. (arXiv 1811.03233): the loss with a margin that stands in for counting boundaries, and the
connector, a 1 x 1 convolution, here without a batch norm behind it. The authors' program divides the sum by 1000: that
is a weight of 0.001 here.
"""

from __future__ import annotations

from typing import Annotated

import tensorflow as tf
from annotated_types import Gt, Le
from pydantic.dataclasses import dataclass

from compress.data.source import STRICT
from compress.strategies.distillation.connector import Connector
from compress.strategies.distillation.loss import PairLoss
from compress.strategies.distillation.pairing import Layers, Pair, pair, stage_pairs


@dataclass(frozen=True, config=STRICT)
class ActivationBoundary(PairLoss):
    """The sum over neurons of ``relu(margin - s)^2`` where the teacher is active, else of ``relu(margin + s)^2``.

    It is summed over the layers, too, and averaged over the batch. ``s`` is the student's response past a connector
    that is trained and starts as the identity where the channels are as many. A neuron of the teacher is active where
    its response is above zero; so the responses are those before the activation. Layers that have their activation
    within (``activation="relu"``) do not show them, and are left out.

    Attributes:
        margin: how far from the boundary the student's responses should lie.
    """

    margin: Annotated[float, Gt(0), Le(1e6)] = 1.0

    name = "activation_boundary"

    def choose(self, teacher: Layers, student: Layers) -> list[Pair]:
        """Take what goes into the activations at the ends of the stages."""
        found = dict.fromkeys(
            (student.before_activation(end.student), teacher.before_activation(end.teacher))
            for end in stage_pairs(teacher, student)
        )
        return [pair(teacher, student, ours, theirs) for ours, theirs in found if ours and theirs]

    def misfit(self, pair: Pair) -> str | None:
        """Maps of one size, or vectors."""
        ours, theirs = pair.student_shape, pair.teacher_shape
        if len(ours) != len(theirs) or len(ours) not in (1, 3) or None in (ours[-1], theirs[-1]):
            return "it compares vectors with vectors, or feature maps with feature maps"
        return None if ours[:-1] == theirs[:-1] else "it needs maps of the same size"

    def connectors(self, pair: Pair, seed: int) -> tuple[Connector | None, Connector | None]:
        """Return the student's connector."""
        kernel = [1] * (len(pair.student_shape) - 1)
        inputs, outputs = int(pair.student_shape[-1] or 0), int(pair.teacher_shape[-1] or 0)
        return Connector(inputs, outputs, seed, kernel=kernel, identity=True), None

    def between(self, student: tf.Tensor, teacher: tf.Tensor) -> tf.Tensor:
        """Return the squared distances from the right side of the boundary."""
        away = tf.nn.relu(tf.where(teacher > 0.0, self.margin - student, self.margin + student))
        return tf.reduce_mean(tf.reduce_sum(away**2, axis=list(range(1, away.shape.rank))))
