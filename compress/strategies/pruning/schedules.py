"""Projections that change masks while training goes on: gradual pruning, movement pruning, regrowth.

The training loop calls them after every step of the optimiser, when masked weights hold, for a moment, the value that
a dense update has given them. What they need to know about gradients is read off that update; so the loop knows nothing
of pruning. With momentum the update is an average of gradients, with Adam a normalised one; weight decay is part of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from compress.strategies.pruning.masks import GONE, Masking

_UPDATES = 50
"""The masks are renewed so many times."""
_REGROWTH_ENDS = 0.75


class Schedule(ABC):
    """A projection that renews its masks now and then and applies them after every step.

    ``end``: share of the training after which the masks stay.
    """

    def __init__(
        self,
        variables: Sequence[tf.Variable],
        masking: Masking,
        sparsity: float,
        end: float,
        masks: Sequence[np.ndarray],
    ) -> None:
        self._masking, self._sparsity, self._end = masking, sparsity, max(end, 1e-6)
        self._variables = list(variables)
        self._gone = [np.asarray(v) == 0 for v in variables]
        """Zeros of earlier stages: nothing brings them back."""
        self._masks = [tf.Variable(mask, trainable=False) for mask in masks]
        self._updates = tf.Variable(0, trainable=False, dtype=tf.int64)

    def __call__(self, done: tf.Tensor) -> None:
        """Renew the masks when the schedule has moved on by one update; apply them at every step."""
        due = tf.cast(tf.minimum(done / self._end, 1.0) * _UPDATES, tf.int64)
        seen = self._observe()

        def renew() -> tf.Tensor:
            # NumPy's partition takes a tenth of the time of TensorFlow's sort.
            found = tf.numpy_function(self._choose, [due, *seen], [tf.bool] * len(self._masks), stateful=False)
            for mask, kept in zip(self._masks, tf.nest.flatten(found), strict=True):
                mask.assign(tf.reshape(kept, mask.shape))
            return self._updates.assign(due)

        before = [mask.value() for mask in self._masks]
        tf.cond(due > self._updates, renew, lambda: self._updates.read_value())
        self._settle(before)

    @property
    def masks(self) -> list[np.ndarray]:
        """The masks as they are now; what earlier stages have set to zero is false."""
        return [np.asarray(mask) & ~gone for mask, gone in zip(self._masks, self._gone, strict=True)]

    def _barred(self, scores: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.where(gone, GONE, score) for gone, score in zip(self._gone, scores, strict=True)]

    @abstractmethod
    def _observe(self) -> list[tf.Tensor]:
        """Look at the weights after the optimiser's step; return what :meth:`_choose` needs."""

    @abstractmethod
    def _choose(self, due: np.ndarray, *seen: np.ndarray) -> list[np.ndarray]:
        """Return the masks of update ``due``."""

    @abstractmethod
    def _settle(self, before: Sequence[tf.Tensor]) -> None:
        """Set the weights as the masks want them; ``before``: the masks until now."""


class Gradual(Schedule):
    """Magnitude pruning whose sparsity grows along Zhu and Gupta's cubic (arXiv 1710.01878, equation 1).

    The schedule is the TensorFlow Model Optimization Toolkit's.
    """

    def __init__(
        self, variables: Sequence[tf.Variable], masking: Masking, start: float, sparsity: float, ramp: float
    ) -> None:
        from tensorflow_model_optimization.sparsity.keras import PolynomialDecay

        super().__init__(variables, masking, sparsity, ramp, [np.ones(v.shape, bool) for v in variables])
        self._schedule = PolynomialDecay(
            initial_sparsity=start, final_sparsity=sparsity, begin_step=0, end_step=_UPDATES, frequency=1
        )

    def _observe(self) -> list[tf.Tensor]:
        return [tf.abs(variable) for variable in self._variables]

    def _choose(self, due: np.ndarray, *seen: np.ndarray) -> list[np.ndarray]:
        # The schedule counts in single precision; the end is exact.
        share = self._sparsity if due == _UPDATES else float(self._schedule(tf.constant(due))[1])
        return self._masking.masks(self._barred(seen), share)

    def _settle(self, before: Sequence[tf.Tensor]) -> None:
        for variable, mask in zip(self._variables, self._masks, strict=True):
            variable.assign(tf.where(mask, variable, 0.0))


class Movement(Gradual):
    """Movement pruning (Sanh et al., arXiv 2005.07683, equation 4): weights that move towards zero go.

    The score of a weight is the sum of w_old (w_new - w_old) over all steps; with plain gradient descent that is
    -rate w dL/dw. A pruned weight keeps its last value aside, and its score goes on by the gradient that it would have
    (the paper's straight-through estimate); so it can come back, with that value. Where training hardly moves a
    converged network the scores are noise: it is meant for new data, or for training from the start.
    """

    def __init__(
        self, variables: Sequence[tf.Variable], masking: Masking, start: float, sparsity: float, ramp: float
    ) -> None:
        super().__init__(variables, masking, start, sparsity, ramp)
        self._kept_aside = [tf.Variable(v, trainable=False) for v in variables]
        self._scores = [tf.Variable(tf.zeros_like(v), trainable=False) for v in variables]

    def _observe(self) -> list[tf.Tensor]:
        for variable, mask, aside, score in zip(
            self._variables, self._masks, self._kept_aside, self._scores, strict=True
        ):
            moved = variable - tf.where(mask, aside, 0.0)
            score.assign_add(aside * moved)
            aside.assign(tf.where(mask, variable, aside))
        return [score.value() for score in self._scores]

    def _settle(self, before: Sequence[tf.Tensor]) -> None:
        for variable, mask, aside in zip(self._variables, self._masks, self._kept_aside, strict=True):
            variable.assign(tf.where(mask, aside, 0.0))


class Regrowth(Schedule):
    """RigL (Evci et al., arXiv 1911.11134, algorithm 1): the smallest go, others grow where the gradient is large.

    The count of weights stays. ``share`` of the live ones is exchanged at first, less and less along a cosine, until
    three quarters of the training are over. What grows starts at zero.
    """

    def __init__(
        self,
        variables: Sequence[tf.Variable],
        masking: Masking,
        sparsity: float,
        share: float,
        masks: Sequence[np.ndarray],
    ) -> None:
        super().__init__(variables, masking, sparsity, _REGROWTH_ENDS, masks)
        self._share = share
        for variable, mask in zip(self._variables, masks, strict=True):
            variable.assign(tf.where(mask, variable, 0.0))
        self._before = [tf.Variable(v, trainable=False) for v in variables]

    def _observe(self) -> list[tf.Tensor]:
        updates = [variable - before for variable, before in zip(self._variables, self._before, strict=True)]
        return [*(v.value() for v in self._variables), *updates, *(mask.value() for mask in self._masks)]

    def _choose(self, due: np.ndarray, *seen: np.ndarray) -> list[np.ndarray]:
        count = len(self._masks)
        values, updates, live = seen[:count], seen[count : 2 * count], seen[2 * count :]
        exchanged = self._share / 2 * (1 + float(np.cos(np.pi * due / _UPDATES)))
        sizes = [np.where(mask, np.abs(value), GONE) for mask, value in zip(live, values, strict=True)]
        stay = self._masking.masks(sizes, 1 - (1 - self._sparsity) * (1 - exchanged))
        scores = [
            np.where(kept & mask, np.inf, np.abs(update))
            for kept, mask, update in zip(stay, live, updates, strict=True)
        ]
        return self._masking.masks(self._barred(scores), self._sparsity)

    def _settle(self, before: Sequence[tf.Tensor]) -> None:
        for variable, mask, old, last in zip(self._variables, self._masks, before, self._before, strict=True):
            variable.assign(tf.where(tf.logical_and(mask, old), variable, 0.0))
            last.assign(variable)
