"""Arrays from ``.npz`` files: a user's own, and MNIST, Fashion-MNIST and CIFAR-10 in Keras' layout."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Le
from pydantic.dataclasses import dataclass

from compress.data.source import (
    STRICT,
    Augmentation,
    Data,
    DataSource,
    EvaluatedPart,
    Split,
    Unlabelled,
    find_file,
    make_data,
)
from compress.errors import CompressError

_DAMAGED = (
    *(OSError, ValueError, TypeError, EOFError, NotImplementedError, RuntimeError, MemoryError),
    *(zlib.error, zipfile.BadZipFile),
)
"""What reading a damaged, encrypted or lying file raises."""
_DIGITS = tuple("0123456789")
_LABELS = {
    "mnist": _DIGITS,
    "fashion_mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}
"""Names of the classes, as the data sets' authors give them."""


@dataclass(frozen=True, config=STRICT)
class Npz(DataSource):
    """A user's arrays: ``x_train, y_train, x_test, y_test``.

    If given, also ``x_val, y_val``, ``x_unlabelled``, ``labels``.

    Without ``y_train`` training images have no labels: distillation needs none. ``x_unlabelled``: more images for it.
    ``labels``: names of the classes. ``pixels``: what a black and a white pixel are in the arrays.
    """

    path: str | None = None
    recovery_epochs: Annotated[float, Ge(0)] = 1.0
    shift: Annotated[int, Ge(0), Le(1024)] = 0
    mirror: bool = False
    train_limit: Annotated[int, Gt(0)] | None = None
    test_limit: Annotated[int, Gt(0)] | None = None
    evaluate_on: EvaluatedPart = "test"
    pixels: tuple[float, float] | None = None

    def load(self) -> Data:
        """Read the arrays."""
        if self.path is None:
            raise CompressError(
                "data.path",
                expected="the path of an .npz file",
                received="nothing",
                fix="Write data=npz data.path=/path/to/arrays.npz.",
            )
        file = Path(self.path).expanduser()
        if not file.is_file():
            raise CompressError(
                "data.path",
                expected="an .npz file",
                received=f"{self.path} ({'a folder' if file.is_dir() else 'no such file'})",
                fix="Write data=npz data.path=/path/to/arrays.npz.",
            )
        return self._build(file.stem, read_arrays(file))

    def _build(self, name: str, arrays: dict[str, np.ndarray], labels: Sequence[str] = ()) -> Data:
        def part(which: str) -> Split:
            labels = arrays.get(f"y_{which}")
            return Unlabelled(arrays[f"x_{which}"]) if labels is None else Split(arrays[f"x_{which}"], _labels(labels))

        return make_data(
            name,
            part("train"),
            part("test"),
            validation=part("val") if "x_val" in arrays else None,
            augmentation=Augmentation(self.shift, self.mirror),
            train_limit=self.train_limit,
            test_limit=self.test_limit,
            evaluate_on=self.evaluate_on,
            labels=_names(arrays["labels"], name) if "labels" in arrays else labels,
            pixels=self.pixels,
            unlabelled=arrays.get("x_unlabelled"),
        )


@dataclass(frozen=True, config=STRICT)
class KerasDataset(Npz):
    """A data set that Keras can download: read from a file where there is one, else downloaded."""

    dataset: Literal["mnist", "fashion_mnist", "cifar10"] = "mnist"

    def load(self) -> Data:
        """Read ``<dataset>.npz`` from ``path`` or ``$COMPRESS_DATA_DIR``, else use Keras' download."""
        file = find_file(self.path, f"{self.dataset}.npz")
        arrays = self._download() if file is None else read_arrays(file)
        return self._build(self.dataset, arrays, _LABELS[self.dataset])

    def _download(self) -> dict[str, np.ndarray]:
        import tf_keras

        try:
            (x_train, y_train), (x_test, y_test) = getattr(tf_keras.datasets, self.dataset).load_data()
        except Exception as error:
            # Keras raises a bare Exception when a download fails.
            raise CompressError(
                f"data {self.dataset}",
                expected=f"{self.dataset}.npz in data.path or $COMPRESS_DATA_DIR, or a working download",
                received=f"no file, and Keras' download failed ({type(error).__name__}: {str(error)[:120]})",
                fix=f"Set COMPRESS_DATA_DIR to the folder that holds {self.dataset}.npz.",
            ) from error
        return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an ``.npz`` file; pickled objects are refused.

    Raises:
        CompressError: if the file is not an ``.npz`` archive or lacks an array.
    """
    needed = ("x_train", "x_test", "y_test")
    optional = ("y_train", "x_val", "y_val", "labels", "x_unlabelled")
    try:
        with path.open("rb") as file:
            start = file.read(6)
        if not start.startswith(b"PK"):
            kind = "one .npy array" if start == b"\x93NUMPY" else f"a file that begins with {start!r}"
            raise CompressError(
                f"data.path {path}",
                expected="an .npz archive of plain arrays",
                received=kind,
                fix="Save them with numpy.savez(path, x_train=..., y_train=..., x_test=..., y_test=...).",
            )
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in needed if key not in archive.files]
            if "y_val" in archive.files and "x_val" not in archive.files:
                missing.append("x_val")
            elif "x_val" in archive.files and "y_train" in archive.files and "y_val" not in archive.files:
                missing.append("y_val")
            if missing:
                raise CompressError(
                    f"data.path {path}",
                    expected=f"the arrays {', '.join(needed)}, and y_train unless the images have no labels",
                    received=f"{', '.join(archive.files)} (without {', '.join(missing)})",
                    fix="Save them with numpy.savez(path, x_train=..., y_train=..., x_test=..., y_test=...).",
                )
            arrays = {key: archive[key] for key in archive.files if key in (*needed, *optional)}
            strange = [key for key, value in arrays.items() if not isinstance(value, np.ndarray)]
            if strange:
                raise ValueError(f"{strange[0]} is no array")
            return arrays
    except _DAMAGED as error:
        raise CompressError(
            f"data.path {path}",
            expected="an .npz archive of plain arrays",
            received=f"{type(error).__name__}: {str(error)[:160]}",
            fix="Save it again with numpy.savez.",
        ) from error


def _names(labels: np.ndarray, name: str) -> list[str]:
    """Return the names of the classes that a file gives."""
    if labels.ndim != 1 or labels.dtype.kind not in "USiu":
        raise CompressError(
            f"data {name}, labels",
            expected="an array of strings of shape [classes]",
            received=f"{labels.dtype} of shape {labels.shape}",
            fix="Save labels=numpy.array(['first class', 'second class']), or leave it out.",
        )
    return [text.decode(errors="replace") if isinstance(text, bytes) else str(text) for text in labels.tolist()]


def _labels(y: np.ndarray) -> np.ndarray:
    flat = y.reshape(-1) if y.ndim == 2 and y.shape[1] == 1 else y
    return flat.astype(np.int64) if flat.dtype.kind in "iu" else flat
