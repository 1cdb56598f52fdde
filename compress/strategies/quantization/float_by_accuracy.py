"""Layers that stay floats in an integer file, so few of them that the accuracy holds."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import tf_keras

from compress.candidate import Candidate
from compress.data.source import Data, Split
from compress.deploy.conversion import calibration_samples
from compress.deploy.integer import Calibrated
from compress.errors import CompressError
from compress.graph.rewrite import copy_model
from compress.metrics.accuracy import accuracy, file_outputs
from compress.progress import progress

_COMPARED = 64
_JUDGED = 2000


def require_labels(data: Data, stage: str) -> None:
    """Refuse data that :func:`keep_floats` could not judge a file by.

    Raises:
        CompressError: if the validation part has no labels.
    """
    if not data.validation.labelled:
        raise CompressError(
            f"strategy.{stage}.float_fallback",
            expected="labels of the validation part, by which the accuracy of the file is judged",
            received="none",
            fix="Bring labels, or leave float_fallback out and name the layers that stay floats (skip).",
        )


def keep_floats(
    candidate: Candidate, data: Data, layers: list[str], most: float, stage: str, original: tf_keras.Model | None = None
) -> tuple[str, ...]:
    """Return the fewest layers that must stay floats for the accuracy to drop by at most ``most`` points.

    Layers are ranked by how much nearer the outputs come to those of the float file when a layer alone stays float; the
    accuracy is that of the files, on the validation part.

    Args:
        candidate: its storage says how it is quantized.
        data: its validation part is judged on, its training part calibrated on.
        layers: those that may stay floats.
        most: points of accuracy.
        stage: for the error.
        original: the model before its weights were rounded, its layers named alike: the float file that is compared
            with, and what layers that stay floats hold. None: no weights of the candidate are rounded yet.

    Raises:
        CompressError: if the accuracy drops by more even with all of these layers as floats.
    """
    fixed, ranked = candidate.storage.float_layers, list(layers)
    source = Calibrated.of(candidate, data)
    whole = source if original is None else Calibrated.of(candidate.evolve(model=original), data)

    def quantized(floats: Sequence[str]) -> bytes:
        made = source
        if original is not None and floats:
            made = Calibrated.of(candidate.evolve(model=_with_weights(candidate.model, original, floats)), data)
        return made.quantized((*fixed, *floats))

    judged = Split(data.validation.x[:_JUDGED], data.validation.y[:_JUDGED])
    compared = np.concatenate([sample for (sample,) in calibration_samples(candidate, data, _COMPARED)])
    with tempfile.TemporaryDirectory(prefix="compress-") as folder:

        def outputs(content: bytes, inputs: np.ndarray) -> np.ndarray:
            path = Path(folder, "model.tflite")
            path.write_bytes(content)
            return file_outputs(path, inputs)

        least = accuracy(outputs(whole.floats, judged.x), judged.y) - most

        def holds(count: int) -> bool:
            try:
                content = quantized(ranked[:count])
            except CompressError:
                # A layer of it cannot be computed in integers; as floats it may.
                if count == len(ranked):
                    raise
                return False
            return accuracy(outputs(content, judged.x), judged.y) >= least

        def error_with(layer: str) -> float:
            try:
                content = quantized([layer])
            except CompressError:
                return np.inf
            return float(np.mean((outputs(content, compared) - wanted) ** 2))

        if holds(0):
            return ()
        wanted = outputs(whole.floats, compared)
        errors = {}
        with progress("float fallback") as shown:
            for number, layer in enumerate(layers, start=1):
                errors[layer] = error_with(layer)
                shown.advance(number, len(layers), layer)
        ranked.sort(key=errors.__getitem__)
        if not holds(len(ranked)):
            raise CompressError(
                f"stage {stage}",
                expected=f"an accuracy at most {most:g} points below that of the float file",
                received=f"a larger drop even with all layers ({len(ranked)}) as floats",
                fix=f"Allow more (strategy.{stage}.float_fallback.accuracy_drop), or calibrate otherwise "
                f"(strategy.{stage}.ranges, calibration_images).",
            )
        low, high = 0, len(ranked)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle, high)
        return tuple(ranked[:high])


def _with_weights(model: tf_keras.Model, original: tf_keras.Model, layers: Collection[str]) -> tf_keras.Model:
    """Return a copy of the model in which these layers have the original's weights."""
    result = copy_model(model)
    for name in layers:
        result.get_layer(name).set_weights(original.get_layer(name).get_weights())
    return result
