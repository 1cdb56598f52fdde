"""Shared by the classifiers that were made for ImageNet: any resolution, any number of classes, downloaded weights."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any

import numpy as np
import tf_keras
from annotated_types import Ge, Le
from pydantic.dataclasses import dataclass

from compress.data.source import STRICT, Data
from compress.errors import CompressError
from compress.models.classifier import Classifier
from compress.models.source import Origin

IMAGENET = "imagenet"
_CLASSES = 1000


@dataclass(frozen=True, config=STRICT)
class ImagenetClassifier(Classifier):
    """A classifier with ``resolution`` and ``classes`` of its own; reads raw pixels 0 to 255, gives logits.

    ``resolution``: images of another size are resized in the model; None: as large as the data's.
    ``classes``: None: as many as the data have.
    """

    resolution: Annotated[int, Ge(1), Le(10_000)] | None = None
    classes: Annotated[int, Ge(1), Le(1_000_000)] | None = None

    def architecture(self, shape: tuple[int, ...], classes: int) -> tf_keras.Model:
        """Return the untrained model for images of ``shape`` [h, w, c]."""
        image = x = tf_keras.Input(shape, name="image")
        if self.resolution is not None and shape[:2] != (self.resolution, self.resolution):
            x = tf_keras.layers.Resizing(self.resolution, self.resolution, name="resize")(x)
        if min(x.shape[1:3]) < self.smallest():
            raise CompressError(
                "model.resolution",
                expected=f"images of at least {self.smallest()} pixels: the strides of {type(self).__name__} leave "
                "nothing of smaller ones",
                received=f"images of {min(x.shape[1:3])} pixels",
                fix=f"Write model.resolution={self.smallest()} or more: images are resized in the model.",
            )
        return self.network(image, x, self.classes or classes)

    @abstractmethod
    def network(self, image: Any, x: Any, classes: int) -> tf_keras.Model:
        """Return the model from ``image`` to logits that goes on with ``x``, the images at the resolution asked for."""

    @abstractmethod
    def smallest(self) -> int:
        """Return the least resolution that the strides leave something of."""


@dataclass(frozen=True, config=STRICT)
class PretrainedClassifier(ImagenetClassifier):
    """One that Keras has, too: ``weights`` may also be ``imagenet``, those that Keras downloads.

    With other than 1000 classes the Dense layers stay random, for ``strategy=finetune`` to train.
    """

    def origin(self) -> Origin:
        """Look for the weights; a download is made when the model is built."""
        return Origin(None, None) if self.weights == IMAGENET else super().origin()

    def build(self, data: Data, seed: int) -> tf_keras.Model:
        """Return the architecture, with weights from a file or Keras' download if they are asked for."""
        model = super().build(data, seed)
        if self.weights == IMAGENET:
            resolution = self.resolution or int(model.input_shape[1])
            try:
                trained = self.pretrained(resolution, (self.classes or data.classes) == _CLASSES)
            except ValueError as error:
                raise _other_network(str(error)[:160]) from error
            except Exception as error:
                # Keras raises a bare Exception when a download fails.
                raise CompressError(
                    "model.weights",
                    expected="a working download of Keras' weights",
                    received=f"{type(error).__name__}: {str(error)[:160]}",
                    fix="Save the weights where there is a network, and name the file: model.weights=<file>; or write "
                    "model.weights=random.",
                ) from error
            self._take(model, trained)
        return model

    @abstractmethod
    def pretrained(self, resolution: int, with_classes: bool) -> tf_keras.Model:
        """Return Keras' own model with its downloaded weights; ``with_classes``: also those of its 1000 classes."""

    def adapted(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """Return the weights of Keras' model as the model here has them."""
        return values

    def _take(self, model: tf_keras.Model, trained: tf_keras.Model) -> None:
        values, own = self.adapted(trained.get_weights()), model.get_weights()
        different = [w.name for w, old, new in zip(model.weights, own, values, strict=False) if old.size != new.size]
        if different or len(values) > len(own):
            raise _other_network(f"one that differs{f' in {different[0]}' if different else ''}")
        taken = [value.reshape(old.shape) for value, old in zip(values, own, strict=False)]
        model.set_weights([*taken, *own[len(taken) :]])


def _other_network(received: str) -> CompressError:
    return CompressError(
        "model.weights",
        expected=f"a network of a form that Keras has {IMAGENET} weights for",
        received=received,
        fix="Take back what changes the network (its width, its variant, the images' size or channels); or write "
        "model.weights=random.",
    )
