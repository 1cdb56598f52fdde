"""Runs a model file on photos: ``.tflite``, ``.cmp`` or ``.keras``, as the file itself says that it is to be done."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.deploy.interface import Interface, TensorType, interface_of, probabilities
from compress.deploy.metadata import Metadata, read_metadata
from compress.deploy.packed import Packed, read_packed
from compress.deploy.verification import operators_in
from compress.errors import CompressError
from compress.metrics.accuracy import file_outputs, keras_outputs
from compress.metrics.tflite_file import TFLiteFile

if TYPE_CHECKING:
    import tf_keras

SUFFIXES = (".tflite", ".cmp", ".keras")
_SOFTMAX = ("softmax", "sigmoid")


@dataclass(frozen=True)
class Predictor:
    """A model that can be asked.

    ``described``: whether anything says what its inputs and classes are; if not, pixels go in as 0 to 255.
    """

    interface: Interface
    metadata: Metadata
    described: bool
    run: Callable[[np.ndarray], np.ndarray]
    """Scores [n, classes] of inputs [n, ...]."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """A name for each output."""
        return self.interface.class_names

    def of_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Return the probabilities [n, classes] of images [n, rows, columns, channels] with values of 0 to 255."""
        mean, std = (np.asarray(values, np.float32) for values in (self.metadata.mean, self.metadata.std))
        return self.of_values((pixels.astype(np.float32) - mean) / std)

    def of_values(self, values: np.ndarray) -> np.ndarray:
        """Return the probabilities [n, classes] of inputs as the model reads them."""
        shaped = values.astype(np.float32).reshape(len(values), *self.interface.input.shape[1:])
        return probabilities(self.run(shaped), self.interface.scores)


def load_predictor(path: Path) -> Predictor:
    """Return the predictor of a model's file.

    What its pixels and classes are is read from its metadata; a file without any is described by the report of the
    run that lies beside it.

    Raises:
        CompressError: if the file is missing, damaged, of another kind, or no classifier.
    """
    if path.suffix not in SUFFIXES or not path.is_file():
        raise CompressError(
            f"model={path}",
            expected=f"a model's file: {', '.join(SUFFIXES)}",
            received=f"the ending {path.suffix or '(none)'}" if path.exists() else "no such file",
            fix="Name the file, e.g. model=out/model.tflite." if path.exists() else "Check the path.",
        )
    report = _report_of(path)
    if path.suffix == ".keras":
        return _of_keras(path, report)
    if path.suffix == ".tflite":
        return _of_tflite(path.read_bytes(), path, report)
    packed = read_packed(path.read_bytes(), str(path))
    if packed.kind == "tflite":
        from compress.deploy.packed_tflite import to_tflite

        return _of_tflite(to_tflite(packed, str(path)), path, report)
    return _of_packed_keras(packed, path, report)


def _of_tflite(content: bytes, path: Path, report: Interface | None) -> Predictor:
    file = TFLiteFile(content, f"model={path}")
    strange = [
        use.name for use in operators_in(content, f"model={path}") if not use.builtin or use.name.startswith("BUILTIN_")
    ]
    if strange:
        raise CompressError(
            f"model={path}",
            expected="a file whose operators LiteRT has kernels for",
            received=f"one with {', '.join(strange)}",
            fix="Put a layer of other operations in its place and export the model again, or run the file in a program "
            "that registers a kernel for it.",
        )
    metadata = read_metadata(content)
    described = _fitting(report, interface_of(file, f"model={path}"))
    if metadata is not None:
        interface = interface_of(file, metadata.name or path.stem, labels=metadata.labels)
    else:
        interface = described or interface_of(file, path.stem)

    def run(values: np.ndarray) -> np.ndarray:
        with tempfile.TemporaryDirectory(prefix="compress-") as folder:
            copy = Path(folder, "model.tflite")
            copy.write_bytes(content)
            try:
                return file_outputs(copy, values)
            except CompressError as error:
                raise CompressError(
                    f"model={path}",
                    expected="a file that LiteRT accepts",
                    received=error.received,
                    fix="Export the model again, with the version of LiteRT that runs it.",
                ) from error

    known = metadata is not None or described is not None
    return Predictor(interface, metadata or _metadata(interface), known, run)


def _of_keras(path: Path, report: Interface | None) -> Predictor:
    from compress.quiet import import_tensorflow

    import_tensorflow()
    from compress.models.file import load_model_file

    model = load_model_file(path, allow_code=False)
    plain = _keras_interface(model, path)
    described = _fitting(report, plain)
    interface = described or plain
    return Predictor(
        interface, _metadata(interface), described is not None, lambda values: keras_outputs(model, values)
    )


def _of_packed_keras(packed: Packed, path: Path, report: Interface | None) -> Predictor:
    from compress.deploy.packed_keras import to_keras

    with tempfile.TemporaryDirectory(prefix="compress-") as folder:
        file = Path(folder, f"{path.stem}.keras")
        file.write_bytes(to_keras(packed, str(path)))
        return _of_keras(file, report)


def _keras_interface(model: tf_keras.Model, path: Path) -> Interface:
    shapes = [tuple(tensor.shape) for tensor in (*model.inputs, *model.outputs)]
    if len(shapes) != 2 or len(shapes[1]) != 2 or any(size is None for shape in shapes for size in shape[1:]):
        raise CompressError(
            f"model={path}",
            expected="a classifier: one input of known size, and one output of shape [n, classes]",
            received=f"inputs and outputs of shapes {shapes}",
            fix="Cut the model down to the part that classifies.",
        )
    source, target = (TensorType((1, *shape[1:]), "float32") for shape in shapes)
    activation = getattr(getattr(model.layers[-1], "activation", None), "__name__", "")
    softmax = activation in _SOFTMAX or type(model.layers[-1]).__name__ == "Softmax"
    return Interface(path.stem, source, target, (0.0, 255.0), (), "probabilities" if softmax else "logits")


def _report_of(path: Path) -> Interface | None:
    """Return the interface in the report of the run that made the file, if it lies beside it."""
    try:
        report: dict[str, Any] = json.loads((path.parent / "report.json").read_text())
        of_run = path.name in report["artifacts"].values()
        return Interface.from_json(report["interface"]) if of_run else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _fitting(report: Interface | None, found: Interface) -> Interface | None:
    """Return the report's interface if the file is one of its shapes: another file may have taken its name."""
    if report is None:
        return None
    same = (report.input.shape, report.output.shape) == (found.input.shape, found.output.shape)
    return report if same else None


def _metadata(interface: Interface) -> Metadata:
    return Metadata(interface.name, (interface.mean,), (interface.std,), interface.labels)
