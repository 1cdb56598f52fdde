"""Exports a candidate as a ``.tflite`` file, written as its storage says."""

from __future__ import annotations

import logging
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import tensorflow as tf

from compress.candidate import Artifact, Candidate
from compress.data.source import Data
from compress.deploy.conversion import calibration_samples, complaints_explained, make_converter
from compress.deploy.grids import expand_from_grids, write_grids
from compress.deploy.integer import calibrated, quantized, with_ranges
from compress.deploy.points import find_points
from compress.deploy.sparse import store_sparsely
from compress.errors import CompressError
from compress.graph.kernels import get_weight
from compress.metrics.accuracy import file_outputs
from compress.metrics.tflite_file import TFLiteFile

_LOG = logging.getLogger("compress")
_COMPARED_IMAGES = 8


def export(candidate: Candidate, data: Data, path: Path) -> Artifact:
    """Write ``path`` and return it as an artifact.

    The file reads and writes float32 and is made for one sample at a time; its input is the model's raw input.
    Kernels of many zeros are stored sparsely if the file gets smaller by it and LiteRT gives the same outputs.
    Written to a temporary name and renamed.

    Args:
        candidate: what to export; its guarantees may ask for one integer scale per tensor.
        data: the int8 ranges are calibrated on the first images of its training part, in shuffled order.
        path: the file to write.

    Raises:
        CompressError: if the converter refuses the model.
    """
    storage = candidate.storage
    converter = make_converter(candidate.model)
    with complaints_explained(storage.scheme):
        content = _converted(converter, candidate, data)
    sparse = store_sparsely(content)
    if sparse is not None and _agree(content, sparse, candidate, data):
        content = sparse
    unfinished = path.with_name(f".{path.name}.partial")
    unfinished.write_bytes(content)
    unfinished.replace(path)
    return Artifact(path, storage)


def _converted(converter: tf.lite.TFLiteConverter, candidate: Candidate, data: Data) -> bytes:
    storage, model = candidate.storage, candidate.model
    per_tensor = any(guarantee.one_scale_per_tensor for guarantee in candidate.guarantees)
    grids = {name: grid for guarantee in candidate.guarantees for name, grid in guarantee.grids().items()}
    kernels = {name: (get_weight(model, name), grid) for name, grid in grids.items()}
    samples = partial(calibration_samples, data, storage.calibration.images)
    if storage.scheme == "int8":
        floats = calibrated(converter, samples, storage.calibration)
        if storage.ranges:
            floats = with_ranges(floats, _ranges_of_tensors(floats, candidate, next(samples())[0]))
        file = TFLiteFile(floats)
        spared = [name for layer in storage.float_layers for name in file.written_by(layer)]
        content = quantized(floats, per_tensor=per_tensor, floats=spared)
        return write_grids(content, floats, kernels) if kernels else content
    if storage.scheme == "weight_only":
        floats = bytes(converter.convert())
        return expand_from_grids(floats, kernels, per_tensor=per_tensor, spared=storage.float_layers)
    if storage.scheme != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if storage.scheme == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if storage.scheme == "int16":
        converter.representative_dataset = samples
        wide = tf.lite.OpsSet.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8
        # Operators without a 16-bit form go on computing with floats.
        converter.target_spec.supported_ops = [wide, tf.lite.OpsSet.TFLITE_BUILTINS]
    converter._experimental_disable_per_channel = per_tensor
    converter._experimental_disable_per_channel_quantization_for_dense_layers = per_tensor
    return bytes(converter.convert())


def _ranges_of_tensors(content: bytes, candidate: Candidate, sample: np.ndarray) -> dict[str, tuple[float, float]]:
    """Return the ranges of the storage's layers by the names of the tensors that hold their outputs."""
    points, known = find_points(content, candidate.model, sample), candidate.storage.ranges
    sources = {layer: points.tied.get(layer, layer) for layer in points.tensors}
    return {
        t: known[sources[layer]] for layer, names in points.tensors.items() if sources[layer] in known for t in names
    }


def _agree(dense: bytes, sparse: bytes, candidate: Candidate, data: Data) -> bool:
    """Run both files in LiteRT on a few calibration images and compare their outputs."""
    images = np.concatenate([image for (image,) in calibration_samples(data, _COMPARED_IMAGES)])
    with tempfile.TemporaryDirectory(prefix="compress-") as folder:
        outputs = []
        for name, content in (("dense.tflite", dense), ("sparse.tflite", sparse)):
            file = Path(folder, name)
            file.write_bytes(content)
            try:
                outputs.append(file_outputs(file, images))
            except CompressError as error:
                _LOG.warning("weights are not stored sparsely: %s", error.received)
                return False
    # Other kernels of the runtime may sum in another order; of integers, round to the neighbour.
    tolerance = 0.02 if candidate.storage.scheme == "int8" else 1e-4
    return bool(np.abs(outputs[1] - outputs[0]).max() <= tolerance * np.abs(outputs[0]).max())
