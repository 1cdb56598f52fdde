"""The course of pruning: scores, masks and training, in one round or several, with or without rewinding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import tf_keras

from compress.candidate import Candidate
from compress.graph.kernels import get_variable, get_weight
from compress.strategies.pruning.criteria import Evidence, criteria
from compress.strategies.pruning.masks import GONE, Masking
from compress.strategies.pruning.schedules import Gradual, Movement, Regrowth, Schedule
from compress.strategies.pruning.zeros import Zeros
from compress.strategies.strategy import Context
from compress.training import restore


@dataclass(frozen=True)
class Rounds:
    """Prunes the model of a candidate, which is the strategy's own copy, in place.

    ``names`` are the kernels; the other fields are those of :class:`~compress.strategies.pruning.prune.Prune`.
    """

    candidate: Candidate
    context: Context
    names: tuple[str, ...]
    masking: Masking
    criterion: str
    images: int
    ramp: float
    regrow: float | None
    guarantee: type[Zeros] = Zeros

    def run(self, sparsity: float, rounds: int) -> Candidate:
        """Prune to ``sparsity`` in ``rounds`` steps that each keep the same share of what is left."""
        alive: dict[str, np.ndarray] = {}
        for step in range(1, rounds + 1):
            start, end = (_share(sparsity, (step - 1) / rounds), _share(sparsity, step / rounds))
            alive = self._round(start, end, self._part(1 / rounds))
        return self._finished(alive)

    def rewound(self, sparsity: float, rounds: int) -> Candidate:
        """Train and prune ``rounds`` times, each time back to the weights given; then train what is left.

        Sources: Frankle and Carbin, The Lottery Ticket Hypothesis (arXiv 1803.03635, section 2, iterative pruning).
        """
        model, context = self.candidate.model, self._part(1 / (rounds + 1))
        given = model.get_weights()
        masks = {name: get_weight(model, name) != 0 for name in self.names}
        for step in range(1, rounds + 1):
            context.recover(self._bound(masks))
            masks = self._masks(_share(sparsity, step / rounds))
            model.set_weights(given)
            apply_masks(model, masks)
        context.recover(self._bound(masks))
        return self._finished(masks)

    def _round(self, start: float, sparsity: float, context: Context) -> dict[str, np.ndarray]:
        """Prune from one sparsity to another while recovering; return what is alive."""
        model = self.candidate.model
        schedule: Schedule | None = None
        variables = [get_variable(model, name) for name in self.names]
        if self.criterion == "movement":
            schedule = Movement(variables, self.masking, start, sparsity, self.ramp)
        elif self.criterion == "magnitude" and context.recovery.trains and self.regrow is None:
            schedule = Gradual(variables, self.masking, start, sparsity, self.ramp)
        if schedule is None:
            masks = self._masks(sparsity)
            if self.regrow is None:
                apply_masks(model, masks)
                context.recover(self._bound(masks))
                return masks
            schedule = Regrowth(variables, self.masking, sparsity, self.regrow, list(masks.values()))
        context.recover(self.candidate, projections=[schedule])
        return dict(zip(self.names, schedule.masks, strict=True))

    def _masks(self, sparsity: float) -> dict[str, np.ndarray]:
        """Score the weights as they are now; what is zero stays zero."""
        model, context = self.candidate.model, self.context
        evidence = Evidence(
            model, self.names, context.data, context.seed, self.images, self.masking, sparsity, context.stage
        )
        alive = [value != 0 for value in evidence.values]
        scores = criteria()[self.criterion].scores(evidence)
        scores = [np.where(live, score, GONE) for live, score in zip(alive, scores, strict=True)]
        masks = self.masking.masks(scores, sparsity)
        return {name: mask & live for name, mask, live in zip(self.names, masks, alive, strict=True)}

    def _finished(self, alive: Mapping[str, np.ndarray]) -> Candidate:
        model = self.candidate.model
        apply_masks(model, alive)
        # Earlier guarantees may turn a few more weights into zeros (a codebook that keeps its size).
        restore(model, self.candidate.guarantees)
        zeros = zeros_of(self.context.stage, model, self.names)
        zeros = self.guarantee(zeros.stage, zeros.masks)
        if self.regrow is not None:
            # What has grown but not moved yet is zero, and alive.
            zeros = self.guarantee(zeros.stage, {name: mask | alive[name] for name, mask in zeros.masks.items()})
        return self.candidate.with_guarantee(zeros)

    def _bound(self, masks: Mapping[str, np.ndarray]) -> Candidate:
        return self.candidate.with_guarantee(Zeros(self.context.stage, masks))

    def _part(self, share: float) -> Context:
        return self.context.for_stage(self.context.stage, recovery=self.context.recovery.part(share))


def _share(sparsity: float, part: float) -> float:
    """Return the sparsity after ``part`` of all rounds; exact at the end."""
    return sparsity if part == 1 else 1 - (1 - sparsity) ** part


def apply_masks(model: tf_keras.Model, masks: Mapping[str, np.ndarray]) -> None:
    """Set the weights where a mask is false to zero, in place."""
    for name, mask in masks.items():
        get_variable(model, name).assign(np.where(mask, get_weight(model, name), 0.0))


def zeros_of(stage: str, model: tf_keras.Model, names: Iterable[str]) -> Zeros:
    """Return the guarantee that what is zero in these kernels stays zero."""
    return Zeros(stage, {name: get_weight(model, name) != 0 for name in names})
