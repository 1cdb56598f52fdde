"""Multiply-adds of a flat model, weight by weight: those of layers inside wrappers, cells and attention, too.

What multiplies activations with one another (attention scores, ``Dot``) has no weight and is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf
import tf_keras

from compress.graph.kernels import kernel_attributes, macs_of_call
from compress.graph.rewrite import Shape, positions

_ELEMENTWISE = (tf_keras.layers.Embedding, tf_keras.layers.PReLU)


def weight_macs(model: tf_keras.Model) -> dict[tuple[str, int], int]:
    """Return (layer, position in its ``weights``) -> multiply-adds for one sample, over all calls of the layer."""
    found: dict[tuple[str, int], int] = {}
    for layer, inputs, outputs in positions(model):
        places = {id(weight): index for index, weight in enumerate(layer.weights)}
        for weight, macs in _parts(layer, inputs, outputs):
            key = layer.name, places[id(weight)]
            found[key] = found.get(key, 0) + macs
    return found


def uncounted(model: tf_keras.Model) -> list[str]:
    """Return the layers that multiply by weights of a kind that is not counted."""
    counted = {layer for layer, _ in weight_macs(model)}
    return [
        layer.name
        for layer in model.layers
        if layer.name not in counted
        and not isinstance(layer, _ELEMENTWISE)
        and any(len(weight.shape) > 1 for weight in layer.trainable_weights)
    ]


def _parts(
    layer: tf_keras.layers.Layer, inputs: Sequence[Shape], outputs: Sequence[Shape]
) -> Iterator[tuple[tf.Variable, int]]:
    """Yield the weights that one call multiplies by, and how often in all."""
    kinds = tf_keras.layers
    for attribute in kernel_attributes(layer):
        yield getattr(layer, attribute), macs_of_call(layer, attribute, inputs[0], outputs[0])
    if isinstance(layer, kinds.RNN) and hasattr(layer.cell, "recurrent_kernel"):
        # A convolutional cell multiplies at every place of its map.
        one_map = (1, *outputs[0][2:]) if layer.return_sequences else outputs[0]
        for weight in (layer.cell.kernel, layer.cell.recurrent_kernel):
            yield weight, _size(weight) * (inputs[0][1] or 1) * (_places(one_map) if len(weight.shape) > 2 else 1)
    elif isinstance(layer, kinds.Bidirectional):
        for inner in (layer.forward_layer, layer.backward_layer):
            yield from _parts(inner, inputs, outputs)
    elif isinstance(layer, kinds.TimeDistributed):
        steps = inputs[0][1] or 1
        inner_shapes = ([shape[:1] + shape[2:] for shape in side] for side in (inputs, outputs))
        for weight, macs in _parts(layer.layer, *inner_shapes):
            yield weight, steps * macs
    elif isinstance(layer, kinds.MultiHeadAttention):
        queries, keys = _places(inputs[0]), _places(inputs[min(1, len(inputs) - 1)])
        times = {"_query_dense": queries, "_key_dense": keys, "_value_dense": keys, "_output_dense": queries}
        for name, count in times.items():
            kernel = getattr(layer, name).kernel
            yield kernel, _size(kernel) * count


def _places(shape: Shape) -> int:
    return int(np.prod([size or 1 for size in shape[1:-1]], dtype=np.int64))


def _size(weight: tf.Variable) -> int:
    return int(np.prod(weight.shape))
