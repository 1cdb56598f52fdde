"""Batch norms between the factors: they train better, and the export merges them. Source: Tai et al. (1511.06067)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf
import tf_keras

from compress.graph.rewrite import NewLayer, rewrite

_BATCH = 64


def with_inner_norms(model: tf_keras.Model, layers: Sequence[str], samples: np.ndarray) -> tf_keras.Model:
    """Return the model with a batch norm behind each of the layers.

    Its statistics are those on the samples, and it gives back what it takes away: the outputs stay equal.
    """
    look = tf_keras.Model(model.inputs, [model.get_layer(name).output for name in layers])
    sums = [np.zeros((2, model.get_layer(name).output_shape[-1])) for name in layers]
    for start in range(0, len(samples), _BATCH):
        part = samples[start : start + _BATCH]
        for total, output in zip(sums, tf.nest.flatten(look(part, training=False)), strict=True):
            axes = list(range(output.shape.rank - 1))
            means = np.stack([tf.reduce_mean(output, axes), tf.reduce_mean(output**2, axes)])
            total += means * len(part) / len(samples)
    chains = {}
    for name, (mean, square) in zip(layers, sums, strict=True):
        norm = tf_keras.layers.BatchNormalization(name=f"{name}_norm")
        variance = np.maximum(square - mean**2, 0.0)
        weights = (np.sqrt(variance + norm.epsilon), mean, mean, variance)
        layer = model.get_layer(name)
        same = NewLayer(layer.__class__.from_config(layer.get_config()), tuple(layer.get_weights()))
        chains[name] = [same, NewLayer(norm, tuple(value.astype(np.float32) for value in weights))]
    return rewrite(model, chains)
