"""Decoupled knowledge distillation: the label's probability, and how the others are shared out, each with its weight.

Source: Zhao et al. (arXiv 2203.08679, equations 6 and 7): Hinton's divergence is the binary one between the label's
class and all others (TCKD), plus the one among the other classes (NCKD) times the teacher's probability of these; here
this factor, which is small where the teacher is sure, is a constant.
"""

from __future__ import annotations

from typing import Annotated

import tensorflow as tf
from annotated_types import Ge, Le
from pydantic.dataclasses import dataclass

from compress.data.source import STRICT
from compress.strategies.distillation.loss import LogitsLoss

_FAR = 1e4
"""Subtracted from a logit, it leaves nothing of the class."""


@dataclass(frozen=True, config=STRICT)
class Decoupled(LogitsLoss):
    """``T^2 * (alpha * TCKD + beta * NCKD)``, the mean over the batch.

    Of a sample without a label, all classes are other ones.

    Attributes:
        alpha: weight of the divergence between the label's class and all others.
        beta: weight of the divergence among the others; the paper takes 1 to 10, 8 most often.
    """

    alpha: Annotated[float, Ge(0), Le(1e6)] = 1.0
    beta: Annotated[float, Ge(0), Le(1e6)] = 8.0

    name = "decoupled"

    def value(self, logits: tf.Tensor, targets: tf.Tensor, labels: tf.Tensor, temperature: float) -> tf.Tensor:
        """Return both divergences, weighted."""
        label = tf.one_hot(labels, tf.shape(logits)[-1])
        student = tf.nn.log_softmax(logits / temperature)
        # Log-probabilities of the label's class and of all others together: [b, 2].
        two, two_wanted = (
            tf.stack([tf.reduce_sum(label * known, -1), tf.reduce_logsumexp(known - _FAR * label, -1)], -1)
            for known in (student, targets)
        )
        others, others_wanted = (tf.nn.log_softmax(known - _FAR * label) for known in (student, targets))
        target_class = tf.reduce_sum(tf.exp(two_wanted) * (two_wanted - two), -1)
        other_classes = tf.reduce_sum(tf.exp(others_wanted) * (others_wanted - others), -1)
        return temperature**2 * tf.reduce_mean(self.alpha * target_class + self.beta * other_classes)
