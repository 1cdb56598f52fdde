"""Hints: the student's inner layers learn to give what the teacher's do.

Source: Romero et al., FitNets (arXiv 1412.6550, equation 3), here without a regressor, between layers of one shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf
import tf_keras

from compress.data.source import Data
from compress.graph.rewrite import calls
from compress.strategies.distillation.teacher import Teacher
from compress.training import Batch


class Hints:
    """The loss term ``weight * sum over layers of |student - teacher|^2 / variance of the teacher``.

    Each layer counts alike, whatever the size of its values.
    """

    task_weight = 1.0
    variables: Sequence[tf.Variable] = ()

    def __init__(self, teacher: Teacher, layers: Sequence[str], weight: float) -> None:
        self.layers: Sequence[str] = layers
        self._teacher = teacher
        self._weight = weight
        teacher.show(layers)

    def prepare(self, data: Data, batch_size: int, *, same_images: bool) -> None:
        """Nothing: the teacher runs inside the step."""

    def __call__(self, batch: Batch) -> tf.Tensor:
        """Return the weighted sum."""
        wanted = self._teacher(batch.inputs)
        total = tf.constant(0.0)
        for name in self.layers:
            target = wanted[name]
            axes = list(range(target.shape.rank - 1))
            spread = tf.reduce_mean(tf.math.reduce_variance(target, axes))
            total += tf.reduce_mean((batch.features[name] - target) ** 2) / tf.maximum(spread, 1e-12)
        return self._weight * total


def hint_layers(teacher: tf_keras.Model, student: tf_keras.Model) -> tuple[str, ...]:
    """Return the layers that both have under one name, where the network's parts end: sums of residual blocks.

    Without any, the last layer at each size of the maps.
    """
    names = {layer.name: layer for layer in teacher.layers}
    once = calls(student)
    shared = [
        layer
        for layer in student.layers
        if layer.name in names
        and once.get(layer.name) == 1
        and isinstance(layer.output_shape, tuple)
        and len(layer.output_shape) == 4
        and names[layer.name].output_shape == layer.output_shape
        # The teacher's are folded away.
        and not isinstance(layer, tf_keras.layers.BatchNormalization)
    ]
    sums = tuple(layer.name for layer in shared if isinstance(layer, tf_keras.layers.Add))
    return sums or tuple({layer.output_shape[1:3]: layer.name for layer in shared}.values())
