"""A look at what a network computes on its calibration samples, before a stage builds on it."""

from __future__ import annotations

import numpy as np
import tensorflow as tf
import tf_keras

from compress.candidate import Candidate
from compress.data.source import Data
from compress.deploy.conversion import calibration_samples, check_calibration, refuse_overflow
from compress.graph.rewrite import nodes

_BATCH = 64
_NUMBERS = 2**26
"""Activations of all layers that are held at once."""


def check_activations(candidate: Candidate, data: Data, images: int) -> None:
    """Refuse a network that ranges of activations cannot be taken from.

    Args:
        candidate: its model runs once over its calibration samples.
        data: where they come from if it has none of its own.
        images: how many samples, at most.

    Raises:
        CompressError: if the samples are of no use, or naming the first layer whose output is not finite on them.
    """
    samples = [sample for (sample,) in calibration_samples(candidate, data, images)]
    check_calibration([sample] for sample in samples)
    model = candidate.model
    outputs = [
        (node.layer.name, tensor)
        for node in nodes(model)
        if not node.is_input
        for tensor in tf.nest.flatten(node.outputs)
        if tensor.dtype.is_floating
    ]
    look = tf_keras.Model(model.inputs, [tensor for _, tensor in outputs])
    numbers = sum(int(np.prod([size or 1 for size in tensor.shape[1:]])) for _, tensor in outputs)
    batch = model.inputs[0].shape[0] or max(1, min(_BATCH, _NUMBERS // max(numbers, 1)))
    lows, highs = np.full(len(outputs), np.inf), np.full(len(outputs), -np.inf)
    for start in range(0, len(samples), batch):
        values = tf.nest.flatten(look(np.concatenate(samples[start : start + batch]), training=False))
        # Unlike TensorFlow's, NumPy's smallest and largest of numbers with a NaN among them are NaN.
        lows = np.minimum(lows, [np.min(value) for value in values])
        highs = np.maximum(highs, [np.max(value) for value in values])
    for (layer, _), low, high in zip(outputs, lows, highs, strict=True):
        refuse_overflow(layer, low, high)
