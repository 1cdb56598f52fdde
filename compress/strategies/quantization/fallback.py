"""Layers that stay floats in an integer file, so few of them that the accuracy holds."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from compress.candidate import Candidate
from compress.data.source import Data, Split
from compress.deploy.conversion import calibration_samples
from compress.deploy.integer import Calibrated
from compress.errors import CompressError
from compress.metrics.accuracy import accuracy, file_outputs
from compress.progress import progress

_COMPARED = 64
_JUDGED = 2000


def keep_floats(candidate: Candidate, data: Data, layers: list[str], most: float, stage: str) -> tuple[str, ...]:
    """Return the fewest layers that must stay floats for the accuracy to drop by at most ``most`` points.

    Layers are ranked by how much nearer the outputs come to those of the float file when a layer alone stays float; the
    accuracy is that of the files, on the validation part.

    Args:
        candidate: its storage says how it is quantized.
        data: its validation part is judged on, its training part calibrated on.
        layers: those that may stay floats.
        most: points of accuracy.
        stage: for the error.

    Raises:
        CompressError: if the accuracy drops by more even with all of these layers as floats.
    """
    source = Calibrated.of(candidate, data)
    judged = Split(data.validation.x[:_JUDGED], data.validation.y[:_JUDGED])
    compared = np.concatenate([sample for (sample,) in calibration_samples(candidate, data, _COMPARED)])
    with tempfile.TemporaryDirectory(prefix="compress-") as folder:

        def outputs(content: bytes, inputs: np.ndarray) -> np.ndarray:
            path = Path(folder, "model.tflite")
            path.write_bytes(content)
            return file_outputs(path, inputs)

        least = accuracy(outputs(source.floats, judged.x), judged.y) - most

        def holds(count: int) -> bool:
            content = source.quantized((*fixed, *ranked[:count]))
            return accuracy(outputs(content, judged.x), judged.y) >= least

        fixed, ranked = candidate.storage.float_layers, list(layers)
        if holds(0):
            return ()
        wanted = outputs(source.floats, compared)
        errors = {}
        with progress("float fallback") as shown:
            for number, layer in enumerate(layers, start=1):
                errors[layer] = float(np.mean((outputs(source.quantized((*fixed, layer)), compared) - wanted) ** 2))
                shown.advance(number, len(layers), layer)
        ranked.sort(key=errors.__getitem__)
        if not holds(len(ranked)):
            raise CompressError(
                f"stage {stage}",
                expected=f"an accuracy at most {most:g} points below that of the float file",
                received=f"a larger drop even with all {len(ranked)} layers as floats",
                fix=f"Allow more (strategy.{stage}.float_fallback.accuracy_drop), or calibrate otherwise "
                f"(strategy.{stage}.ranges, calibration_images).",
            )
        low, high = 0, len(ranked)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle, high)
        return tuple(ranked[:high])
