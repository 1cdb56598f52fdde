"""Measures an exported file, beside the Keras model that it was made from if there is one."""

from __future__ import annotations

import logging

import tf_keras

from compress.boards.board import Board
from compress.candidate import Artifact, Numbers
from compress.data.source import Data
from compress.deploy.verification import Agreement, agreement
from compress.graph.saved_graph import has_layers
from compress.metrics.accuracy import accuracy, file_outputs, keras_outputs
from compress.metrics.counts import count_macs, count_nonzero_params, count_params
from compress.metrics.size import file_bytes, gzip_bytes
from compress.metrics.tflite_file import TFLiteFile

_LOG = logging.getLogger("compress")


def measure(
    artifact: Artifact,
    file: TFLiteFile,
    model: tf_keras.Model | None,
    data: Data,
    board: Board,
    baseline: Artifact | None = None,
) -> tuple[Numbers, Agreement | None]:
    """Return everything that is known about an exported file, and how its outputs agree with those of the model.

    Args:
        artifact: the file on disk, and the packed one.
        file: the same, read.
        model: what it was made from. Without it, or without Keras layers in it, the file itself is counted.
        data: its test part is what the accuracy is measured on.
        board: where the latency is measured.
        baseline: what it is compared with; both are measured in turns.

    Raises:
        CompressError: if the runtime rejects the file.
    """
    outputs = file_outputs(artifact.path, data.evaluated.x)
    expected = None if model is None else keras_outputs(model, data.evaluated.x)
    measurement, *others = board.measure_all([artifact] if baseline is None else [artifact, baseline])
    times = [one.cost_ms for one in (measurement, *others)]
    if measurement.failure is not None:
        _LOG.warning("board %s: %s", measurement.board, measurement.failure)
    for note in measurement.notes:
        _LOG.info("board %s: %s", measurement.board, note)
    numbers = Numbers(
        accuracy=accuracy(outputs, data.evaluated.y),
        accuracy_keras=None if expected is None else accuracy(expected, data.evaluated.y),
        params=file.count_params() if model is None else count_params(model),
        nonzero_params=file.count_nonzero_params() if model is None else count_nonzero_params(model),
        macs=count_macs(model) if model is not None and has_layers(model) else file.macs(),
        tflite_bytes=file_bytes(artifact.path),
        gzip_bytes=gzip_bytes(artifact.path),
        packed_bytes=None if artifact.packed is None else file_bytes(artifact.packed),
        peak_memory_bytes=file.peak_memory_bytes(),
        latency_ms=measurement.latency_ms,
        latency_failure=measurement.failure,
        sparse_kernels=file.sparse_kernels,
        estimate_ms=measurement.estimate_ms,
        speedup=times[1] / times[0] if len(times) == 2 and times[0] and times[1] else None,
        on_board=dict(measurement.values),
    )
    return numbers, None if expected is None else agreement(expected, outputs)
