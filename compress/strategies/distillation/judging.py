"""How good teachers and students are, and whether they read the same values: looked at before anything is trained.

Only the validation part is looked at: its images are not trained on, and are not those that the report measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
import tf_keras

from compress.data.source import Data, Split
from compress.errors import CompressError
from compress.graph.softmax import ending, gives_probabilities, logits_of
from compress.metrics.accuracy import accuracy
from compress.words import counted

_JUDGED = 1000
"""Validation images that accuracies are taken of, at most."""
_SCALED = 256
_BATCH = 256
_CLEARLY, _ERRORS = 3.0, 2.0
"""Percentage points, and standard errors of the paired difference, that a scaling of the images must gain to be what a
model expects."""
_POOR, _FAR = 60.0, 20.0
"""A model that stays below this in every scaling must gain more points: what knows little gains some by chance."""
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pixels from 0 to 1, by channel."""
_ENDINGS = ("linear", "softmax")


def judged_part(data: Data) -> Split | None:
    """Return the images that accuracies are taken of; None if no labels are known."""
    return data.validation.take(_JUDGED) if data.validation.labelled else None


def probabilities(models: Sequence[tf_keras.Model], x: np.ndarray) -> np.ndarray:
    """Return the mean of the models' probabilities [n, classes]."""
    total = np.zeros(0)
    for model in models:
        softmax, batch = gives_probabilities(model), model.inputs[0].shape[0] or _BATCH
        # Called as it is: compiling it would take longer than so few images do.
        given = [
            tf.nn.softmax(logits_of(tf.nest.flatten(model(part, training=False))[0], softmax)).numpy()
            for part in (tf.constant(x[i : i + batch], tf.float32) for i in range(0, len(x), batch))
        ]
        total = np.concatenate(given) if not total.size else total + np.concatenate(given)
    return np.asarray(total / len(models))


def accuracy_of(models: Sequence[tf_keras.Model], split: Split) -> float:
    """Return the accuracy of one model, or of several together, in percent."""
    return accuracy(probabilities(models, split.x), split.y)


def require_same_classes(model: tf_keras.Model, name: str, reference: tf_keras.Model, where: str, role: str) -> None:
    """Refuse a teacher or a student that reads or gives something else than the reference model.

    Raises:
        CompressError: naming both.
    """
    # How many samples a file takes at once does not matter.
    ours, theirs = ((m.input_shape[1:], m.output_shape[1:]) for m in (reference, model))
    if ours != theirs:
        raise CompressError(
            where,
            expected=f"a {role} of the inputs and classes of {reference.name}: {_shapes(*ours)}",
            received=f"{name}: {_shapes(*theirs)}",
            fix="Name a model for the same images and classes.",
        )
    if ending(model) not in (*_ENDINGS, ending(reference)):
        raise CompressError(
            where,
            expected=f"a {role} whose outputs are logits or a softmax's probabilities of one class of several",
            received=f"{name}, which ends in {ending(model)}",
            fix="Save the model with a last layer that has no activation, or softmax.",
        )


def _shapes(inputs: tuple[int | None, ...], outputs: tuple[int | None, ...]) -> str:
    kept = [", ".join("any" if size is None else str(size) for size in shape) for shape in (inputs, outputs)]
    return f"({kept[0]}) to ({kept[1]}), {outputs[-1]} classes"


@dataclass(frozen=True)
class _Reading:
    """The values that a model is best at: how they follow from the data's, in words, and its accuracy on both."""

    scale: str
    accuracy: float
    plain: float

    def __str__(self) -> str:
        if self.scale == _PLAIN:
            return f"the values as they are ({self.plain:.1f} %)"
        return f"{self.scale} ({self.accuracy:.1f} %, and {self.plain:.1f} % of the values as they are)"


_PLAIN = ""


def require_same_values(teacher: tf_keras.Model, name: str, reference: tf_keras.Model, data: Data, where: str) -> None:
    """Refuse a teacher that expects its inputs in another range than the reference model does.

    A model carries its preprocessing; one that does not was trained on values that were scaled outside it. No file
    says so, but its answers do: each of the two is asked about validation images in the scalings that are in use.

    Raises:
        CompressError: naming both, with accuracies.
    """
    if not data.validation.labelled:
        return
    theirs, ours = _reading(teacher, data), _reading(reference, data)
    if theirs.plain >= ours.plain and ours.scale == _PLAIN:
        return
    if theirs.scale != ours.scale:
        count = min(_SCALED, len(data.validation))
        raise CompressError(
            where,
            expected=f"a teacher that reads what {reference.name} reads: {ours}",
            received=f"{name}, which reads {theirs}, of {counted(count, 'validation image')}",
            fix="Put the preprocessing into the model (a Rescaling layer at its start) and save it again.",
        )


def _reading(model: tf_keras.Model, data: Data) -> _Reading:
    part = data.validation.take(_SCALED)
    right = probabilities([model], part.x).argmax(axis=1) == part.y
    plain = 100 * float(right.mean())
    best = _Reading(_PLAIN, plain, plain)
    for scale, x in _scalings(part.x.astype(np.float32), data).items():
        scaled = probabilities([model], x).argmax(axis=1) == part.y
        found = 100 * float(scaled.mean())
        won, lost = int((scaled & ~right).sum()), int((right & ~scaled).sum())
        gain = _FAR if found < _POOR else _CLEARLY
        if found > max(best.accuracy, plain + gain) and won - lost > _ERRORS * np.sqrt(won + lost):
            best = _Reading(scale, found, plain)
    return best


def _scalings(x: np.ndarray, data: Data) -> Mapping[str, np.ndarray]:
    """Return the images in the ranges that are in use, with words for each."""
    low, high = data.pixels
    train = data.train.take(_JUDGED).x.astype(np.float32)
    unit = (x - low) / (high - low)
    found = {
        "values from 0 to 1": unit,
        "values from -1 to 1": 2 * unit - 1,
        "values from 0 to 255": 255 * unit,
        "values less the training images' mean, divided by their deviation": (x - train.mean()) / (train.std() + 1e-7),
    }
    if x.ndim == 4 and x.shape[-1] == 3:
        found["values less ImageNet's mean, divided by its deviation"] = (unit - _MEAN) / np.array(_DEVIATION)
    return {name: value.astype(np.float32) for name, value in found.items() if not np.allclose(value, x)}
