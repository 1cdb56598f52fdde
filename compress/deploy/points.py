"""Where a file quantizes what a Keras model computes: its tensors and the layers whose outputs they hold.

A layer that is called several times has a point for each call, named by :func:`~compress.graph.rewrite.call_name`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
import tf_keras

from compress.candidate import Calibration, Candidate
from compress.data.source import Data
from compress.deploy.conversion import (
    calibration_samples,
    check_loops,
    complaints_explained,
    integer_form,
    make_converter,
)
from compress.deploy.ranges import choose, collect, computed_values
from compress.graph.rewrite import named_calls
from compress.metrics.tflite_file import TFLiteFile

_TOLERANCE = 1e-4
_AVERAGING = (
    tf_keras.layers.AveragePooling1D,
    tf_keras.layers.AveragePooling2D,
    tf_keras.layers.AveragePooling3D,
    tf_keras.layers.UpSampling2D,
)
_RECTIFYING = (tf_keras.layers.ReLU, tf_keras.layers.Activation)


@dataclass(frozen=True)
class Points:
    """The layers whose outputs are tensors of a file.

    ``tensors``: layer -> names of the tensors that hold its output. ``tied``: layer -> the layer whose scale its output
    keeps, because it only passes values on.
    """

    tensors: Mapping[str, Sequence[str]]
    tied: Mapping[str, str]


def calibrated_points(
    candidate: Candidate, data: Data, calibration: Calibration
) -> tuple[Points, dict[str, tuple[float, float]]]:
    """Return the points of the candidate's float file, and the range of each layer that has one of its own.

    Raises:
        CompressError: if the converter refuses the model.
    """
    model = candidate.model
    check_loops(model)
    converter = make_converter(integer_form(candidate))
    with complaints_explained("int8", model):
        content = bytes(converter.convert())
    samples = [sample for (sample,) in calibration_samples(candidate, data, calibration.images)]
    points = find_points(content, model, samples[0])
    histograms = collect(content, samples)
    indices = _indices(TFLiteFile(content))
    own = {
        layer: names[0]
        for layer, names in points.tensors.items()
        if layer not in points.tied and names[0] not in indices
    }
    return points, {layer: choose(histograms[name], calibration) for layer, name in own.items()}


def find_points(content: bytes, model: tf_keras.Model, sample: np.ndarray) -> Points:
    """Compare what the float file and the model compute for one sample [1, ...].

    The converter fuses layers and names tensors as it likes; equal values are what tells. Layers that give several
    tensors are left out.
    """
    single = {name: given[0] for name, node in named_calls(model) if len(given := tf.nest.flatten(node.outputs)) == 1}
    look = tf_keras.Model(model.inputs, list(single.values()))
    outputs = {
        name: np.asarray(value, np.float32)
        for name, value in zip(single, tf.nest.flatten(look(sample, training=False)), strict=True)
    }
    stored = [(name, value.reshape(-1)) for name, value in computed_values(content, [sample])]
    tensors: dict[str, list[str]] = {}
    for layer, value in outputs.items():
        flat = value.reshape(-1)
        largest = np.abs(flat).max(initial=0.0)
        if largest == 0:
            continue
        found = [
            name
            for name, other in stored
            if other.size == flat.size and np.abs(other - flat).max() <= _TOLERANCE * largest
        ]
        if found:
            tensors[layer] = found
    return Points(tensors, _tied(model, tensors, outputs, _written(content)))


def _indices(file: TFLiteFile) -> set[str]:
    """Return the names of the inputs that are only cast to integers, which say what to look up: none is quantized."""
    readers = {index: {op.name for op in file.operators if index in op.inputs} for index in file.inputs}
    return {file.tensors[index].name for index, names in readers.items() if names == {"CAST"}}


def _tied(
    model: tf_keras.Model,
    tensors: Mapping[str, Sequence[str]],
    outputs: Mapping[str, np.ndarray],
    order: Sequence[str],
) -> dict[str, str]:
    """Return layer -> the layer whose scale its output has.

    What only passes one tensor on keeps its scale; what puts several together (concatenation, maximum) brings them to
    its own beforehand. Of several that read a tensor, the last one in the file decides; the
    others requantize it.
    """
    kept: dict[str, str] = {}
    joiners: list[tuple[str, list[str]]] = []
    made_by: dict[int, str] = {}
    for name, node in named_calls(model):
        made_by.update((id(tensor), name) for tensor in tf.nest.flatten(node.outputs))
        sources = [made_by[id(tensor)] for tensor in node.keras_inputs if not node.is_input]
        if node.is_input or not {name, *sources} <= tensors.keys():
            continue
        given = np.concatenate([np.zeros(1), *(outputs[source].reshape(-1) for source in sources)])
        passes_on = np.isin(outputs[name], given).all()
        if len(sources) > 1 and passes_on:
            joiners.append((name, sources))
        elif len(sources) == 1 and (passes_on or isinstance(node.layer, _AVERAGING)) and not _rectifies(node.layer):
            kept[name] = kept.get(sources[0], sources[0])
    joined: dict[str, str] = {}
    for name, sources in sorted(joiners, key=lambda joiner: order.index(tensors[joiner[0]][0])):
        joined.update({kept.get(source, source): name for source in sources})
    tied = {}
    for name in (*kept, *joined):
        scale = kept.get(name, name)
        while scale in joined:
            scale = joined[scale]
        tied[name] = scale
    return tied


def _written(content: bytes) -> list[str]:
    """Return the names of the tensors that the file computes, in the order of its operators."""
    file = TFLiteFile(content)
    return [file.tensors[index].name for operator in file.operators for index in operator.outputs]


def _rectifies(layer: tf_keras.layers.Layer) -> bool:
    return isinstance(layer, _RECTIFYING) or "relu" in getattr(layer, "symbol", "")
