"""Quantization-aware training as the TensorFlow Model Optimization Toolkit does it, for models that it can carry.

Its layers round to moving averages of the ranges they see. What they have learned is taken out of them: plain weights,
their grids, and the ranges of the layers' outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tf_keras

from compress.candidate import Grid
from compress.errors import CompressError
from compress.graph.fold import foldable_pairs
from compress.graph.kernels import kernels
from compress.graph.rewrite import copy_model
from compress.graph.softmax import gives_probabilities, without_softmax
from compress.strategies.quantization.unfolding import fold_grids


def wrapped_by_tfmot(model: tf_keras.Model, where: str) -> tuple[tf_keras.Model, list[str]]:
    """Return a copy whose layers round their weights and outputs as TFMOT has them do, and the layers that do not.

    Those are the ones that its registry does not know, which ``quantize_model`` refuses. The copy gives logits: under
    TFMOT's layers nobody sees a softmax at the end.

    Raises:
        CompressError: with TFMOT's own reason, if it refuses the model.
    """
    from tensorflow_model_optimization.python.core.quantization.keras.default_8bit import default_8bit_quantize_registry
    from tensorflow_model_optimization.quantization.keras import quantize_annotate_layer, quantize_apply

    registry = default_8bit_quantize_registry.Default8BitQuantizeRegistry()
    folded = set(foldable_pairs(model).values())
    inner = [layer for layer in model.layers if not isinstance(layer, tf_keras.layers.InputLayer)]
    unknown = [layer.name for layer in inner if layer.name not in folded and not registry.supports(layer)]

    def annotated(layer: tf_keras.layers.Layer) -> tf_keras.layers.Layer:
        as_it_is = isinstance(layer, tf_keras.layers.InputLayer) or layer.name in unknown
        return layer if as_it_is else quantize_annotate_layer(layer)

    ending = without_softmax(copy_model(model))
    try:
        return quantize_apply(tf_keras.models.clone_model(ending, clone_function=annotated)), unknown
    except Exception as error:
        # It raises what it likes; any of it is a refusal.
        raise CompressError(
            where,
            expected="a model that TFMOT's quantize_apply takes",
            received=" ".join(str(error).split())[:200],
            fix="Use the scheme that any model can be trained with: scheme=own.",
        ) from error


def unwrap(
    wrapped: tf_keras.Model, model: tf_keras.Model
) -> tuple[tf_keras.Model, dict[str, Grid], dict[str, tuple[float, float]]]:
    """Return ``model``, folded, with the trained and rounded weights; their grids; the ranges of the layers' outputs.

    Kernels that TFMOT leaves unrounded (of a convolution that a ReLU follows without a batch norm) have no grid.
    """
    from tensorflow_model_optimization.python.core.quantization.keras.quantize_layer import QuantizeLayer
    from tensorflow_model_optimization.python.core.quantization.keras.quantize_wrapper import QuantizeWrapper

    trained = copy_model(model)
    steps: dict[str, np.ndarray] = {}
    ranges: dict[str, tuple[float, float]] = {}
    for layer in wrapped.layers:
        if isinstance(layer, QuantizeLayer):
            ranges[layer.input._keras_history.layer.name] = _range(layer.quantizer_vars)
            continue
        inner = layer.layer if isinstance(layer, QuantizeWrapper) else layer
        # A wrapper has taken the kernel out of its layer and put it behind the other weights.
        sources = {_last(weight): weight for weight in layer.weights}
        for target in trained.get_layer(inner.name).weights:
            target.assign(sources[_last(target)])
        if inner is layer:
            continue
        for weight, quantizer, _ in layer._weight_vars:
            steps[f"{inner.name}/{_last(weight)}"] = _steps(np.asarray(weight), quantizer)
        activations = [getattr(a, "_post_activation_vars", None) for a in layer._quantize_activations]
        for found in (*activations, getattr(layer, "_output_quantizer_vars", None)):
            if found:
                ranges[inner.name] = _range(found)
    for kernel in kernels(trained):
        if kernel.name in steps:
            step = steps[kernel.name]
            getattr(kernel.layer, kernel.attribute).assign(np.clip(np.rint(kernel.value / step), -127, 127) * step)
    if gives_probabilities(model):
        # What was rounded are its logits.
        ranges.pop(model.outputs[0].node.layer.name, None)
    return (*fold_grids(trained, steps, dict.fromkeys(steps, 8)), ranges)


def _last(weight: Any) -> str:
    return str(weight.name).rpartition("/")[2].split(":")[0]


def _steps(weight: np.ndarray, quantizer: Any) -> np.ndarray:
    axes = tuple(range(weight.ndim - 1)) if quantizer.per_axis else None
    return np.asarray(np.maximum(np.abs(weight).max(axes, keepdims=True), 1e-12) / 127, np.float32)


def _range(found: Mapping[str, Any]) -> tuple[float, float]:
    return min(float(found["min_var"]), 0.0), max(float(found["max_var"]), 0.0)
