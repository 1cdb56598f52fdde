"""Factors that are nearest in what the layer gives, not in its weights.

A layer's inputs are correlated, and errors of its outputs matter unequally: the kernel is whitened by both before it is
decomposed (Zhang et al., arXiv 1505.06798, for the outputs' principal components; here any form), then the factors are
solved in turn by least squares, each with the others held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from compress.strategies.goal import FLOOR, Goal, conjugate_gradients, roots
from compress.strategies.lowrank.form import Decomposition, Form


class Fit:
    """A goal in one form at every rank: decomposed once, when the first rank is asked for."""

    def __init__(self, form: Form, goal: Goal, most: int) -> None:
        self.form, self.goal, self._most = form, goal, most

    @cached_property
    def _left(self) -> tuple[np.ndarray, np.ndarray]:
        """The root of the moments of the letters that the first factor reads, and its inverse."""
        kernel, letters = self.goal.kernel, self.form.letters
        assert self.goal.inputs is not None
        moments = self.goal.inputs.reshape(kernel.shape[:-1] * 2)
        # The places that the first factor does not see are summed over.
        inner = letters[:-1]
        other = "".join(letter if letter not in self.form.shared else letter.upper() for letter in inner)
        wanted = self.form.shared + self.form.shared.upper()
        size = int(np.prod([kernel.shape[letters.index(letter)] for letter in self.form.shared]))
        return roots(np.einsum(f"{inner}{other}->{wanted}", moments).reshape(size, size))

    @cached_property
    def _right(self) -> tuple[np.ndarray, np.ndarray]:
        assert self.goal.metric is not None
        return roots(self.goal.metric)

    @cached_property
    def decomposition(self) -> Decomposition:
        """Of the whitened kernel."""
        kernel = self.goal.kernel
        if self.goal.inputs is not None:
            kernel = self._mixed(kernel, self.form.letters, self._left[0])
        if self.goal.metric is not None:
            kernel = kernel @ self._right[0]
        return self.form.decompose(kernel, self._most)

    def _mixed(self, array: np.ndarray, letters: str, matrix: np.ndarray) -> np.ndarray:
        """Multiply the axes that the first factor reads, taken as one, with a symmetric matrix."""
        axes = [letters.index(letter) for letter in self.form.shared]
        moved = np.moveaxis(array, axes, range(len(axes)))
        mixed = matrix @ moved.reshape(len(matrix), -1)
        return np.moveaxis(mixed.reshape(moved.shape), range(len(axes)), axes)

    @cached_property
    def _nearest(self) -> Decomposition:
        """Of the kernel as it is."""
        return self.form.decompose(self.goal.kernel, self._most)

    def factors(self, rank: int, sweeps: int) -> list[np.ndarray]:
        """Return the factors at a rank, after so many rounds of least squares where they are not the best already."""
        factors = list(self.decomposition.factors(rank))
        if self.goal.inputs is not None:
            factors[0] = self._mixed(factors[0], self.form.terms[0], self._left[1])
        if self.goal.metric is not None:
            factors[-1] = factors[-1] @ self._right[1]
        if self.goal.inputs is None or self.form.is_product:
            return factors
        # A form that reads the inputs piece by piece is whitened in part only; at low ranks that can start worse.
        nearest = self._nearest.factors(rank)
        start = min((factors, nearest), key=lambda found: self.goal.error(self.form.compose(found)))
        return self.improved(start, self.goal.kernel, sweeps)

    def towards(self, kernel: np.ndarray) -> Fit:
        """Return the fit to another kernel of the same inputs and outputs."""
        other = Fit(self.form, replace(self.goal, kernel=kernel), self._most)
        known = ("_left", "_right")
        other.__dict__.update({name: self.__dict__[name] for name in known if name in self.__dict__})
        return other

    def improved(self, factors: Sequence[np.ndarray], kernel: np.ndarray, sweeps: int) -> list[np.ndarray]:
        """Return factors nearer to another kernel: the last solved for exactly, the others by conjugate gradients."""
        form, goal, found = self.form, replace(self.goal, kernel=kernel), list(factors)
        for _ in range(sweeps):
            for index in range(len(found) - 1):
                found[index] = self._descended(goal, found, index)
            found[-1] = last_factor(form, goal, found)
        return found

    def _descended(self, goal: Goal, factors: Sequence[np.ndarray], index: int) -> np.ndarray:
        """Return one factor after a few steps of conjugate gradients on the least squares, the others held."""
        form = self.form
        others = [factor for number, factor in enumerate(factors) if number != index]
        terms = [term for number, term in enumerate(form.terms) if number != index]
        back = f"{','.join([*terms, form.letters])}->{form.terms[index]}"

        def kernel_of(factor: np.ndarray) -> np.ndarray:
            return form.compose([*factors[:index], factor, *factors[index + 1 :]])

        def gradient(kernel: np.ndarray) -> np.ndarray:
            return np.einsum(back, *others, goal.weighted(kernel), optimize=True)

        def conditioned(residual: np.ndarray) -> np.ndarray:
            # The inputs are correlated; what reads them first is solved for as if they were not.
            if index or goal.inputs is None:
                return residual
            inverse = self._left[1]
            return self._mixed(self._mixed(residual, form.terms[0], inverse), form.terms[0], inverse)

        start = factors[index]
        return conjugate_gradients(
            lambda x: gradient(kernel_of(x)), gradient(goal.kernel - kernel_of(start)), start, conditioned
        )


def last_factor(form: Form, goal: Goal, factors: Sequence[np.ndarray]) -> np.ndarray:
    """Return the last factor that is best beside the others, whatever the metric of the outputs is."""
    letters, last = form.letters, form.terms[-1]
    inner = last[:-1]
    outside = "".join(letter for letter in letters[:-1] if letter not in last)
    # What the chain makes of each input before its last layer: [inputs, what the last factor reads].
    before = np.einsum(",".join(form.terms[:-1]) + f"->{outside}{_bond(form)}", *factors[:-1], optimize=True)
    sizes = dict(zip(letters, goal.kernel.shape, strict=True))
    free = [letter for letter in inner if letter in letters]
    identity = [np.eye(sizes[letter]) for letter in free]
    terms = [f"{outside}{_bond(form)}", *(f"{letter.upper()}{letter}" for letter in free)]
    full = "".join(letter.upper() if letter in free else letter for letter in letters[:-1])
    read = np.einsum(f"{','.join(terms)}->{full}{inner}", before, *identity, optimize=True)
    read = read.reshape(-1, int(np.prod(factors[-1].shape[:-1])))
    weighted = read if goal.inputs is None else goal.inputs @ read
    gram, cross = weighted.T @ read, weighted.T @ goal.kernel.reshape(len(read), -1)
    gram[np.diag_indices_from(gram)] += FLOOR * max(float(np.trace(gram)) / len(gram), 1e-30)
    return np.linalg.solve(gram, cross).reshape(factors[-1].shape)


def _bond(form: Form) -> str:
    """Return the letter that the last factor shares with those before it."""
    return next(letter for letter in form.terms[-1] if letter not in form.letters)
