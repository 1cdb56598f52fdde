"""Grouped convolutions and shuffled channels, in layers that train and run fast."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras

from compress.errors import CompressError

layers = tf_keras.layers


def grouped_convolution(x: Any, filters: int, groups: int, name: str, size: int = 1) -> Any:
    """Return a convolution of ``x`` in ``groups``: one plain layer for each, named ``<name>_1`` and so on.

    Raises:
        CompressError: if the groups do not divide the channels.
    """
    if x.shape[-1] % groups or filters % groups:
        raise CompressError(
            f"layer {name}",
            expected=f"numbers of channels that {groups} groups divide",
            received=f"{x.shape[-1]} channels in, {filters} out",
            fix="Choose other groups, or other numbers of channels.",
        )

    def convolution(x: Any, filters: int, name: str) -> Any:
        return layers.Conv2D(filters, size, padding="same", use_bias=False, name=name)(x)

    if groups == 1:
        return convolution(x, filters, name)
    parts = tf.split(x, groups, axis=-1)
    outputs = [convolution(part, filters // groups, f"{name}_{group}") for group, part in enumerate(parts, start=1)]
    return layers.Concatenate(name=f"{name}_concat")(outputs)


def shuffle_channels(x: Any, groups: int, name: str) -> Any:
    """Return ``x`` with its channels in the order that gives each of ``groups`` some of every group before it."""
    height, width, channels = x.shape[1:]
    x = layers.Reshape((height, width, groups, channels // groups), name=f"{name}_apart")(x)
    x = layers.Permute((1, 2, 4, 3), name=f"{name}_swap")(x)
    return layers.Reshape((height, width, channels), name=f"{name}_together")(x)
