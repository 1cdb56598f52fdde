"""Ranges of activations, from what a float ``.tflite`` file computes on calibration samples.

Sources: percentiles and entropy as in Migacz, 8-bit inference with TensorRT (GTC 2017), compared by Wu et al. (arXiv
2004.09602, section 5.2); squared error as in Banner et al. (arXiv 1810.05723), searched instead of assumed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from scipy.special import rel_entr

from compress.candidate import Calibration
from compress.deploy.flatbuffer import parse, serialize
from compress.metrics.tflite_file import TFLiteFile
from compress.quiet import stderr_aside

_BINS = 2048
_SHRINKS = np.linspace(0.2, 1.0, 33)
_NOTHING = 1e-30
"""A range that is narrower holds zero alone."""


@dataclass(frozen=True)
class Histogram:
    """The values of a tensor in equal bins between ``low`` and ``high``: how many in each, and their mean."""

    low: float
    high: float
    counts: np.ndarray
    means: np.ndarray


def collect(content: bytes, samples: Sequence[np.ndarray]) -> dict[str, Histogram]:
    """Return the histogram of every float tensor that the file computes, by name.

    Args:
        content: a float ``.tflite`` file for one sample at a time.
        samples: inputs [1, ...]; run through the file twice.
    """
    limits: dict[str, tuple[float, float]] = {}
    for name, values in computed_values(content, samples):
        low, high = limits.get(name, (np.inf, -np.inf))
        limits[name] = min(low, float(values.min())), max(high, float(values.max()))
    counts = {name: np.zeros(_BINS) for name in limits}
    sums = {name: np.zeros(_BINS) for name in limits}
    for name, values in computed_values(content, samples):
        low, high = limits[name]
        scale = _BINS / (high - low) if high > low else 0.0
        flat = values.reshape(-1)
        bins = np.minimum(((flat - low) * scale).astype(np.int32), _BINS - 1)
        counts[name] += np.bincount(bins, minlength=_BINS)
        sums[name] += np.bincount(bins, flat, _BINS)
    return {name: Histogram(*limits[name], counts[name], sums[name] / np.maximum(counts[name], 1.0)) for name in limits}


def computed_values(content: bytes, samples: Iterable[np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the value of every tensor of numbers that the file computes, sample after sample.

    Integers with scales are what they stand for; others are left out, and so are tensors without elements.
    """
    file = TFLiteFile(content)
    with warnings.catch_warnings(), stderr_aside(show_on_failure=False):
        warnings.simplefilter("ignore")
        interpreter = Interpreter(model_content=content, experimental_preserve_all_tensors=True)
        interpreter.allocate_tensors()
    given = interpreter.get_input_details()[0]["index"]
    # The runtime adds tensors of its own behind those of the file.
    computed = [
        (index, tensor)
        for index, tensor in enumerate(file.tensors)
        if tensor.data is None and (tensor.dtype == np.float32 or tensor.scales.size == 1)
    ]
    for sample in samples:
        interpreter.set_tensor(given, sample)
        interpreter.reset_all_variables()
        interpreter.invoke()
        for index, tensor in computed:
            value = interpreter.get_tensor(index)
            if not value.size:
                continue
            if tensor.scales.size:
                value = (value.astype(np.float32) - tensor.zero_point) * np.float32(tensor.scales[0])
            yield tensor.name, value


def choose(histogram: Histogram, calibration: Calibration, levels: int = 256) -> tuple[float, float]:
    """Return the range (low, high) that the values are quantized in; it contains zero."""
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if calibration.ranges == "minmax" or high == low:
        return low, high
    if calibration.ranges == "percentile":
        share = np.cumsum(histogram.counts) / histogram.counts.sum()
        rest = 1 - calibration.percentile / 100
        edges = np.linspace(histogram.low, histogram.high, len(histogram.counts) + 1)
        return (
            min(float(edges[np.searchsorted(share, rest, side="right")]), 0.0),
            max(float(edges[np.searchsorted(share, 1 - rest) + 1]), 0.0),
        )
    lows = low * _SHRINKS if low < 0 else np.zeros(1)
    highs = high * _SHRINKS if high > 0 else np.zeros(1)
    cost = _squared_errors if calibration.ranges == "mse" else _divergences
    pairs = np.stack(np.meshgrid(lows, highs, indexing="ij"), -1).reshape(-1, 2)
    if calibration.ranges == "entropy" and low < 0 < high:
        pairs = np.stack([lows, highs], -1)
    best = pairs[np.argmin(cost(histogram, pairs, levels))]
    return float(best[0]), float(best[1])


def of_nothing_replaced(content: bytes) -> bytes:
    """Return the calibrated file with other ranges for what is always zero: that of what is computed from it.

    Any range would do, but the runtime refuses sums with an infinitely fine summand.
    """
    model = parse(content)
    graph = model.subgraphs[0]
    ranges = {
        index: tensor.quantization
        for index, tensor in enumerate(graph.tensors)
        if tensor.quantization is not None and tensor.quantization.min is not None
    }

    def always_zero(index: int) -> bool:
        return bool(ranges[index].max[0] - ranges[index].min[0] < _NOTHING)

    for operator in reversed(graph.operators):
        for output in (index for index in operator.outputs if index in ranges):
            if always_zero(output):
                ranges[output].min, ranges[output].max = [0.0], [1.0]
            for index in (index for index in operator.inputs if index in ranges and always_zero(index)):
                ranges[index].min, ranges[index].max = list(ranges[output].min), list(ranges[output].max)
    return serialize(model)


def _squared_errors(histogram: Histogram, pairs: np.ndarray, levels: int) -> np.ndarray:
    """Return the squared error that quantization between each pair [n, 2] of limits makes."""
    low, step = pairs[:, :1], np.diff(pairs) / (levels - 1)
    offset = np.rint(low / step)
    quantized = (np.clip(np.rint(histogram.means / step), offset, offset + levels - 1)) * step
    return np.asarray((quantized - histogram.means) ** 2 @ histogram.counts)


def _divergences(histogram: Histogram, pairs: np.ndarray, levels: int) -> np.ndarray:
    """Return the divergence of the distribution quantized between each pair [n, 2] of limits from the clipped one."""
    width = (histogram.high - histogram.low) / len(histogram.counts)
    # Zero has a level of its own, whatever the range: the many zeros behind a ReLU would decide alone.
    counts = np.where(np.abs(histogram.means) < width, 0, histogram.counts)
    used = counts > 0
    found = []
    for low, high in pairs:
        inside = np.nonzero(used & (histogram.means >= low) & (histogram.means <= high))[0]
        if not len(inside):
            found.append(np.inf)
            continue
        kept = counts[inside]
        level = np.rint((histogram.means[inside] - low) / (high - low) * (levels - 1)).astype(int)
        spread = (np.bincount(level, kept, levels) / np.maximum(np.bincount(level, minlength=levels), 1))[level]
        # What lies outside is clipped to the ends: part of the truth, but not of what the levels are spread over.
        truth = kept.astype(float)
        truth[0] += counts[: inside[0]].sum()
        truth[-1] += counts[inside[-1] + 1 :].sum()
        found.append(rel_entr(truth / truth.sum(), spread / spread.sum()).sum())
    return np.array(found)
