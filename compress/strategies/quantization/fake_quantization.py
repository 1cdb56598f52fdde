"""Fake quantization of activations: a model that computes as its integer file will.

Sources: Jacob et al. (arXiv 1712.05877, section 3); the ranges' gradients are those of TensorFlow's operator, scaled as
in Esser et al. (arXiv 1902.08153, section 2.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from compress.graph.rewrite import call_name, calls, rewrite
from compress.strategies.quantization.quantizers import paced


class FakeQuantize(tf_keras.layers.Layer):
    """Rounds to the levels between ``low`` and ``high``, which are trained; for training only, never saved.

    ``point``: the call whose output it rounds.
    """

    rounds_only = True

    def __init__(self, point: str, low: float, high: float, bits: int) -> None:
        super().__init__(name=f"{point.replace(':', '_call')}_range")
        self.point = point
        self.low = tf.Variable(low, dtype=tf.float32, name="low")
        self.high = tf.Variable(high, dtype=tf.float32, name="high")
        self._bits = bits

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Return the nearest levels."""
        # Their gradients are sums over all the values that are cut off. Slowed as those of learned steps are.
        pace = 1.0 / np.sqrt(np.prod([size or 1 for size in inputs.shape[1:]]) * (2**self._bits - 1))
        low, high = paced(self.low, pace), paced(self.high, pace)
        return tf.quantization.fake_quant_with_min_max_vars(inputs, low, high, self._bits)


Range = tuple[float, float]


def with_fake_quantization(
    model: tf_keras.Model, ranges: Mapping[str, Range], tied: Mapping[str, str], bits: int = 8
) -> tf_keras.Model:
    """Return a copy of the model in which what the named calls of layers give is rounded wherever it is read.

    Args:
        model: a flat functional model.
        ranges: call -> the range of its output.
        tied: call -> the call of ``ranges`` whose range its output is rounded in.
        bits: of an activation.
    """
    known: dict[int, Any] = {}
    layers = {name: FakeQuantize(name, low, high, bits) for name, (low, high) in ranges.items()}

    def rounded(value: Any) -> Any:
        # The copy's layers are called in the order in which the model's calls are counted.
        made = getattr(value, "_keras_history", None)
        name = "" if made is None else call_name(made.layer.name, made.node_index)
        layer = layers.get(tied.get(name, name))
        if layer is None:
            return value
        if id(value) not in known:
            # The tensor is kept, too: another one must not get its id.
            known[id(value)] = (layer(value), value)
        return known[id(value)][0]

    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[:] = tf.nest.map_structure(rounded, args)
        kwargs.update({name: tf.nest.map_structure(rounded, value) for name, value in kwargs.items()})

    edits = {(layer, call): edit for layer, times in calls(model).items() for call in range(times)}
    return rewrite(model, arguments=edits)


def trained_ranges(model: tf_keras.Model) -> dict[str, Range]:
    """Return call -> range, from a model of :func:`with_fake_quantization`."""
    layers = (layer for layer in model.layers if isinstance(layer, FakeQuantize))
    return {layer.point: (float(layer.low), float(layer.high)) for layer in layers}
