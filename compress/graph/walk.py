"""Walks through two models of the same structure in step, layer by layer, on a fixed set of samples.

So a layer of the second can be changed to make up for what has become of its inputs, seen beside what the first makes
of the same samples; every layer runs once on each side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from compress.graph.rewrite import nodes

Values = dict[int, np.ndarray]
"""Tensor of the model (its ``id``) -> its values for all samples."""


@dataclass(frozen=True)
class Step:
    """One call of a layer, about to be made on both sides.

    ``inputs``, ``changed_inputs``: its input values in the original and in the changed model.
    """

    position: int
    node: Any
    layer: tf_keras.layers.Layer
    """The layer of the changed model."""
    inputs: list[np.ndarray]
    changed_inputs: list[np.ndarray]

    @property
    def untouched(self) -> bool:
        """Whether the inputs are still those of the original."""
        return all(one is other for one, other in zip(self.inputs, self.changed_inputs, strict=True))


class Walk:
    """The walk. Iterate over it, and change the weights of ``step.layer`` when its step comes."""

    def __init__(self, original: tf_keras.Model, changed: tf_keras.Model, samples: np.ndarray, batch: int = 128):
        self._batch = batch
        self.original, self.changed = original, changed
        self.nodes = [node for node in nodes(original) if not node.is_input]
        self.values: Values = {id(original.inputs[0]): samples}
        self.changed_values: Values = dict(self.values)
        self._last_use = {id(t): place for place, node in enumerate(self.nodes) for t in node.keras_inputs}
        self._last_use.update((id(tensor), len(self.nodes)) for tensor in original.outputs)

    def __iter__(self) -> Iterator[Step]:
        for position, node in enumerate(self.nodes):
            layer = self.changed.get_layer(node.layer.name)
            read = [id(tensor) for tensor in node.keras_inputs]
            step = Step(position, node, layer, [self.values[i] for i in read], [self.changed_values[i] for i in read])
            before = layer.get_weights() if layer.weights else []
            yield step
            same = step.untouched and all(
                np.array_equal(a, b) for a, b in zip(before, layer.get_weights(), strict=True)
            )
            self._store(self.values, node, self.run(node, node.layer, self.values))
            if same:
                for tensor in tf.nest.flatten(node.outputs):
                    self.changed_values[id(tensor)] = self.values[id(tensor)]
            else:
                self._store(self.changed_values, node, self.run(node, layer, self.changed_values))
            for key in set(read):
                if self._last_use.get(key) == position:
                    del self.values[key], self.changed_values[key]

    def silence(self, step: Step, place: int) -> None:
        """Let one of the inputs of this step be zero in the changed network."""
        step.changed_inputs[place] = np.zeros_like(step.changed_inputs[place])
        self.changed_values[id(step.node.keras_inputs[place])] = step.changed_inputs[place]

    def run(self, node: Any, layer: tf_keras.layers.Layer, values: Mapping[int, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs of one call on all samples."""
        count = len(next(iter(values.values())))
        parts = []
        for start in range(0, count, self._batch):

            def given(value: Any, start: int = start) -> Any:
                known = values.get(id(value))
                return value if known is None else tf.constant(known[start : start + self._batch])

            args = tf.nest.map_structure(given, node.call_args)
            kwargs = {name: tf.nest.map_structure(given, value) for name, value in node.call_kwargs.items()}
            if layer._call_spec.expects_training_arg:
                kwargs["training"] = False
            parts.append([np.asarray(output) for output in tf.nest.flatten(layer(*args, **kwargs))])
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]

    def rest(self, position: int, outputs: Sequence[np.ndarray], samples: int) -> np.ndarray:
        """Return the original model's output if, on the first ``samples``, call ``position`` gave ``outputs``."""
        values = {key: value[:samples] for key, value in self.values.items()}
        self._store(values, self.nodes[position], list(outputs))
        for node in self.nodes[position + 1 :]:
            self._store(values, node, self.run(node, node.layer, values))
        return values[id(self.original.outputs[0])]

    @staticmethod
    def _store(values: Values, node: Any, outputs: Sequence[np.ndarray]) -> None:
        values.update((id(t), output) for t, output in zip(tf.nest.flatten(node.outputs), outputs, strict=True))
