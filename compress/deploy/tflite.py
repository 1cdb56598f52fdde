"""Exports a candidate as a ``.tflite`` file, written as its storage says."""

from __future__ import annotations

import logging
import re
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import tensorflow as tf

from compress.candidate import Artifact, Candidate
from compress.data.source import Data
from compress.deploy.grids import expand_from_grids, write_grids
from compress.deploy.integer import calibrated, quantized
from compress.deploy.sparse import store_sparsely
from compress.errors import CompressError
from compress.graph.kernels import get_weight
from compress.metrics.accuracy import file_outputs
from compress.metrics.tflite_file import TFLiteFile
from compress.quiet import stderr_aside

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
    model, storage = candidate.model, candidate.storage
    shape = (1, *model.inputs[0].shape[1:])
    if any(size is None for size in shape):
        raise CompressError(
            "export",
            expected="a model whose input sizes are all known",
            received=f"an input of shape {model.inputs[0].shape}",
            fix="Build the model with a fixed input shape.",
        )
    # A function of its own: from_keras_model would leave the batch open, which costs operators and speed.
    call = tf.function(lambda image: model(image, training=False))
    signature = call.get_concrete_function(tf.TensorSpec(shape, tf.float32, name="image"))
    converter = tf.lite.TFLiteConverter.from_concrete_functions([signature], model)
    try:
        with warnings.catch_warnings(), stderr_aside(show_on_failure=False):
            warnings.simplefilter("ignore")
            content = _converted(converter, candidate, data)
    except CompressError:
        raise
    except Exception as error:
        # The converter raises many types; each of them means that it refuses the model.
        raise CompressError(
            f"export as {storage.scheme}",
            expected="a model that the TFLite converter accepts",
            received=_reason(error),
            fix="Replace the layer that is named, or leave it out of the model that is exported."
            if storage.scheme == "float32"
            else "Choose another storage (strategy.quantize.scheme=dynamic), or replace the layer that is named.",
        ) from error
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
    kernels = {name.rpartition("/")[0]: (get_weight(model, name), grid) for name, grid in grids.items()}
    samples = partial(_calibration, data, storage.calibration.images)
    if storage.scheme == "int8":
        floats = calibrated(converter, samples, storage.calibration)
        file = TFLiteFile(floats)
        spared = [name for layer in storage.float_layers for name in file.written_by(layer)]
        content = quantized(floats, per_tensor=per_tensor, floats=spared)
        return write_grids(content, kernels) if kernels else content
    if storage.scheme == "weight_only":
        floats = bytes(converter.convert())
        return expand_from_grids(floats, kernels, per_tensor=per_tensor, floats=storage.float_layers)
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


def _agree(dense: bytes, sparse: bytes, candidate: Candidate, data: Data) -> bool:
    """Run both files in LiteRT on a few calibration images and compare their outputs."""
    images = np.concatenate([image for (image,) in _calibration(data, _COMPARED_IMAGES)])
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


def _reason(error: Exception) -> str:
    """Return what the converter says without the traces of its compiler."""
    text = re.sub(r"(loc|callsite|fused)\S*|<unknown>\S*|error:|note:", " ", str(error))
    return " ".join(text.split())[:300] or type(error).__name__


def _calibration(data: Data, images: int) -> Iterator[list[np.ndarray]]:
    chosen = np.random.default_rng(0).permutation(len(data.train))[:images]
    for index in chosen:
        yield [data.train.x[index : index + 1].astype(np.float32)]
