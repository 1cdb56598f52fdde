"""Soft targets: the student learns the softened probabilities of its teachers.

Source: Hinton, Vinyals, Dean (arXiv 1503.02531, section 2): cross-entropy with the teacher at temperature T, multiplied
by T squared, beside the ordinary cross-entropy. Here without the teacher's own entropy, which is constant, so that it
is zero where the two agree.
"""

from __future__ import annotations

import tensorflow as tf

from compress.strategies.distillation.loss import LogitsLoss


class SoftTargets(LogitsLoss):
    """``T^2 * KL(teachers_T || student_T)``, the mean over the batch; ``recovery.soft_weight`` is its weight."""

    name = "soft_targets"

    def value(self, logits: tf.Tensor, targets: tf.Tensor, labels: tf.Tensor, temperature: float) -> tf.Tensor:
        """Return the divergence."""
        student = tf.nn.log_softmax(logits / temperature)
        divergence = tf.reduce_sum(tf.exp(targets) * (targets - student), axis=-1)
        return temperature**2 * tf.reduce_mean(divergence)
