"""The teacher of a distillation: one forward pass for all terms; one for all epochs where images stay the same."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from compress.data.source import Data
from compress.data.untuned import in_batches
from compress.graph.fold import fold_batch_norm, foldable_pairs
from compress.graph.softmax import without_softmax
from compress.strategies.distillation.pairing import Layers
from compress.training_step import Batch

_LOG = logging.getLogger("compress")
_MOST_BYTES = 256_000_000
"""What the outputs for the whole training part may take; above that the teacher runs in every step."""
_LEAST_BATCH = 256

Keep = Callable[[str, str, Callable[[], dict[str, np.ndarray]]], dict[str, np.ndarray]]
"""Returns what the callable makes; what it made before for the same digest (first) is read from the disk.

The second is what it is, for people.
"""


def keep_nothing(_digest: str, _what: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Make it."""
    return make()


class Teacher:
    """A model that is only looked at, without a softmax at its end: what it gives are logits.

    Its batch norms are folded: without them it answers in less time.
    """

    def __init__(self, model: tf_keras.Model) -> None:
        self._given = model
        self._foldable = foldable_pairs(model)
        self.model = without_softmax(fold_batch_norm(model))
        self.keep: Keep = keep_nothing
        self._folded = {norm: linear for linear, norm in self._foldable.items()}
        self._layers: list[str] = []
        self._look = self.model
        self._seen: dict[Any, dict[str, tf.Tensor]] = {}
        self._ready = False
        self._images: np.ndarray | None = None
        self._known: dict[str, tf.Tensor] | None = None

    @cached_property
    def layers(self) -> Layers:
        """The layers that can be looked at."""
        return Layers(self.model, self._folded)

    def unfold(self, layers: Collection[str]) -> None:
        """Leave these layers as they are in the model given, so that they show what they give themselves."""
        if not set(self._folded.values()) & set(layers):
            return
        folded = frozenset(self._folded.values()) - set(layers)
        self.model = without_softmax(fold_batch_norm(self._given, folded))
        self._folded = {norm: linear for linear, norm in self._foldable.items() if linear in folded}
        self.__dict__.pop("layers", None)
        self.show(())

    def show(self, layers: Sequence[str]) -> None:
        """Give the outputs of these layers, too; called before training."""
        self._layers = list(dict.fromkeys([*self._layers, *layers]))
        tensors = [self.model.get_layer(name).output for name in self._layers]
        self._look = tf_keras.Model(self.model.inputs, [*self.model.outputs, *tensors])
        self._ready, self._seen = False, {}

    def prepare(self, data: Data, batch_size: int, *, same_images: bool) -> None:
        """Run once over the training part, if its images stay the same and the outputs do not take too much room.

        Else the teacher runs inside the compiled step, on the very images that the student sees. Terms that share a
        teacher may all call it.
        """
        images = data.train.x if same_images else None
        if self._ready and images is self._images:
            return
        self._ready, self._images, self._known, self._seen = True, images, None, {}
        if images is None:
            return
        sizes = [tensor.shape[1:].num_elements() for tensor in self._look.outputs]
        needed = float("inf") if None in sizes else 4.0 * len(images) * sum(sizes)
        if needed > _MOST_BYTES:
            _LOG.info("the teacher runs in every step: all its outputs would take %.0f MB", needed / 1e6)
            return
        what = f"teacher outputs of {self.model.name}"
        made = self.keep(self._digest(images), what, lambda: self._outputs(images, batch_size))
        self._known = {name: tf.constant(value) for name, value in made.items()}

    def __call__(self, batch: Batch) -> dict[str, tf.Tensor]:
        """Return the outputs of the layers shown, by name, and those of the model under the empty name.

        Terms that ask for the same batch within a compiled step share one pass.
        """
        key = (batch.inputs if self._known is None else batch.indices).ref()
        if key not in self._seen:
            if self._known is None:
                outputs = self._named(tf.nest.flatten(self._look(batch.inputs, training=False)))
            else:
                outputs = {name: tf.gather(value, batch.indices) for name, value in self._known.items()}
            self._seen = {key: {name: tf.stop_gradient(value) for name, value in outputs.items()}}
        return self._seen[key]

    def _named(self, outputs: Sequence[Any]) -> dict[str, Any]:
        first, *others = outputs
        named = zip(self._layers, others[len(others) - len(self._layers) :], strict=True)
        return {"": first, **dict(named)}

    def _outputs(self, x: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
        batch = self._look.inputs[0].shape[0] or max(batch_size, _LEAST_BATCH)
        outputs = self._look.predict(in_batches(x, batch), verbose=0)
        return {name: np.asarray(value, np.float32) for name, value in self._named(tf.nest.flatten(outputs)).items()}

    def _digest(self, x: np.ndarray) -> str:
        """Return a digest of all that decides the outputs: network, weights, layers looked at, images.

        Names are left out: Keras counts layers without a name of their own through a whole process.
        """
        numbers = {layer.name: str(number) for number, layer in enumerate(self.model.layers)}
        network = self.model.to_json()
        for name, number in (*numbers.items(), (self.model.name, "model")):
            network = network.replace(json.dumps(name), json.dumps(number))
        looked_at = [(name, numbers[name]) for name in self._layers]
        digest = hashlib.sha256(repr((tf.__version__, looked_at, x.shape, x.dtype.str)).encode())
        digest.update(network.encode())
        for weight in self.model.get_weights():
            digest.update(np.ascontiguousarray(weight).data)
        digest.update(np.ascontiguousarray(x).data)
        return digest.hexdigest()
