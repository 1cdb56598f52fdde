"""The teacher of a distillation: one forward pass for all terms of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from compress.graph.fold import fold_batch_norm


class Teacher:
    """A model that is only looked at. Its batch norms are folded: without them it answers in less time."""

    def __init__(self, model: tf_keras.Model) -> None:
        self.model = fold_batch_norm(model)
        self._layers: list[str] = []
        self._look = self.model
        self._seen: dict[Any, dict[str, tf.Tensor]] = {}

    def show(self, layers: Sequence[str]) -> None:
        """Give the outputs of these layers, too; called before training."""
        self._layers = list(dict.fromkeys([*self._layers, *layers]))
        tensors = [self.model.get_layer(name).output for name in self._layers]
        self._look = tf_keras.Model(self.model.inputs, [*self.model.outputs, *tensors])
        self._seen = {}

    def __call__(self, inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        """Return the outputs of the layers shown, by name, and those of the model under the empty name.

        Terms that ask for the same tensor within a compiled step share one pass.
        """
        if inputs.ref() not in self._seen:
            first, *others = tf.nest.flatten(self._look(inputs, training=False))
            named = zip(self._layers, others[len(others) - len(self._layers) :], strict=True)
            outputs = {"": first, **dict(named)}
            self._seen = {inputs.ref(): {name: tf.stop_gradient(value) for name, value in outputs.items()}}
        return self._seen[inputs.ref()]
