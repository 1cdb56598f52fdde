"""Writes a model with integer activations: its float file, ranges for what it computes, and integer kernels for it.

Source: Jacob et al. (arXiv 1712.05877); the TFLite quantization specification.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import tensorflow as tf
import tf_keras
from tensorflow.lite.python.convert import mlir_quantize

from compress.candidate import Candidate, Grid
from compress.data.source import Data
from compress.deploy.conversion import (
    calibration_samples,
    check_calibration,
    check_loops,
    complaints_explained,
    integer_form,
    layer_of,
    make_converter,
    one_scale_per_tensor,
    refuse_overflow,
)
from compress.deploy.flatbuffer import parse, serialize
from compress.deploy.grids import write_grids
from compress.deploy.naming import with_kernels_named
from compress.deploy.points import find_points
from compress.deploy.ranges import choose, collect, of_nothing_replaced
from compress.errors import CompressError
from compress.graph.kernels import get_weight
from compress.metrics.tflite_file import TFLiteFile

_LARGEST_MULTIPLIER = 256
_HIDDEN = 4
"""Which of an LSTM's intermediate tensors holds its outputs before they are projected."""


@dataclass(frozen=True)
class Calibrated:
    """A candidate's float file that holds the range of each tensor it computes, ready to be quantized.

    ``grids``: weight name -> its value and the grid it lies on.
    """

    floats: bytes
    grids: Mapping[str, tuple[np.ndarray, Grid]]
    one_scale_per_tensor: bool
    packed: bool
    """As :attr:`compress.candidate.Storage.packed`."""
    model: tf_keras.Model
    """For the names of its layers in errors."""

    @classmethod
    def of(cls, candidate: Candidate, data: Data) -> Calibrated:
        """Convert the candidate and find the ranges as its storage says.

        Raises:
            CompressError: if the converter refuses the model.
        """
        check_loops(candidate.model)
        storage, model = candidate.storage, integer_form(candidate)
        samples = partial(calibration_samples, candidate, data, storage.calibration.images)
        check_calibration(samples())
        converter = make_converter(model)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = samples
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter._experimental_calibrate_only = True
        with complaints_explained(storage.scheme, model):
            content = with_kernels_named(bytes(converter.convert()), model)
        _check_finite(content, candidate)
        if storage.calibration.ranges != "minmax":
            found = collect(content, [sample for (sample,) in samples()])
            content = _with_ranges(content, {name: choose(h, storage.calibration) for name, h in found.items()})
        if storage.ranges:
            content = _with_ranges(content, _of_tensors(content, candidate, next(samples())[0]))
        return cls(
            of_nothing_replaced(content),
            grids_of(candidate),
            one_scale_per_tensor(candidate),
            storage.packed,
            candidate.model,
        )

    def quantized(self, float_layers: Collection[str] = ()) -> bytes:
        """Return the file with int8 for its weights and for what it computes, but for the layers that are named.

        Raises:
            CompressError: if the converter refuses the model, or LiteRT cannot compute a layer with the ranges found.
        """
        file = TFLiteFile(self.floats)
        spared = {name for layer in float_layers for name in file.written_by(layer)}
        with complaints_explained("int8"):
            content = bytes(
                mlir_quantize(
                    self.floats,
                    disable_per_channel=self.one_scale_per_tensor,
                    disable_per_channel_for_dense_layers=self.one_scale_per_tensor,
                    denylisted_nodes=spared or None,
                )
            )
        grids = {name: item for name, item in self.grids.items() if name.rpartition("/")[0] not in float_layers}
        content = write_grids(content, self.floats, grids, packed=self.packed) if grids else content
        _check_multipliers(content, self.model)
        return content


def grids_of(candidate: Candidate) -> dict[str, tuple[np.ndarray, Grid]]:
    """Return the weights that lie on grids, by name, and their grids."""
    grids = {name: grid for guarantee in candidate.guarantees for name, grid in guarantee.grids().items()}
    return {name: (get_weight(candidate.model, name), grid) for name, grid in grids.items()}


def _of_tensors(content: bytes, candidate: Candidate, sample: np.ndarray) -> dict[str, tuple[float, float]]:
    """Return the ranges of the storage's layers by the names of the tensors that hold their outputs."""
    points, known = find_points(content, candidate.model, sample), candidate.storage.ranges
    found: dict[str, tuple[float, float]] = {}
    for layer, names in points.tensors.items():
        source = points.tied.get(layer, layer)
        if source in known:
            found.update(dict.fromkeys(names, known[source]))
    return found


def _check_finite(content: bytes, candidate: Candidate) -> None:
    """Refuse a network whose float file computes numbers without end on the calibration samples.

    Raises:
        CompressError: naming the first layer that does.
    """
    file = parse(content)
    for operator in file.subgraphs[0].operators:
        for index in operator.outputs:
            tensor = file.subgraphs[0].tensors[index]
            if tensor.quantization is not None and tensor.quantization.min is not None:
                name = tensor.name.decode()
                low, high = tensor.quantization.min[0], tensor.quantization.max[0]
                refuse_overflow(layer_of(name, candidate.model) or name, low, high)


def _check_multipliers(content: bytes, model: tf_keras.Model) -> None:
    """Refuse a file in which a step of the sums that an operator makes would be hundreds of steps of its output.

    LiteRT's kernels (XNNPACK) take less than 256, and refuse the whole file otherwise, without a name.

    Raises:
        CompressError: naming the layer.
    """
    file = TFLiteFile(content)
    for operator, kernel in file.weighted:
        inputs = file.tensors[operator.inputs[2 if operator.name == "TRANSPOSE_CONV" else 0]]
        output = file.tensors[operator.outputs[0]]
        if output.dtype != np.int8 or not (inputs.scales.size and kernel.scales.size and output.scales.size):
            continue
        found = float(inputs.scales[0]) * float(kernel.scales.max()) / float(output.scales[0])
        if not found < _LARGEST_MULTIPLIER:
            layer = layer_of(output.name, model) or layer_of(kernel.name, model) or output.name
            raise CompressError(
                f"export in integers, layer {layer}",
                expected=f"one step of the sums to be less than {_LARGEST_MULTIPLIER} steps of the outputs, for LiteRT",
                received=f"{found:.4g}: few of the inputs are far larger than the others",
                fix=f"Let the layer stay in floats (float_fallback={{accuracy_drop: 0.5}} or skip=[{layer}]), even the "
                "channels out (equalise=true), or take narrower ranges (ranges=percentile).",
            )


def _with_ranges(content: bytes, ranges: Mapping[str, tuple[float, float]]) -> bytes:
    """Return the calibrated file with other ranges for the tensors that are named."""
    model = parse(content)
    graph = model.subgraphs[0]
    found = {
        index: ranges[name] for index, tensor in enumerate(graph.tensors) if (name := tensor.name.decode()) in ranges
    }
    for operator in graph.operators:
        # Keras' LSTMs project nothing: LiteRT takes the integers from before a projection for those behind it.
        if operator.intermediates is not None and len(operator.intermediates) and operator.outputs[0] in found:
            found[operator.intermediates[_HIDDEN]] = found[operator.outputs[0]]
    for index, (low, high) in found.items():
        quantization = graph.tensors[index].quantization
        if quantization is not None and quantization.min is not None:
            quantization.min, quantization.max = [low], [high]
    return serialize(model)
