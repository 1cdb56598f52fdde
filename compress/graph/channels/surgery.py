"""Surgery: rebuild a model without the channels that go, and compare it with the original, masked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from compress.errors import CompressError
from compress.graph.channels.groups import Channels, cut_axes
from compress.graph.channels.trace import Kept, Mixing
from compress.graph.rewrite import NewLayer, in_float32, rewrite, scaled_inputs


def remove_channels(channels: Channels, stay: np.ndarray) -> tf_keras.Model:
    """Return a copy of the model without the units [count] for which ``stay`` is false.

    Pinned units stay whatever ``stay`` says.

    Raises:
        CompressError: if a layer would have nothing left to read or to write.
    """
    kept = channels.kept(stay | channels.pinned)
    trace, model = channels.trace, channels.model
    for weight in trace.weights.values():
        if any(ids is not None and not kept.of(ids).any() for ids in weight.axes):
            raise CompressError(
                f"layer {weight.layer}",
                expected="at least one channel left to read and to write",
                received=f"a cut that takes all channels of its {weight.attribute}",
                fix="Keep more: raise the budget, lower most, or leave the layers before it out with skip.",
            )
    changed = {name for name, _ in trace.weights} | set(trace.config_edits)
    replacements: dict[str, list[NewLayer]] = {}
    for layer in model.layers:
        if layer.name not in changed:
            continue
        # A wrapper gives out the very configuration that it keeps of its inner layer.
        config = copy.deepcopy(layer.get_config())
        in_float32(config)
        _drop_own_values(config)
        for edit in trace.config_edits.get(layer.name, ()):
            edit(config, kept)
        weights = []
        for index, value in enumerate(layer.get_weights()):
            held = trace.weights.get((layer.name, index))
            weights.append(value if held is None else cut_axes(value, held.axes, kept))
        replacements[layer.name] = [NewLayer(layer.__class__.from_config(config), tuple(weights))]

    def argument(edits: list[Callable[..., None]]) -> Callable[[list[Any], dict[str, Any]], None]:
        def edit_all(args: list[Any], kwargs: dict[str, Any]) -> None:
            for edit in edits:
                edit(args, kwargs, kept)

        return edit_all

    arguments = {(key.layer, key.index): argument(list(edits)) for key, edits in trace.call_edits.items()}
    return rewrite(model, replacements, arguments)


def _drop_own_values(config: Any) -> None:
    """Have zeros in place of initialisers that hold an array, or are not Keras' own: they fit one shape only.

    The weights are set anyway.
    """
    if isinstance(config, dict):
        for name, value in config.items():
            if name.endswith("_initializer") and isinstance(value, dict):
                own = not str(value.get("module", "")).startswith("keras.")
                held = (value.get("config") or {}).values()
                if own or any(isinstance(item, (dict, list, tuple)) or np.size(item) > 1 for item in held):
                    config[name] = "zeros"
            _drop_own_values(config[name])
    elif isinstance(config, list):
        for value in config:
            _drop_own_values(value)


def masked_model(channels: Channels, stay: np.ndarray) -> tf_keras.Model:
    """Return a copy of the original in which nothing reads the channels that go: the oracle of :func:`remove_channels`.

    Wherever a layer sums over channels, its input is multiplied with a mask; normalisations over channels take their
    statistics from those that stay. Nothing is cut.
    """
    kept = channels.kept(stay | channels.pinned)
    model = channels.model
    replacements: dict[str, list[NewLayer]] = {}
    arguments = {}
    for key, mixings in channels.trace.mixing.items():
        masks = {m.input: kept.of(m.ids) for m in mixings if not m.normalises}
        norm = next((m for m in mixings if m.normalises), None)
        if norm is not None and not kept.of(norm.ids).all():
            layer = model.get_layer(key.layer)
            replacements[key.layer] = [NewLayer(_MaskedNormalization(layer, norm, kept), tuple(layer.get_weights()))]
        if any(not mask.all() for mask in masks.values()):
            factors = {i: mask[None].astype(np.float32) for i, mask in masks.items() if not mask.all()}
            arguments[key.layer, key.index] = scaled_inputs(factors)
    masked = rewrite(model, replacements, arguments)
    for weight in channels.trace.weights.values():
        ids = weight.axes[weight.reads] if weight.within and weight.reads is not None else None
        if ids is not None:
            variable = masked.get_layer(weight.layer).weights[weight.index]
            shape = [-1 if axis == weight.reads else 1 for axis in range(len(weight.axes))]
            variable.assign(np.asarray(variable) * kept.of(ids).reshape(shape))
    return masked


class _MaskedNormalization(tf_keras.layers.Layer):
    """A layer or group normalisation whose statistics leave out the channels that go."""

    def __init__(self, layer: tf_keras.layers.Layer, mixing: Mixing, kept: Kept) -> None:
        super().__init__(name=layer.name)
        self.supports_masking = True
        self._own = layer.__class__.from_config(layer.get_config())
        self._stay = kept.of(mixing.ids).astype(np.float32)

    def build(self, input_shape: Any) -> None:
        """Build the layer that is imitated."""
        self._own.build(input_shape)
        super().build(input_shape)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Normalise by the statistics of what stays."""
        own, rank = self._own, inputs.shape.rank
        shape = tf.shape(inputs)
        values, mask = inputs, tf.broadcast_to(self._stay[None], shape)
        if isinstance(own, tf_keras.layers.GroupNormalization):
            apart = tf.concat([shape[:-1], [own.groups, inputs.shape[-1] // own.groups]], 0)
            values, mask = tf.reshape(values, apart), tf.reshape(mask, apart)
            axes = [*range(1, rank - 1), rank]
        else:
            axes = [axis % rank for axis in own.axis]
        count = tf.reduce_sum(mask, axes, keepdims=True)
        mean = tf.reduce_sum(values * mask, axes, keepdims=True) / count
        variance = tf.reduce_sum(mask * (values - mean) ** 2, axes, keepdims=True) / count
        normal = tf.reshape((values - mean) / tf.sqrt(variance + own.epsilon), shape)
        weights = [1 if axis not in _axes(own, rank) else inputs.shape[axis] for axis in range(rank)]
        gamma = tf.reshape(own.gamma, weights) if own.scale else 1.0
        beta = tf.reshape(own.beta, weights) if own.center else 0.0
        return normal * gamma + beta


def _axes(layer: tf_keras.layers.Layer, rank: int) -> list[int]:
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    return [axis % rank for axis in axes]


def oracle_difference(masked: tf_keras.Model, rebuilt: tf_keras.Model, samples: list[np.ndarray]) -> float:
    """Return the largest difference of two models' outputs, relative to the largest output of the first."""
    wanted, given = (
        tf.nest.flatten(m(samples if len(samples) > 1 else samples[0], training=False)) for m in (masked, rebuilt)
    )
    worst = 0.0
    for one, other in zip(map(np.asarray, wanted), map(np.asarray, given), strict=True):
        if one.shape != other.shape or not (np.isfinite(one).all() and np.isfinite(other).all()):
            return float("inf")
        scale = float(np.abs(one).max()) or 1.0
        worst = max(worst, float(np.abs(np.asarray(one) - np.asarray(other)).max()) / scale)
    return worst
