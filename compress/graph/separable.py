"""Separable convolutions as the two convolutions that they are."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import tf_keras

from compress.graph.rewrite import NewLayer, rewrite


def split_separable(model: tf_keras.Model, left: Collection[str] = ()) -> tuple[tf_keras.Model, dict[str, str]]:
    """Return the flat ``model`` with a depthwise and a pointwise layer for each SeparableConv2D, and their names.

    The pointwise layer keeps the name. Layers named in ``left``, and those whose second name is taken, stay.

    Returns:
        The model (itself if nothing changes), and pointwise layer -> depthwise layer.
    """
    taken = {layer.name for layer in model.layers}
    halves = {
        layer.name: f"{layer.name}_depthwise"
        for layer in model.layers
        if isinstance(layer, tf_keras.layers.SeparableConv2D)
        and layer.name not in left
        and f"{layer.name}_depthwise" not in taken
    }
    replacements = {name: _halves(model.get_layer(name), depthwise) for name, depthwise in halves.items()}
    return (rewrite(model, replacements) if replacements else model), halves


def _halves(layer: tf_keras.layers.SeparableConv2D, name: str) -> list[NewLayer]:
    depthwise = tf_keras.layers.DepthwiseConv2D(
        layer.kernel_size,
        strides=layer.strides,
        padding=layer.padding,
        depth_multiplier=layer.depth_multiplier,
        data_format=layer.data_format,
        dilation_rate=layer.dilation_rate,
        use_bias=False,
        name=name,
    )
    pointwise = tf_keras.layers.Conv2D(
        layer.filters,
        1,
        data_format=layer.data_format,
        activation=layer.activation,
        use_bias=layer.use_bias,
        name=layer.name,
    )
    bias = (np.asarray(layer.bias),) if layer.use_bias else ()
    return [
        NewLayer(depthwise, (np.asarray(layer.depthwise_kernel),)),
        NewLayer(pointwise, (np.asarray(layer.pointwise_kernel), *bias)),
    ]
