"""The loss term of soft targets: the student learns the teacher's softened probabilities.

Source: Hinton, Vinyals, Dean (arXiv 1503.02531, section 2): cross-entropy with the teacher at temperature T, multiplied
by T squared, beside the ordinary cross-entropy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from compress.data.source import Data
from compress.strategies.distillation.teacher import Teacher
from compress.training import Batch, gives_probabilities, logits_of


class SoftTargets:
    """The loss term ``soft_weight * T^2 * KL(teacher_T || student_T)``; the task loss gets the rest of the weight.

    Where training images stay the same the teacher runs once over them before training; else it runs inside the
    compiled step, on the very images that the student sees.
    """

    layers: Sequence[str] = ()
    variables: Sequence[tf.Variable] = ()

    def __init__(self, teacher: Teacher, temperature: float, soft_weight: float) -> None:
        self.task_weight = 1.0 - soft_weight
        self.teacher = teacher
        self._probabilities = gives_probabilities(teacher.model)
        self._temperature = temperature
        self._soft_weight = soft_weight
        self._known: tf.Tensor | None = None

    def prepare(self, data: Data, batch_size: int, *, same_images: bool) -> None:
        """Run the teacher over the training part, if its images stay the same."""
        self._known = None
        if same_images:
            outputs = self.teacher.model.predict(data.train.x, batch_size=max(batch_size, 256), verbose=0)
            self._known = logits_of(tf.constant(np.asarray(outputs, np.float32)), self._probabilities)

    def __call__(self, batch: Batch) -> tf.Tensor:
        """Return the weighted divergence, averaged over the batch."""
        if self._known is not None:
            teacher = tf.gather(self._known, batch.indices)
        else:
            teacher = logits_of(self.teacher(batch.inputs)[""], self._probabilities)
        target = tf.nn.log_softmax(teacher / self._temperature)
        student = tf.nn.log_softmax(batch.logits / self._temperature)
        divergence = tf.reduce_sum(tf.exp(target) * (target - student), axis=-1)
        return self._soft_weight * self._temperature**2 * tf.reduce_mean(divergence)
