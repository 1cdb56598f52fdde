"""An image classifier that is built for its data's shape; its weights file, if any, is one that Keras wrote."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

import tf_keras
from pydantic.dataclasses import dataclass

from compress.data.source import STRICT, Data
from compress.errors import CompressError
from compress.models.source import TrainableSource


@dataclass(frozen=True, config=STRICT)
class Classifier(TrainableSource):
    """Shared by such models: a subclass gives the architecture."""

    def build(self, data: Data, seed: int) -> tf_keras.Model:
        """Return the architecture for the data's shape, with weights from a file if one is named."""
        tf_keras.utils.set_random_seed(seed)
        shape = data.train.x.shape[1:]
        if len(shape) not in (2, 3):
            raise CompressError(
                "model",
                expected=f"images of shape [h, w] or [h, w, c], which {type(self).__name__} reads",
                received=f"samples of shape {shape} from data {data.name}",
                fix="Reshape the samples to images, or bring your own model with model=file.",
            )
        try:
            model = self.architecture(shape if len(shape) == 3 else (*shape, 1), data.classes)
        except ValueError as error:
            # Keras finds no room left for a convolution or a pooling.
            raise CompressError(
                "model",
                expected=f"images large enough for {type(self).__name__}",
                received=f"images of shape {shape} from data {data.name}",
                fix="Choose larger images, or another model.",
            ) from error
        file = self.origin().file
        if file is not None:
            _load_weights(model, file)
        return model

    @abstractmethod
    def architecture(self, shape: tuple[int, ...], classes: int) -> tf_keras.Model:
        """Return the untrained model for images of ``shape`` [h, w, c]."""


def _load_weights(model: tf_keras.Model, file: Path) -> None:
    try:
        model.load_weights(str(file))
    except (ValueError, OSError, KeyError) as error:
        raise CompressError(
            f"model.weights {file}",
            expected=f"weights saved by Keras for {model.name}",
            received=str(error)[:200],
            fix="Save them with model.save_weights('x.weights.h5'), or write model.weights=scratch.",
        ) from error
