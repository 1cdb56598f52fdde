"""Fully connected networks of two hidden layers: the teacher and the student of Hinton, Vinyals, Dean (1503.02531)."""

from __future__ import annotations

from typing import Annotated

import tf_keras
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.dataclasses import dataclass

from compress.data.source import STRICT
from compress.models.classifier import Classifier

layers = tf_keras.layers


@dataclass(frozen=True, config=STRICT)
class Mlp(Classifier):
    """Dense layers of ``hidden`` rectified linear units each, and one of the classes; reads raw pixels 0 to 255.

    ``dropout``: share of the hidden units dropped in training, ``input_dropout``: of the pixels. ``max_norm``: the
    weights into a unit are no longer than this vector length (Srivastava et al., dropout); None: any.
    """

    hidden: Annotated[tuple[Annotated[int, Gt(0), Le(100_000)], ...], MinLen(1)] = (800, 800)
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    input_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    max_norm: Annotated[float, Gt(0)] | None = None

    def architecture(self, shape: tuple[int, ...], classes: int) -> tf_keras.Model:
        """Return the untrained model."""
        limit = None if self.max_norm is None else tf_keras.constraints.MaxNorm(self.max_norm)
        image = tf_keras.Input(shape, name="image")
        x = layers.Rescaling(1.0 / 255.0, name="rescale")(image)
        x = layers.Flatten(name="flatten")(x)
        x = self._dropped(x, self.input_dropout, "input_dropout")
        for index, units in enumerate(self.hidden, start=1):
            name = f"fc{index}"
            x = layers.Dense(
                units, activation="relu", kernel_initializer="he_normal", kernel_constraint=limit, name=name
            )(x)
            x = self._dropped(x, self.dropout, f"{name}_dropout")
        width = "_".join(str(units) for units in self.hidden)
        return tf_keras.Model(image, layers.Dense(classes, name="logits")(x), name=f"mlp_{width}")

    @staticmethod
    def _dropped(x: tf_keras.KerasTensor, share: float, name: str) -> tf_keras.KerasTensor:
        return layers.Dropout(share, name=name)(x) if share else x
