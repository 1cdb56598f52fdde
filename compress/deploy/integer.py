"""Writes a model with integer activations: its float file, ranges for what it computes, and integer kernels for it.

Source: Jacob et al. (arXiv 1712.05877); the TFLite quantization specification.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np
import tensorflow as tf
from tensorflow.lite.python.convert import mlir_quantize

from compress.candidate import Calibration
from compress.deploy.flatbuffer import parse, serialize
from compress.deploy.ranges import choose, collect

Samples = Callable[[], Iterator[list[np.ndarray]]]
"""Gives calibration inputs [1, ...], one list of inputs after the other."""


def calibrated(converter: tf.lite.TFLiteConverter, samples: Samples, calibration: Calibration) -> bytes:
    """Convert to a float file that holds the range of each tensor it computes.

    Args:
        converter: for the float model.
        samples: what the ranges are taken from.
        calibration: how they are chosen.
    """
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = samples
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter._experimental_calibrate_only = True
    content = bytes(converter.convert())
    if calibration.ranges == "minmax":
        return content
    found = collect(content, [sample for (sample,) in samples()])
    return with_ranges(content, {name: choose(histogram, calibration) for name, histogram in found.items()})


def with_ranges(content: bytes, ranges: Mapping[str, tuple[float, float]]) -> bytes:
    """Return the calibrated file with other ranges for the tensors that are named."""
    model = parse(content)
    for tensor in model.subgraphs[0].tensors:
        name = tensor.name.decode()
        if name in ranges and tensor.quantization is not None and tensor.quantization.min is not None:
            low, high = ranges[name]
            tensor.quantization.min, tensor.quantization.max = [low], [high]
    return serialize(model)


def quantized(content: bytes, *, per_tensor: bool, floats: Collection[str] = ()) -> bytes:
    """Return the calibrated file with int8 for its weights and for what it computes.

    Args:
        content: the calibrated file.
        per_tensor: give each weight one scale instead of one for each output.
        floats: names of tensors; the operators that write them go on computing with floats.
    """
    return bytes(
        mlir_quantize(
            content,
            disable_per_channel=per_tensor,
            disable_per_channel_for_dense_layers=per_tensor,
            denylisted_nodes=set(floats) or None,
        )
    )
