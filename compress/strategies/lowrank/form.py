"""What a form of factorization is: a formula, how wide it is at each rank, and how a kernel is brought into it.

A formula is an ``einsum`` that multiplies the factors out to the kernel, one term for each layer of the chain that
takes the layer's place. Its letters: ``y`` and ``x`` are the kernel's rows and columns, ``c`` the channels read, ``f``
the channels written, all others are inner. A term ends with what its layer reads and what it writes; one with a single
letter that is not ``y`` or ``x`` is a depthwise layer. The first term's last letter is the rank that is guaranteed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import tf_keras

Widths = dict[str, np.ndarray]


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a matrix of this shape, the largest first; ``energy``: the sum of all their squares."""

    values: np.ndarray
    shape: tuple[int, int]
    energy: float


@dataclass(frozen=True)
class Decomposition:
    """A kernel in one form, at every rank.

    ``curve()`` computes the errors, ``factors(r)`` the factors at rank r, in the order and with the axes of the
    formula's terms.
    """

    curve: Callable[[], np.ndarray]
    factors: Callable[[int], list[np.ndarray]]
    spectrum: Spectrum | None = None
    """Of the matrix that the form makes of the kernel, where it does that."""

    @cached_property
    def errors(self) -> np.ndarray:
        """The squared error at rank 1, 2, ..., relative to the kernel's squares; it does not grow."""
        return self.curve()


class Form(ABC):
    """One way to write a layer as a chain of smaller ones. Stateless."""

    name: ClassVar[str]
    formula: ClassVar[str]
    automatic: ClassVar[bool] = False
    """Whether ``form=auto`` tries it."""

    @property
    def terms(self) -> tuple[str, ...]:
        """The letters of each factor."""
        return tuple(self.formula.partition("->")[0].split(","))

    @property
    def letters(self) -> str:
        """The letters of the kernel."""
        return self.formula.partition("->")[2]

    @property
    def shared(self) -> str:
        """The letters of the kernel that the first factor holds: what it makes the rank's channels of."""
        return "".join(letter for letter in self.letters if letter in self.terms[0])

    @property
    def is_product(self) -> bool:
        """Whether it is a product of two matrices, and all inputs go through the first: the best one is a formula."""
        return len(self.terms) == 2 and self.shared == self.letters[:-1]

    @abstractmethod
    def misfit(self, layer: tf_keras.layers.Layer) -> str | None:
        """Say why a Dense or ordinary Conv2D layer cannot have this form."""

    @abstractmethod
    def highest(self, shape: Sequence[int]) -> int:
        """Return the rank at which any kernel of this shape can be written exactly."""

    def widths(self, shape: Sequence[int], ranks: np.ndarray) -> Widths:
        """Return inner letter -> its size at each rank; by default the only one has the size of the rank."""
        (inner,) = set("".join(self.terms)) - set(self.letters)
        return {inner: ranks}

    @abstractmethod
    def decompose(self, kernel: np.ndarray, most: int) -> Decomposition:
        """Return the kernel in this form at the ranks up to ``most``, nearest in the sum of squares."""

    def compose(self, factors: Sequence[np.ndarray]) -> np.ndarray:
        """Return the kernel that the factors multiply out to."""
        return np.einsum(self.formula, *factors, optimize=True)


def spread(highest: int, count: int) -> np.ndarray:
    """Return about ``count`` ranks from 1 to ``highest``, denser where they are small."""
    return np.unique(np.round(np.geomspace(1, highest, count)).astype(int))


def between(ranks: np.ndarray, errors: np.ndarray, most: int) -> np.ndarray:
    """Return the errors at 1, ..., ``most`` from those at some ranks; none is above one at a lower rank."""
    return np.interp(np.arange(1, most + 1), ranks, np.minimum.accumulate(np.maximum(errors, 0.0)))


def sampled(form: Form, kernel: np.ndarray, most: int, factors: Callable[[int], list[np.ndarray]]) -> Decomposition:
    """Return the decomposition whose errors have no formula: computed at some ranks, interpolated between them."""
    energy = float(np.sum(kernel.astype(np.float64) ** 2)) or 1.0
    known: dict[int, list[np.ndarray]] = {}

    def at(rank: int) -> list[np.ndarray]:
        if rank not in known:
            known[rank] = factors(rank)
        return known[rank]

    def curve() -> np.ndarray:
        ranks = spread(most, _SAMPLED)
        errors = np.array([np.sum((kernel - form.compose(at(int(rank)))) ** 2) / energy for rank in ranks])
        return between(ranks, errors, most)

    return Decomposition(curve, at)


_SAMPLED = 6
