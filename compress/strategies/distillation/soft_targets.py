"""The loss term of soft targets: the student learns the softened probabilities of its teachers.

Source: Hinton, Vinyals, Dean (arXiv 1503.02531, section 2): cross-entropy with the teacher at temperature T, multiplied
by T squared, beside the ordinary cross-entropy. Several teachers are an ensemble: the mean of their probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from compress.data.source import Data
from compress.strategies.distillation.teacher import Teacher
from compress.training import Batch, gives_probabilities, logits_of


class SoftTargets:
    """The loss term ``soft_weight * T^2 * KL(teachers_T || student_T)``; the task loss gets the rest of the weight.

    Where training images stay the same the teachers run once over them before training; else they run inside the
    compiled step, on the very images that the student sees.
    """

    layers: Sequence[str] = ()
    variables: Sequence[tf.Variable] = ()

    def __init__(self, teachers: Sequence[Teacher], temperature: float, soft_weight: float) -> None:
        self.task_weight = 1.0 - soft_weight
        self.teachers = tuple(teachers)
        self._temperature = temperature
        self._soft_weight = soft_weight
        self._known: tf.Tensor | None = None

    def prepare(self, data: Data, batch_size: int, *, same_images: bool) -> None:
        """Run the teachers over the training part, if its images stay the same."""
        self._known = None
        if same_images:
            outputs = [
                teacher.model.predict(data.train.x, batch_size=max(batch_size, 256), verbose=0)
                for teacher in self.teachers
            ]
            self._known = self._targets([tf.constant(np.asarray(values, np.float32)) for values in outputs])

    def __call__(self, batch: Batch) -> tf.Tensor:
        """Return the weighted divergence, averaged over the batch."""
        if self._known is not None:
            target = tf.gather(self._known, batch.indices)
        else:
            target = self._targets([teacher(batch.inputs)[""] for teacher in self.teachers])
        student = tf.nn.log_softmax(batch.logits / self._temperature)
        divergence = tf.reduce_sum(tf.exp(target) * (target - student), axis=-1)
        return self._soft_weight * self._temperature**2 * tf.reduce_mean(divergence)

    def _targets(self, outputs: Sequence[tf.Tensor]) -> tf.Tensor:
        """Return the logarithm of the mean of the teachers' softened probabilities."""
        softened = [
            tf.nn.log_softmax(logits_of(values, gives_probabilities(teacher.model)) / self._temperature)
            for teacher, values in zip(self.teachers, outputs, strict=True)
        ]
        return tf.reduce_logsumexp(tf.stack(softened), axis=0) - float(np.log(len(softened)))
