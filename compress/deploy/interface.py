"""What goes into an exported file and what comes out: all that a program needs to use it on a photo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from compress.errors import CompressError
from compress.metrics.tflite_file import TFLiteFile

Scores = Literal["probabilities", "logits"]
_PASSED = ("DEQUANTIZE", "QUANTIZE", "RESHAPE")
"""Operators that leave what values mean."""
_BRIGHTEST = 255.0
_TYPES = ("float32", "int8", "uint8", "int16", "int32", "int64")


@dataclass(frozen=True)
class TensorType:
    """Shape (batch 1) and number type of a tensor at the border of a file; a scale of 0 means plain numbers."""

    shape: tuple[int, ...]
    dtype: str
    scale: float = 0.0
    zero_point: int = 0


@dataclass(frozen=True)
class Interface:
    """A classifier's input and output.

    ``pixels``: the input values that stand for a black and a white pixel. ``labels``: names of the classes; empty where
    they are not known. ``scores``: whether the outputs are probabilities, or logits that softmax makes such.
    """

    name: str
    input: TensorType
    output: TensorType
    pixels: tuple[float, float]
    labels: tuple[str, ...]
    scores: Scores

    @property
    def channels(self) -> int | None:
        """The input's color channels, 1 or 3; None if it is no image."""
        shape = self.input.shape
        if len(shape) == 3:
            return 1
        return shape[3] if len(shape) == 4 and shape[3] in (1, 3) else None

    @property
    def mean(self) -> float:
        """What to subtract from a pixel of 0 to 255 before the division by ``std``."""
        return 0.0 - self.pixels[0] * self.std

    @property
    def std(self) -> float:
        """What a pixel of 0 to 255, less the mean, is divided by to give the input's value."""
        return _BRIGHTEST / (self.pixels[1] - self.pixels[0])

    @property
    def class_names(self) -> tuple[str, ...]:
        """A name for each output; the class's number where there is no label."""
        classes = self.output.shape[-1]
        return (*self.labels, *map(str, range(len(self.labels), classes)))[:classes]

    def to_json(self) -> dict[str, Any]:
        """Return it under the keys of the report."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Interface:
        """Rebuild from :meth:`to_json`."""
        ends = {
            key: TensorType(**{**value[key], "shape": tuple(int(size) for size in value[key]["shape"])})
            for key in ("input", "output")
        }
        low, high = value["pixels"]
        return cls(value["name"], **ends, pixels=(low, high), labels=tuple(value["labels"]), scores=value["scores"])


def interface_of(
    file: TFLiteFile, name: str, pixels: tuple[float, float] = (0.0, _BRIGHTEST), labels: Sequence[str] = ()
) -> Interface:
    """Return the interface of a file that classifies; ``pixels`` and ``labels`` as the data have them.

    Raises:
        CompressError: if it has more than one input or output, or no scores [1, classes].
    """
    inputs, outputs = ([_type(file, index) for index in indices] for indices in (file.inputs, file.outputs))
    if len(inputs) != 1 or len(outputs) != 1 or len(outputs[0].shape) != 2:
        shapes = " and ".join(str([list(end.shape) for end in ends]) for ends in (inputs, outputs))
        raise CompressError(
            name,
            expected="a classifier: one input, and one output of shape [1, classes]",
            received=f"inputs and outputs of shapes {shapes}",
            fix="Cut the model down to the part that classifies, and export it again.",
        )
    strange = [end.dtype for end in (*inputs, *outputs) if end.dtype not in _TYPES]
    if strange:
        raise CompressError(
            name,
            expected=f"inputs and outputs of type {', '.join(_TYPES)}",
            received=strange[0],
            fix="Export it again with inputs and outputs of one of these types.",
        )
    scores: Scores = "probabilities" if _last_operator(file) in ("SOFTMAX", "LOGISTIC") else "logits"
    return Interface(name, inputs[0], outputs[0], pixels, tuple(labels[: outputs[0].shape[-1]]), scores)


def _type(file: TFLiteFile, index: int) -> TensorType:
    tensor = file.tensors[index]
    scale = float(tensor.scales[0]) if tensor.scales.size and tensor.dtype.kind in "iu" else 0.0
    return TensorType(tensor.shape, tensor.dtype.name, scale, tensor.zero_point if scale else 0)


def _last_operator(file: TFLiteFile) -> str:
    """Return the operator that computes the scores."""
    writers = {index: operator for operator in file.operators for index in operator.outputs}
    found = writers.get(file.outputs[0])
    while found is not None and found.name in _PASSED and found.inputs[0] in writers:
        found = writers[found.inputs[0]]
    return "" if found is None else found.name


def probabilities(outputs: np.ndarray, scores: Scores) -> np.ndarray:
    """Return the probabilities [n, classes] that scores stand for."""
    if scores == "probabilities":
        return outputs
    powers = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))
