"""Soft weight sharing: weights are trained towards the means of a mixture of Gaussians, and end at them.

Source: Ullrich, Meeds, Welling (arXiv 1702.04008). Here a last part of the training follows the collapse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Le, Lt
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate, Effect, Skipped
from compress.errors import CompressError
from compress.graph.fold import fold_batch_norm
from compress.graph.kernels import Kernel, get_variable
from compress.strategies.pruning.zeros import Zeros
from compress.strategies.sharing.centroids import TrainedCentroids
from compress.strategies.sharing.chosen import choose_kernels
from compress.strategies.sharing.codebook import Codebook
from compress.strategies.sharing.mixture import MixturePrior
from compress.strategies.strategy import STRICT, Context, Strategy


@dataclass(frozen=True, config=STRICT)
class SoftShare(Strategy):
    """Train the selected kernels under a prior of few values, most of them zero; then let each weight be one of these.

    Batch norms that follow a selected layer are folded into it first. A kernel with no more weights than components is
    left alone, and one into which the export merges a normalisation that could not be folded.

    Args:
        components: values besides zero.
        scope: what has a mixture: each ``layer``'s kernel, or the ``model`` as a whole, as in the paper.
        zeros: share of the weights that the prior expects at zero. The paper has 0.99, and trains for 100 epochs.
        strength: of the prior: 1 makes the loss a posterior, the paper has 0.005.
        width: spread of a component that the prior expects, relative to that of the weights.
        certainty: how much this expectation counts, relative to the weights themselves.
        settling: part of the training that comes after the weights have become the values, and trains these.
    """

    components: Annotated[int, Ge(1), Le(256)] = 16
    scope: Literal["layer", "model"] = "layer"
    zeros: Annotated[float, Gt(0), Lt(1)] = 0.75
    strength: Annotated[float, Gt(0), Le(1e6)] = 1.0
    width: Annotated[float, Gt(0), Lt(1)] = 0.1
    certainty: Annotated[float, Gt(0), Le(1e6)] = 1.0
    settling: Annotated[float, Gt(0), Lt(1)] = 0.5

    effects = frozenset({Effect.TRAIN, Effect.ZERO, Effect.SHARE, Effect.LEVEL})
    establishes = Codebook
    needs_training = True

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Fold, train under the prior, collapse, train the values."""
        context.require_training()
        names = context.selection.names(candidate.model)
        model = fold_batch_norm(candidate.model, names)
        chosen, skipped = choose_kernels(model, names, "shared", self._obstacle)
        if not chosen:
            raise context.nothing_done(f"a kernel with more than {self.components + 1} weights", skipped)
        groups = [chosen] if self.scope == "model" else [[kernel] for kernel in chosen]
        priors = [self._prior(group) for group in groups]
        first = context.for_stage(context.stage, recovery=context.recovery.part(1 - self.settling))
        first.recover(candidate.evolve(model=model), terms=priors)
        labels: dict[str, np.ndarray] = {}
        for prior, group in zip(priors, groups, strict=True):
            labels |= self._collapse(prior, group, context.stage)
        shared = candidate.evolve(model=model, skipped=context.skip(skipped))
        shared = shared.with_guarantee(Zeros(context.stage, {name: label != 0 for name, label in labels.items()}))
        return self._settle(shared, chosen, labels, context)

    def _obstacle(self, kernel: Kernel) -> Skipped | None:
        name = kernel.layer.name
        if kernel.size <= self.components + 1:
            return Skipped(name, f"{kernel.size} weights, {self.components} components and zero", True)
        return None if kernel.value.std() else Skipped(name, "all its weights are equal", True)

    def _prior(self, group: Sequence[Kernel]) -> MixturePrior:
        variables = [getattr(kernel.layer, kernel.attribute) for kernel in group]
        return MixturePrior(
            variables,
            self.components,
            zeros=self.zeros,
            width=self.width,
            certainty=self.certainty,
            strength=self.strength,
        )

    def _collapse(self, prior: MixturePrior, group: Sequence[Kernel], stage: str) -> dict[str, np.ndarray]:
        """Write each weight's value into the model; return which one it is, 0 for zero."""
        found = {}
        for kernel in group:
            # Zeros of an earlier stage are none of the mixture's.
            label = np.where(kernel.value == 0, 0, prior.component_of(kernel.value)).astype(np.uint16)
            if not label.any():
                raise CompressError(
                    f"stage {stage}, layer {kernel.layer.name}",
                    expected="weights other than zero",
                    received=f"a prior under which all {kernel.size} are most likely zero",
                    fix=f"Lower strategy.{stage}.zeros or strategy.{stage}.width, or skip the layer.",
                )
            getattr(kernel.layer, kernel.attribute).assign(prior.values()[label])
            found[kernel.name] = label
        return found

    def _settle(
        self, candidate: Candidate, chosen: Sequence[Kernel], labels: dict[str, np.ndarray], context: Context
    ) -> Candidate:
        """Train the values; return the candidate with the guarantee that they stay few."""
        last = context.for_stage(context.stage, recovery=context.recovery.part(self.settling))
        together = self.scope == "model"
        every = np.concatenate([label.ravel() for label in labels.values()]) if together else None
        used = [len(np.unique(label)) for label in (labels.values() if every is None else [every])]
        guarantee = Codebook(context.stage, max(used), labels)
        if not together:
            return last.recover(candidate.with_guarantee(guarantee))
        variables = [get_variable(candidate.model, kernel.name) for kernel in chosen]
        trained = TrainedCentroids(variables, [labels[k.name] for k in chosen], joint=True, summed=False)
        candidate = last.recover(candidate, projections=[trained])
        return candidate.with_guarantee(guarantee.with_values(trained.values()))
