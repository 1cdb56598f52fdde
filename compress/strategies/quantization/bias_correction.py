"""Bias correction: the mean error that rounded weights make is taken out of the biases.

Source: Nagel et al., Data-Free Quantization (arXiv 1906.04721, section 4.2, equation 14), with measured means.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import tensorflow as tf
import tf_keras

from compress.graph.kernels import Kernel, kernels
from compress.graph.rewrite import calls, copy_model


def correct_biases(
    model: tf_keras.Model, samples: np.ndarray, rounded: Collection[str], bits: int = 8, *, per_tensor: bool = False
) -> tf_keras.Model:
    """Return a copy whose biases make up for rounding kernels to the nearest of ``bits`` bits.

    A layer is linear in its input, so the mean of its error is the error of the mean input: one pass over the samples.

    Args:
        model: a flat functional model without batch norms behind linear layers.
        samples: unlabelled inputs [n, ...].
        rounded: names of the kernels that will be rounded; the biases of other layers are left alone.
        bits: of a weight.
        per_tensor: round each kernel to one grid instead of one for each output.
    """
    result = copy_model(model)
    chosen = correctable(result, rounded)
    if not chosen:
        return result
    look = tf_keras.Model(model.inputs, [model.get_layer(kernel.layer.name).input for kernel in chosen])
    means = [np.zeros((1, *tensor.shape[1:])) for tensor in look.outputs]
    for start in range(0, len(samples), 128):
        part = tf.nest.flatten(look(samples[start : start + 128], training=False))
        for mean, value in zip(means, part, strict=True):
            mean += np.asarray(value, np.float64).sum(0, keepdims=True) / len(samples)
    for kernel, mean in zip(chosen, means, strict=True):
        error = _linear(kernel, _rounding_error(kernel, bits, None if per_tensor else kernel.inner_axes), mean)
        kernel.layer.bias.assign(np.asarray(kernel.layer.bias) - error)
    return result


def correctable(model: tf_keras.Model, rounded: Collection[str]) -> list[Kernel]:
    """Return those of the kernels named in ``rounded`` whose layers have a bias that can make up for the rounding."""
    times = calls(model)
    # A separable layer has two kernels, and no place for a bias between them.
    return [
        kernel
        for kernel in kernels(model)
        if kernel.name in rounded
        and times[kernel.layer.name] == 1
        and kernel.layer.use_bias
        and not hasattr(kernel.layer, "pointwise_kernel")
    ]


def _rounding_error(kernel: Kernel, bits: int, together: tuple[int, ...] | None) -> np.ndarray:
    """Return what rounding adds to the kernel, whose weights along the axes ``together`` share a step (None: all)."""
    most = 2 ** (bits - 1) - 1
    steps = np.maximum(np.abs(kernel.value).max(together, keepdims=True), 1e-12) / most
    return np.asarray(np.rint(kernel.value / steps) * steps - kernel.value)


def _linear(kernel: Kernel, value: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return what the layer would give on average, [outputs], had it this kernel and no bias."""
    config = {**kernel.layer.get_config(), "use_bias": False, "activation": "linear"}
    layer = kernel.layer.__class__.from_config(config)
    layer.build(mean.shape)
    getattr(layer, kernel.attribute).assign(value)
    output = np.asarray(layer(tf.constant(mean, tf.float32)))
    channels = len(np.asarray(kernel.layer.bias))
    first = getattr(kernel.layer, "data_format", "channels_last") == "channels_first" and output.ndim > 2
    return np.asarray((np.moveaxis(output, 1, -1) if first else output).reshape(-1, channels).mean(0))
