"""Transferred filters: the filters of a convolution follow from fewer ones by a group of transformations.

Sources: Cheng, Wang, Zhou, Zhang (arXiv 1710.09282, section on transferred filters) for the family; Zhai et al., Doubly
Convolutional Neural Networks (arXiv 1610.09716), for patches of larger filters; Dieleman et al. (arXiv 1602.02660) and
Cohen and Welling (arXiv 1602.07576), for turned ones; Ding et al. (arXiv 1708.08917), for circulant ones.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Literal

import numpy as np
import tf_keras
from annotated_types import Ge, Le
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate, Effect, Guarantee, Skipped, Transfer
from compress.deploy.coding.transfers import numbers_of, obstacle
from compress.graph.fold import fold_batch_norm
from compress.graph.kernels import Kernel, kernel_attributes, kernels
from compress.graph.rewrite import copy_model
from compress.graph.selection import Selection
from compress.strategies.compact.meta_filters import assign_filters
from compress.strategies.compact.multi_bias import MultiBias, multi_bias
from compress.strategies.compact.tied_filters import TiedFilters
from compress.strategies.sharing.chosen import choose_kernels
from compress.strategies.sharing.ties import Ties, solve_ties
from compress.strategies.strategy import STRICT, Context, Strategy
from compress.training import restore
from compress.words import counted

layers = tf_keras.layers

_FILTERS: Mapping[str, int] = {"translation": 4, "rotation": 4, "circulant": 4, "multi_bias": 2}


@dataclass(frozen=True, config=STRICT)
class Transferred(Strategy):
    """Let the filters of each selected Conv2D follow from fewer ones, then recover.

    Batch norms that follow a selected layer are folded into it first: the exported file holds the folded kernel. A
    layer whose filters the transformations do not fit is left alone.

    Args:
        transform: ``translation``: filters are patches of larger meta filters; ``rotation``: turned by 90 degrees;
            ``circulant``: the channels of a filter turned in circles; ``multi_bias``: one filter's response several
            times, each with a bias of its own, which saves as many times the multiply-adds, too.
        filters: how many filters follow from each. Of ``translation`` a square (4: 2 x 2 shifts); of ``rotation`` 2, 4,
            or 8 with mirrored ones; if null, 2 of ``multi_bias``, 4 of the others.
        images: unlabelled calibration images, on which the numbers are solved for in closed form; 0: they start from
            the means of their weights.
    """

    transform: Literal["translation", "rotation", "circulant", "multi_bias"] = "translation"
    filters: Annotated[int, Ge(2), Le(1024)] | None = None
    images: Annotated[int, Ge(0), Le(100_000)] = 500

    @property
    def effects(self) -> frozenset[Effect]:  # type: ignore[override]
        """Filters of their own are tied; those with several biases are other layers."""
        others = {Effect.REPLACE} if self.transform == "multi_bias" else {Effect.SHARE, Effect.LEVEL}
        return frozenset({Effect.TRAIN, *others})

    @property
    def establishes(self) -> type[Guarantee]:  # type: ignore[override]
        """The kind of guarantee that goes with the transformation."""
        return MultiBias if self.transform == "multi_bias" else TiedFilters

    def __post_init__(self) -> None:
        """Refuse numbers of filters that a transformation does not make."""
        if self.transform == "translation" and math.isqrt(self._each) ** 2 != self._each:
            raise ValueError(f"filters={self.filters} of translation: a square number, such as 4 or 9")
        if self.transform == "rotation" and self._each not in (2, 4, 8):
            raise ValueError(f"filters={self.filters} of rotation: 2, 4 or 8")

    @property
    def _each(self) -> int:
        return _FILTERS[self.transform] if self.filters is None else self.filters

    def targets(self, model: tf_keras.Model, selection: Selection) -> frozenset[str]:
        """Only the convolutions that have filters of their own."""
        plain = frozenset(layer.name for layer in model.layers if type(layer) is layers.Conv2D)
        return selection.names(model) & plain

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Fold, assign every filter to a meta filter, solve for the numbers of these, and train them."""
        names = context.selection.names(candidate.model) & _convolutions(candidate.model)
        bound = [g for g in candidate.guarantees if isinstance(g, (TiedFilters, MultiBias))]
        done = names & {name for guarantee in bound for name in guarantee.layers}
        again = [Skipped(name, "its filters are transferred already", True) for name in sorted(done)]
        names -= done
        if again and not names:
            return candidate.evolve(model=copy_model(candidate.model), skipped=context.skip(again))
        if self.transform == "multi_bias":
            return self._multi_bias(candidate, context, names, again)
        model = fold_batch_norm(candidate.model, names)
        chosen, skipped = choose_kernels(model, names, "transferred", self._obstacle)
        if not chosen:
            raise context.nothing_done(f"a Conv2D whose filters follow from fewer ones by {self.transform}", skipped)
        transfers = {
            kernel.name: assign_filters(
                kernel.value, self._transfer(kernel), zlib.crc32(f"{context.seed}:{kernel.name}".encode())
            ).transfer
            for kernel in chosen
        }
        guarantee = TiedFilters.of(context.stage, transfers)
        result = candidate.evolve(model=model, skipped=context.skip([*again, *skipped])).with_guarantee(guarantee)
        ties = {name: partial(_ties, labels) for name, labels in guarantee.labels.items()}
        if self.images:
            solve_ties(candidate, model, guarantee, ties, self.images, context)
        restore(model, result.guarantees)
        before, after = sum(kernel.size for kernel in chosen), guarantee.numbers()
        measured = {"weights": before, "free_numbers": after, "compression_rate": before / after}
        return context.recover(result.evolve(measured=measured))

    def _multi_bias(
        self, candidate: Candidate, context: Context, names: frozenset[str], again: list[Skipped]
    ) -> Candidate:
        result, skipped = multi_bias(candidate, context, names, self._each, self.images)
        changed = {name for guarantee in result.guarantees[-1:] for name in guarantee.layers}
        before, after = (sum(k.size for k in kernels(c.model) if k.layer.name in changed) for c in (candidate, result))
        measured = {"weights": before, "free_numbers": after, "compression_rate": before / after}
        return context.recover(result.evolve(skipped=context.skip([*again, *skipped]), measured=measured))

    def _transfer(self, kernel: Kernel) -> Transfer:
        if self.transform == "multi_bias":
            raise TypeError("multi_bias moves no weights")
        height, width, channels, _ = kernel.value.shape
        size = math.isqrt(self._each) if self.transform == "translation" else self._each
        return Transfer(self.transform, size, (height, width, channels))

    def _obstacle(self, kernel: Kernel) -> Skipped | None:
        layer = kernel.layer
        if type(layer) is not layers.Conv2D:
            return Skipped(layer.name, f"filters of {type(layer).__name__} layers are not transferred")
        transfer = self._transfer(kernel)
        if layer.filters < self._each:
            return Skipped(
                layer.name,
                f"{counted(layer.filters, 'filter is', 'filters are')} fewer than the {self._each} of one meta filter",
            )
        if (reason := obstacle(transfer)) is not None:
            return Skipped(layer.name, reason)
        metas = -(-layer.filters // self._each)
        if metas * numbers_of(transfer) >= kernel.size:
            return Skipped(
                layer.name, f"{metas * numbers_of(transfer):,} numbers for {kernel.size:,} would not pay", True
            )
        return None


def _convolutions(model: tf_keras.Model) -> frozenset[str]:
    return frozenset(
        layer.name for layer in model.layers if kernel_attributes(layer) and not isinstance(layer, layers.Dense)
    )


def _ties(labels: np.ndarray) -> Ties:
    _, dense = np.unique(labels, return_inverse=True)
    numbers = dense.reshape(-1)
    return Ties(numbers, np.ones(numbers.size), int(numbers.max()) + 1)
