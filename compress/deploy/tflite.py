"""Exports a candidate as a ``.tflite`` file, written as its storage says."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf_keras

from compress.candidate import Artifact, Candidate
from compress.data.source import Data
from compress.deploy.conversion import (
    calibration_samples,
    check_loops,
    check_wide,
    complaints_explained,
    make_converter,
    one_scale_per_tensor,
)
from compress.deploy.grids import expand_from_grids
from compress.deploy.integer import Calibrated, grids_of
from compress.deploy.naming import with_kernels_named
from compress.deploy.sparse import store_sparsely
from compress.errors import CompressError
from compress.metrics.accuracy import file_outputs

_LOG = logging.getLogger("compress")
_COMPARED_IMAGES = 8
_TOLERANCE = 1e-4
"""Of the outputs of two float files, as a share of the largest output."""


def export(candidate: Candidate, data: Data, path: Path, *, sparse: bool = True) -> Artifact:
    """Write ``path`` and return it as an artifact.

    The file reads and writes float32 and is made for one sample at a time; its input is the model's raw input.
    Kernels of many zeros are stored sparsely if the file gets smaller by it and LiteRT gives the same outputs.
    Written to a temporary name and renamed.

    Args:
        candidate: what to export; its guarantees may ask for one integer scale per tensor.
        data: the int8 ranges are calibrated on the first images of its training part, in shuffled order.
        path: the file to write.
        sparse: whether what is to run it can expand such kernels.

    Raises:
        CompressError: if the converter refuses the model.
    """
    content = _converted(candidate, data)
    if not sparse:
        _write(content, path)
        return Artifact(path, candidate.storage)
    # Other kernels of the runtime may sum in another order; of integers, round to the neighbour.
    tolerance = 0.02 if candidate.storage.scheme == "int8" else _TOLERANCE
    samples = calibration_samples(candidate, data, _COMPARED_IMAGES)
    _write_smaller(content, [sample for (sample,) in samples], tolerance, path)
    return Artifact(path, candidate.storage)


def export_float(model: tf_keras.Model, path: Path, *, select_tf_ops: bool = False) -> None:
    """Write the float file of a model that no data are at hand for.

    It is the file that :func:`export` writes of a float candidate. With ``select_tf_ops`` it may hold operators of
    TensorFlow itself, which LiteRT's Python package does not run.

    Raises:
        CompressError: if the converter refuses the model.
    """
    with complaints_explained("float32", model):
        content = bytes(make_converter(model, select_tf_ops=select_tf_ops).convert())
    if select_tf_ops:
        _write(content, path)
        return
    shape = [1, *(size or 1 for size in model.inputs[0].shape[1:])]
    samples = np.random.default_rng(0).normal(size=(_COMPARED_IMAGES, *shape)).astype(np.float32)
    _write_smaller(content, list(samples), _TOLERANCE, path)


def _write_smaller(content: bytes, samples: Sequence[np.ndarray], tolerance: float, path: Path) -> None:
    """Write the file with its kernels stored sparsely, if that is smaller and LiteRT computes the same from samples."""
    sparse = store_sparsely(content)
    if sparse is not None and _agree(content, sparse, samples, tolerance):
        content = sparse
    _write(content, path)


def _write(content: bytes, path: Path) -> None:
    unfinished = path.with_name(f".{path.name}.partial")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def _converted(candidate: Candidate, data: Data) -> bytes:
    storage = candidate.storage
    if storage.scheme == "int8":
        return Calibrated.of(candidate, data).quantized(storage.float_layers)
    converter = make_converter(candidate.model)
    whole = one_scale_per_tensor(candidate)
    converter._experimental_disable_per_channel = whole
    converter._experimental_disable_per_channel_quantization_for_dense_layers = whole
    if storage.scheme not in ("float32", "weight_only"):
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if storage.scheme == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if storage.scheme == "int16":
        check_loops(candidate.model, wide=True)
        converter.representative_dataset = partial(calibration_samples, candidate, data, storage.calibration.images)
        wide = tf.lite.OpsSet.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8
        # Operators without a 16-bit form go on computing with floats.
        converter.target_spec.supported_ops = [wide, tf.lite.OpsSet.TFLITE_BUILTINS]
    with complaints_explained(storage.scheme, candidate.model):
        content = bytes(converter.convert())
    if storage.scheme in ("float32", "weight_only"):
        content = with_kernels_named(content, candidate.model)
    if storage.scheme == "int16":
        check_wide(content, candidate.model)
    if storage.scheme == "weight_only":
        grids, floats = grids_of(candidate), storage.float_layers
        return expand_from_grids(content, grids, per_tensor=whole, spared=floats, packed=storage.packed)
    return content


def _agree(dense: bytes, sparse: bytes, samples: Sequence[np.ndarray], tolerance: float) -> bool:
    """Run both files in LiteRT on samples [1, ...] and compare their outputs."""
    images = np.concatenate(samples)
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
    return bool(np.abs(outputs[1] - outputs[0]).max() <= tolerance * np.abs(outputs[0]).max())
