"""Batch-norm folding: a normalisation right after a linear layer becomes part of its kernel and bias."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import tf_keras

from compress.graph.rewrite import NewLayer, calls, consumers, rewrite

_FOLDABLE = (tf_keras.layers.Conv1D, tf_keras.layers.Conv2D, tf_keras.layers.DepthwiseConv2D, tf_keras.layers.Dense)


def fold_batch_norm(model: tf_keras.Model, layers: frozenset[str] | None = None) -> tf_keras.Model:
    """Return a copy of the flat ``model`` without the batch norms that follow a linear layer directly.

    A pair is folded if the linear layer has no activation, is called once, and nothing but the
    normalisation reads its output. The outputs in inference mode stay equal up to rounding.

    Args:
        model: a flat functional model.
        layers: names of the linear layers to fold into; all when None.
    """
    replacements: dict[str, list[NewLayer]] = {}
    for name, norm in foldable_pairs(model, layers).items():
        replacements[name] = [_folded(model.get_layer(name), model.get_layer(norm))]
        replacements[norm] = []
    return rewrite(model, replacements)


def foldable_pairs(model: tf_keras.Model, layers: frozenset[str] | None = None) -> dict[str, str]:
    """Return linear layer -> the batch norm that can be folded into it."""
    readers, times = consumers(model), calls(model)
    outputs = {t.node.layer.name for t in model.outputs}
    pairs: dict[str, str] = {}
    for layer in model.layers:
        following = readers[layer.name]
        if (
            # Exactly these: a class derived from one may do something else with its kernel.
            type(layer) in _FOLDABLE
            and (layers is None or layer.name in layers)
            and layer.activation is tf_keras.activations.linear
            and times[layer.name] == 1
            and layer.name not in outputs
            and len(following) == 1
            and isinstance(following[0], tf_keras.layers.BatchNormalization)
            and times[following[0].name] == 1
            and _normalises_channels(following[0], layer)
        ):
            pairs[layer.name] = following[0].name
    return pairs


def _normalises_channels(norm: tf_keras.layers.BatchNormalization, layer: tf_keras.layers.Layer) -> bool:
    axes = [norm.axis] if isinstance(norm.axis, int) else list(norm.axis)
    rank = len(layer.output_shape)
    channels_last = getattr(layer, "data_format", "channels_last") == "channels_last"
    return channels_last and [axis % rank for axis in axes] == [rank - 1]


def _folded(layer: tf_keras.layers.Layer, norm: tf_keras.layers.BatchNormalization) -> NewLayer:
    variance = np.asarray(norm.moving_variance)
    gain = gain_of(norm)
    shift = (np.asarray(norm.beta) if norm.center else 0.0) - np.asarray(norm.moving_mean) * gain
    depthwise = isinstance(layer, tf_keras.layers.DepthwiseConv2D)
    kernel = np.asarray(layer.depthwise_kernel if depthwise else layer.kernel)
    old_bias = np.asarray(layer.bias) if layer.use_bias else np.zeros_like(variance)
    config = {**layer.get_config(), "use_bias": True}
    scaled = kernel * (gain.reshape(kernel.shape[2:]) if depthwise else gain)
    return NewLayer(
        layer.__class__.from_config(config),
        (scaled.astype(kernel.dtype), (old_bias * gain + shift).astype(kernel.dtype)),
    )


def fold_layer_norm(model: tf_keras.Model, bound: Collection[str] = ()) -> tf_keras.Model:
    """Return the flat ``model`` with what each layer norm multiplies with and adds in the Dense layers that read it.

    As the converter does on export. A layer norm is left if it has other readers, or one that is called several times
    or named in ``bound``. The outputs stay equal up to rounding; the model itself is returned if nothing changes.
    """
    readers, times = consumers(model), calls(model)
    outputs = {t.node.layer.name for t in model.outputs}
    replacements: dict[str, list[NewLayer]] = {}
    for norm in model.layers:
        following = readers[norm.name]
        if (
            isinstance(norm, tf_keras.layers.LayerNormalization)
            and (norm.scale or norm.center)
            and list(norm.axis) == [len(norm.output_shape) - 1]
            and times[norm.name] == 1
            and norm.name not in outputs
            and all(
                isinstance(layer, tf_keras.layers.Dense) and times[layer.name] == 1 and layer.name not in bound
                for layer in following
            )
        ):
            config = {**norm.get_config(), "scale": False, "center": False}
            replacements[norm.name] = [NewLayer(norm.__class__.from_config(config))]
            replacements.update((layer.name, [_behind(norm, layer)]) for layer in following)
    return rewrite(model, replacements) if replacements else model


def _behind(norm: tf_keras.layers.LayerNormalization, layer: tf_keras.layers.Dense) -> NewLayer:
    kernel = np.asarray(layer.kernel)
    bias = np.asarray(layer.bias) if layer.use_bias else np.zeros(layer.units, kernel.dtype)
    bias = bias + (np.asarray(norm.beta) @ kernel if norm.center else 0.0)
    scaled = kernel * np.asarray(norm.gamma)[:, None] if norm.scale else kernel
    return NewLayer(layer.__class__.from_config({**layer.get_config(), "use_bias": True}), (scaled, bias))


def folding_gains(model: tf_keras.Model) -> dict[str, np.ndarray]:
    """Return linear layer -> what folding multiplies each output of its kernel with; it spreads over the kernel."""
    gains = {}
    for name, norm in foldable_pairs(model).items():
        layer, gain = model.get_layer(name), gain_of(model.get_layer(norm))
        depthwise = isinstance(layer, tf_keras.layers.DepthwiseConv2D)
        gains[name] = gain.reshape(layer.depthwise_kernel.shape[2:]) if depthwise else gain
    return gains


def gain_of(norm: tf_keras.layers.BatchNormalization) -> np.ndarray:
    """Return what a batch norm multiplies each channel [c] with in inference mode."""
    scale = np.asarray(norm.gamma) if norm.scale else 1.0
    return np.asarray(scale / np.sqrt(np.asarray(norm.moving_variance) + norm.epsilon))


def merged_on_export(model: tf_keras.Model) -> frozenset[str]:
    """Return the layers into whose kernels the TFLite converter merges a normalisation next to them.

    The exported kernel of such a layer is not the one in the model: each channel has a factor of its own.
    """
    merged = set()
    readers = consumers(model)
    for layer in model.layers:
        linear = getattr(layer, "activation", None) is tf_keras.activations.linear
        if linear and any(_scales_channels(reader) for reader in readers[layer.name]):
            merged.add(layer.name)
        exact = isinstance(layer, tf_keras.layers.Dense) or (
            isinstance(layer, (tf_keras.layers.Conv1D, tf_keras.layers.Conv2D))
            and (layer.padding == "valid" or max(layer.kernel_size) == 1)
            and not isinstance(layer, (tf_keras.layers.Conv1DTranspose, tf_keras.layers.Conv2DTranspose))
        )
        if exact and any(_scales_channels(source) for source in _sources(layer)):
            merged.add(layer.name)
    return frozenset(merged)


def _sources(layer: tf_keras.layers.Layer) -> list[tf_keras.layers.Layer]:
    """Return the layers whose values ``layer`` reads, through those that only move values."""
    moving = (tf_keras.layers.Flatten, tf_keras.layers.Reshape, tf_keras.layers.Dropout)
    found = []
    waiting = [parent.layer for node in layer.inbound_nodes for parent in node.parent_nodes]
    while waiting:
        source = waiting.pop()
        if isinstance(source, moving):
            waiting += [parent.layer for node in source.inbound_nodes for parent in node.parent_nodes]
        else:
            found.append(source)
    return found


def _scales_channels(layer: tf_keras.layers.Layer) -> bool:
    if isinstance(layer, tf_keras.layers.Rescaling):
        # One factor for all channels leaves equal weights equal.
        return int(np.size(layer.scale)) > 1
    return isinstance(layer, (tf_keras.layers.BatchNormalization, tf_keras.layers.Normalization))
