"""What a distillation loss is: what it compares of student and teacher, how it is normalised, what it learns itself.

A loss is a frozen dataclass; its fields are its settings in ``recovery.losses``. Each kind is one file of
:mod:`compress.strategies.distillation.losses`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from typing import Annotated, ClassVar

import tensorflow as tf
from annotated_types import Ge, Le
from pydantic.dataclasses import dataclass

from compress.data.source import STRICT
from compress.strategies.distillation.connector import Connector
from compress.strategies.distillation.pairing import Layers, Pair, stage_pairs


@dataclass(frozen=True, config=STRICT)
class Loss(ABC):
    """A loss between a student and its teacher."""

    weight: Annotated[float, Ge(0), Le(1e9)] = 1.0

    name: ClassVar[str]


class LogitsLoss(Loss):
    """A loss of what the networks say about the classes."""

    @abstractmethod
    def value(self, logits: tf.Tensor, targets: tf.Tensor, labels: tf.Tensor, temperature: float) -> tf.Tensor:
        """Return the loss, a scalar.

        Args:
            logits: the student's [b, classes].
            targets: logarithms of the probabilities of the teachers, softened by the temperature [b, classes].
            labels: class numbers [b].
            temperature: what the student's logits are to be divided by.
        """


@dataclass(frozen=True, config=STRICT)
class LayerLoss(Loss):
    """A loss of what inner layers give.

    Attributes:
        pairs: student's layer -> teacher's layer; None: as ``recovery.pairs`` says, or else chosen by the loss.
    """

    pairs: Mapping[str, str] | None = None

    least: ClassVar[int] = 1
    """How many pairs of layers it takes."""
    samples: ClassVar[tuple[int, int | None]] = (1, None)
    """How many samples of a batch it takes, and how many it can; None: any number."""

    def choose(self, teacher: Layers, student: Layers) -> list[Pair]:
        """Return the pairs that are compared where no rule says which: the ends of the networks' stages."""
        return stage_pairs(teacher, student)

    @abstractmethod
    def misfit(self, pair: Pair) -> str | None:
        """Say why the two layers cannot be compared."""

    def connectors(self, pair: Pair, seed: int) -> tuple[Connector | None, Connector | None]:
        """Return what is trained along with the student: it maps the student's, and the teacher's, features."""
        return None, None

    @abstractmethod
    def value(self, student: Sequence[tf.Tensor], teacher: Sequence[tf.Tensor], samples: int) -> tf.Tensor:
        """Return the loss, a scalar.

        Args:
            student: for each pair, the student's features [b, ...], past the connector.
            teacher: the teacher's.
            samples: number of samples in the training part.
        """


class PairLoss(LayerLoss):
    """A loss that is the sum over the pairs of layers."""

    def value(self, student: Sequence[tf.Tensor], teacher: Sequence[tf.Tensor], samples: int) -> tf.Tensor:
        """Return the sum."""
        return reduce(add, (self.between(own, other) for own, other in zip(student, teacher, strict=True)))

    @abstractmethod
    def between(self, student: tf.Tensor, teacher: tf.Tensor) -> tf.Tensor:
        """Return the loss of one pair, a scalar."""


def compares_maps(pair: Pair) -> str | None:
    """Say why a pair is none of two feature maps [h, w, c]."""
    return None if len(pair.student_shape) == len(pair.teacher_shape) == 3 else "it compares feature maps [h, w, c]"


def has_vectors(pair: Pair) -> str | None:
    """Say why what the layers give cannot be laid out as vectors of a fixed length."""
    known = all(size is not None for shape in (pair.student_shape, pair.teacher_shape) for size in shape)
    return None if known else "it needs layers whose size is fixed"
