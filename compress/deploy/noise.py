"""Where a quantized file differs from the float one: signal-to-noise ratios, tensor by tensor.

The ratio is 10 log10 of the mean square of the float values over that of the differences, in decibels; 6 dB are about
one bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tf_keras

from compress.candidate import Candidate
from compress.data.source import Data
from compress.deploy.conversion import calibration_samples, complaints_explained, integer_form, layer_of, make_converter
from compress.deploy.ranges import computed_values
from compress.metrics.tflite_file import TFLiteFile

_MOST_DECIBELS = 120.0


@dataclass(frozen=True)
class Noise:
    """What quantization has done to one tensor.

    ``layer``: the one whose weights made it, else one that the tensor is named after; empty if it names none.
    ``saturated``: share of the values that lie at an end of the range while the float ones lie beyond it.
    """

    layer: str
    tensor: str
    operator: str
    signal_to_noise_db: float
    saturated: float


def quantization_noise(candidate: Candidate, data: Data, path: Path, images: int = 16) -> tuple[Noise, ...]:
    """Compare the exported file at ``path`` with the float file of the same model, on calibration images.

    Raises:
        CompressError: if the converter refuses the model.
    """
    model = integer_form(candidate) if candidate.storage.scheme == "int8" else candidate.model
    with complaints_explained("float32", model):
        floats = bytes(make_converter(model).convert())
    samples = [sample for (sample,) in calibration_samples(candidate, data, images)]
    return measure_noise(floats, path.read_bytes(), samples, candidate.model)


def measure_noise(
    floats: bytes, quantized: bytes, samples: Sequence[np.ndarray], model: tf_keras.Model
) -> tuple[Noise, ...]:
    """Compare what two files of one model compute for the same samples [1, ...], in the order of computation.

    Tensors are compared by their names; what only one of the files computes is left out. ``model``: what both files
    were made from.
    """
    file = TFLiteFile(quantized)
    writers = {file.tensors[index].name: op.name for op in file.operators for index in op.outputs}
    ends = {tensor.name: _ends(tensor.scales, tensor.zero_point, tensor.dtype) for tensor in file.tensors}
    signal: dict[str, float] = {}
    noise: dict[str, float] = {}
    beyond: dict[str, list[float]] = {}
    for sample in samples:
        wanted = dict(computed_values(floats, [sample]))
        for name, value in computed_values(quantized, [sample]):
            right = wanted.get(name)
            if right is None or right.shape != value.shape or name not in writers:
                continue
            signal[name] = signal.get(name, 0.0) + float(np.sum(np.square(right, dtype=np.float64)))
            noise[name] = noise.get(name, 0.0) + float(np.sum(np.square(right - value, dtype=np.float64)))
            low, high = ends[name]
            beyond.setdefault(name, []).append(float(np.mean((right < low) | (right > high))))
    return tuple(
        Noise(
            layer_of(name, model),
            name,
            writers[name],
            _decibels(signal[name], noise[name]),
            float(np.mean(beyond[name])),
        )
        for name in signal
    )


def _decibels(signal: float, noise: float) -> float:
    if signal == 0 or noise == 0:
        return _MOST_DECIBELS if noise == 0 else -_MOST_DECIBELS
    return float(np.clip(10 * np.log10(signal / noise), -_MOST_DECIBELS, _MOST_DECIBELS))


def _ends(scales: np.ndarray, zero_point: int, dtype: np.dtype) -> tuple[float, float]:
    if dtype.kind not in "iu" or scales.size != 1:
        return -np.inf, np.inf
    limits = np.iinfo(dtype)
    # Half a step beyond the ends is still rounded, not cut off.
    low, high = limits.min - 0.5 - zero_point, limits.max + 0.5 - zero_point
    return float(low * scales[0]), float(high * scales[0])
