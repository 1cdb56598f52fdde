"""What a data source gives: three parts kept apart, and the identity of what was read."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import ConfigDict

from compress.errors import CompressError
from compress.words import counted

if TYPE_CHECKING:
    import tf_keras

STRICT = ConfigDict(extra="forbid")
EvaluatedPart = Literal["test", "validation"]
"""What accuracies are measured on: what is chosen by them, as in a search, must not have seen the test part."""
_MOST_CLASSES = 100_000
NO_LABEL = -1
"""Stands for the label of a sample that has none, beside others that have one."""
_SPLIT_SEED = 20171023
"""The validation part is the same for every run seed: it belongs to the data, not to the run."""


@dataclass(frozen=True)
class Split:
    """Samples ``x`` [n, ...] (raw pixel values) and their class labels ``y`` [n]."""

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    @property
    def labelled(self) -> bool:
        """Whether there are labels."""
        return True

    def of(self, places: np.ndarray | slice) -> Split:
        """Return the samples at these places."""
        return Split(self.x[places], self.y[places])

    def take(self, count: int) -> Split:
        """Return the first ``count`` samples."""
        return self.of(slice(count))

    def shown(self, x: np.ndarray) -> Split:
        """Return the same samples in another shape."""
        return Split(x, self.y)


class Unlabelled(Split):
    """Samples without labels: whoever asks for these stops with the reason."""

    def __init__(self, x: np.ndarray) -> None:
        object.__setattr__(self, "x", x)

    @property
    def labelled(self) -> bool:
        """There are none."""
        return False

    @property
    def y(self) -> np.ndarray:  # type: ignore[override]
        """Refuse.

        Raises:
            CompressError: always.
        """
        raise CompressError(
            "data",
            expected="labels of the training images: what was asked for learns from them, or looks at them",
            received="images without labels (no y_train)",
            fix="Save y_train beside x_train; or choose what needs no labels, such as recovery=auto or "
            "recovery=distill, and a model that is trained already.",
        )

    def of(self, places: np.ndarray | slice) -> Split:
        """Return the samples at these places."""
        return Unlabelled(self.x[places])

    def shown(self, x: np.ndarray) -> Split:
        """Return the same samples in another shape."""
        return Unlabelled(x)


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images: shift by up to ``shift`` pixels (zero padding), mirror left-right."""

    shift: int = 0
    mirror: bool = False

    def __bool__(self) -> bool:
        return self.shift > 0 or self.mirror


@dataclass(frozen=True)
class Data:
    """A loaded data set. ``identity`` is a digest of every sample and label in it, and of what is done with them.

    ``labels``: names of the classes, where they are known. ``pixels``: what a black and a white pixel are in ``x``.
    ``unlabelled``: more training samples [n, ...], of which no label is known: only distillation can use them.
    ``evaluate_on``: the part that accuracies are measured on.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int
    augmentation: Augmentation
    identity: str
    labels: tuple[str, ...] = ()
    pixels: tuple[float, float] = (0.0, 255.0)
    unlabelled: np.ndarray | None = None
    evaluate_on: EvaluatedPart = "test"

    @property
    def evaluated(self) -> Split:
        """The samples that accuracies are measured on."""
        return self.test if self.evaluate_on == "test" else self.validation

    def for_distillation(self) -> Data:
        """Return the data with every training sample, labelled or not; the label of those without is ``NO_LABEL``."""
        if self.train.labelled and self.unlabelled is None:
            return self
        labels = self.train.y if self.train.labelled else np.full(len(self.train), NO_LABEL)
        x = self.train.x
        if self.unlabelled is not None:
            x = np.concatenate([x, self.unlabelled])
            labels = np.concatenate([labels, np.full(len(self.unlabelled), NO_LABEL)])
        return replace(self, train=Split(x, labels), unlabelled=None)

    def without(self, classes: Collection[int]) -> Data:
        """Return the data without the training images of these classes; the other parts stay whole."""
        stay = ~np.isin(self.train.y, list(classes))
        return replace(self, train=self.train.of(np.flatnonzero(stay)))

    def fitted_to(self, model: tf_keras.Model, where: str) -> Data:
        """Return the data in the shape that ``model`` reads, as :meth:`fitted_to_shapes` does."""
        return self.fitted_to_shapes([t.shape for t in model.inputs], [t.shape for t in model.outputs], where)

    def fitted_to_shapes(
        self, inputs: Sequence[Sequence[int | None]], outputs: Sequence[Sequence[int | None]], where: str
    ) -> Data:
        """Return the data in the shape that a model with these shapes reads: a missing channel axis of 1 is added.

        Raises:
            CompressError: if the samples do not fit the model's one input, or the labels its one output.
        """
        if len(inputs) != 1 or len(outputs) != 1:
            raise CompressError(
                where,
                expected="a model with one input and one output",
                received=f"{len(inputs)} inputs and {len(outputs)} outputs",
                fix="Cut the model down to the part that classifies.",
            )
        wanted, given, scores = tuple(inputs[0][1:]), self.train.x.shape[1:], tuple(outputs[0][1:])
        fitted = self
        if _fits((*given, 1), wanted) and not _fits(given, wanted):
            train, validation, test = (p.shown(p.x[..., None]) for p in (self.train, self.validation, self.test))
            more = None if self.unlabelled is None else self.unlabelled[..., None]
            fitted = replace(self, train=train, validation=validation, test=test, unlabelled=more)
        elif not _fits(given, wanted):
            raise CompressError(
                where,
                expected=f"samples of the model's input shape {_plain(wanted)}",
                received=f"samples of shape {given} from data {self.name}",
                fix="Choose the data that the model was trained on, or another model.",
            )
        if len(scores) != 1 or scores[0] is None or scores[0] < self.classes:
            raise CompressError(
                where,
                expected=f"a model that scores the {self.classes} classes of data {self.name}",
                received=f"an output of shape {_plain(scores)}",
                fix="Choose the data that the model was trained on, or another model.",
            )
        return fitted


def _fits(given: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(given) == len(wanted) and all(w is None or g == w for g, w in zip(given, wanted, strict=True))


def _plain(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("any" if n is None else str(n) for n in shape) + ")"


class DataSource(ABC):
    """Reads a data set. Subclasses are frozen dataclasses whose fields are the configuration."""

    @abstractmethod
    def load(self) -> Data:
        """Read the data.

        Raises:
            CompressError: if it is absent or malformed.
        """


def find_file(path: str | None, name: str, *, config: str = "data.path") -> Path | None:
    """Return where the user has the file ``name``; None if nothing is said about it.

    Looks at ``path`` (the file itself or a folder that holds it), then in ``$COMPRESS_DATA_DIR``.

    Raises:
        CompressError: if ``path`` is given and holds no such file.
    """
    if path is not None:
        given = Path(path).expanduser()
        found = given / name if given.is_dir() else given
        if not found.is_file():
            raise CompressError(
                config,
                expected=f"the file {name}, or a folder that holds it",
                received=f"{path} (no such file)",
                fix=f"Write {config}=/folder/with/{Path(name).name}.",
            )
        return found
    folder = os.environ.get("COMPRESS_DATA_DIR")
    if folder and (Path(folder) / name).is_file():
        return Path(folder) / name
    return None


def make_data(
    name: str,
    train: Split,
    test: Split,
    *,
    validation: Split | None = None,
    validation_fraction: float = 0.1,
    augmentation: Augmentation | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
    evaluate_on: EvaluatedPart = "test",
    labels: Sequence[str] = (),
    pixels: tuple[float, float] | None = None,
    unlabelled: np.ndarray | None = None,
) -> Data:
    """Check the arrays, hold out a validation part where none is given, and build the data set.

    The split is the same for every run: it depends on nothing but the number of training samples.
    ``evaluate_on``: the part that accuracies are measured on.
    ``labels``: names of the classes. ``pixels``: what black and white are; None: as the training samples look.
    ``unlabelled``: more training samples; also ``train``, and with it ``validation``, may be :class:`Unlabelled`.

    Raises:
        CompressError: if shapes, label counts or values cannot be right.
    """
    more = None if unlabelled is None else Unlabelled(unlabelled)
    for part, split in (("train", train), ("validation", validation), ("test", test), ("unlabelled", more)):
        if split is not None:
            _check(name, part, split, train)
    if augmentation and train.x.ndim not in (3, 4):
        raise CompressError(
            f"data {name}",
            expected="images of shape [n, h, w] or [n, h, w, c] to shift or mirror",
            received=f"samples of shape {train.x.shape[1:]}",
            fix="Write data.shift=0 data.mirror=false.",
        )
    if validation is None:
        order = np.random.default_rng(_SPLIT_SEED).permutation(len(train))
        held_out = max(1, round(len(train) * validation_fraction))
        if held_out >= len(train):
            raise CompressError(
                f"data {name}",
                expected="at least two training samples",
                received=str(len(train)),
                fix="Bring more data.",
            )
        # Sorted, so that reading stays sequential and a limit takes an unbiased prefix of the original order.
        inside, outside = np.sort(order[held_out:]), np.sort(order[:held_out])
        train, validation = train.of(inside), train.of(outside)
    train = train.take(train_limit) if train_limit else train
    validation = validation.take(max(1, train_limit // 4)) if train_limit else validation
    test = test.take(test_limit) if test_limit else test
    if evaluate_on == "validation" and not validation.labelled:
        raise CompressError(
            "data.evaluate_on",
            expected="a validation part with labels",
            received=f"data {name}, whose training images have none",
            fix="Write data.evaluate_on=test, or save x_val and y_val beside x_train.",
        )
    digest = hashlib.sha256()
    parts = [split for split in (train, validation, test, more) if split is not None]
    for split in parts:
        for array in (split.x, split.y) if split.labelled else (split.x,):
            digest.update(repr((array.shape, array.dtype.str)).encode())
            digest.update(np.ascontiguousarray(array).data)
    classes = int(max(split.y.max() for split in parts if split.labelled)) + 1
    augmentation = augmentation or Augmentation()
    digest.update(repr(augmentation).encode())
    if evaluate_on != "test":
        digest.update(evaluate_on.encode())
    _check_descriptions(name, labels, classes, pixels)
    pixels = _apparent_pixels(train.x) if pixels is None else pixels
    return Data(
        name,
        train,
        validation,
        test,
        classes,
        augmentation,
        digest.hexdigest(),
        tuple(labels),
        (pixels[0], pixels[1]),
        unlabelled,
        evaluate_on,
    )


def _apparent_pixels(x: np.ndarray) -> tuple[float, float]:
    """Return what black and white are in images like these, by the usual conventions."""
    low, high = float(x.min()), float(x.max())
    if x.dtype.kind != "f" or high > 1.0:
        return 0.0, 255.0
    return (-1.0 if low < 0 else 0.0), 1.0


def _check_descriptions(name: str, labels: Sequence[str], classes: int, pixels: tuple[float, float] | None) -> None:
    unprintable = [text for text in labels if not text.strip() or not text.isprintable()]
    if labels and (len(labels) < classes or unprintable):
        short = len(labels) < classes
        raise CompressError(
            f"data {name}, labels",
            expected=f"a name for each of the {classes} classes" if short else "names that can be printed in one line",
            received=f"{len(labels)} names" if short else repr(unprintable[:3]),
            fix="Save an array of strings, the name of class 0 first, or none.",
        )
    if pixels is not None and not (np.isfinite(pixels).all() and pixels[0] < pixels[1]):
        raise CompressError(
            "data.pixels",
            expected="two numbers: what a black pixel is in the arrays, and, larger, what a white one is",
            received=str(list(pixels)),
            fix="Write for example data.pixels=[0,255].",
        )


def _check(name: str, part: str, split: Split, train: Split) -> None:
    def fail(expected: str, received: str, fix: str) -> CompressError:
        return CompressError(f"data {name}, {part} part", expected=expected, received=received, fix=fix)

    x = split.x
    if x.ndim < 2 or len(x) == 0:
        raise fail("samples of shape [n, ...], n > 0", f"an array of shape {x.shape}", "Check the arrays.")
    if split.labelled:
        _check_labels(x, split.y, fail)
    if x.shape[1:] != train.x.shape[1:]:
        raise fail(
            f"samples of shape {train.x.shape[1:]}, as in the train part",
            f"{x.shape[1:]}",
            "Use one shape for all parts.",
        )
    if part == "unlabelled" and x.dtype != train.x.dtype:
        raise fail(f"samples of type {train.x.dtype}, as in the train part", f"{x.dtype}", "Convert one of the two.")
    if x.dtype.kind not in "fiub":
        raise fail("numeric samples", f"dtype {x.dtype}", "Convert the samples to float32 or uint8.")
    if x.dtype.itemsize > 8:
        raise fail("samples of at most 64 bits", f"dtype {x.dtype}", "Convert the samples to float32 or uint8.")
    if x.dtype.kind == "f" and not _finite(x).all():
        raise fail(
            "samples that are finite as float32",
            f"{int((~_finite(x)).sum())} NaN, infinite or too large values",
            "Clean the data before compressing.",
        )


def _check_labels(x: np.ndarray, y: np.ndarray, fail: Callable[[str, str, str], CompressError]) -> None:
    if y.ndim == 0:
        raise fail("integer class labels of shape [n]", "a single number", "Save one label for each sample.")
    if len(x) != len(y):
        raise fail(
            "one label for each sample",
            f"{counted(len(x), 'sample')} and {counted(len(y), 'label')}",
            "Check the arrays.",
        )
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise fail(
            "integer class labels of shape [n]",
            f"{y.dtype} labels of shape {y.shape}",
            "Turn one-hot labels into class numbers with argmax(axis=1).",
        )
    if int(y.min()) < 0 or int(y.max()) > _MOST_CLASSES:
        wrong = int(y.min()) if int(y.min()) < 0 else int(y.max())
        raise fail(f"labels from 0 to {_MOST_CLASSES}", f"the label {wrong}", "Number the classes from 0.")


def _finite(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.isfinite(x.astype(np.float32, copy=False))
