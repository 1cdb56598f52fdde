"""The losses between a student and its teacher, one file each; a new one is a file here and a line below."""

from __future__ import annotations

from compress.strategies.distillation.loss import Loss
from compress.strategies.distillation.losses.activation_boundary import ActivationBoundary
from compress.strategies.distillation.losses.attention import Attention
from compress.strategies.distillation.losses.contrastive import Contrastive
from compress.strategies.distillation.losses.decoupled import Decoupled
from compress.strategies.distillation.losses.flow import Flow
from compress.strategies.distillation.losses.hints import Hints
from compress.strategies.distillation.losses.relational_angle import RelationalAngle
from compress.strategies.distillation.losses.relational_distance import RelationalDistance
from compress.strategies.distillation.losses.similarity import Similarity
from compress.strategies.distillation.losses.soft_targets import SoftTargets


def losses() -> dict[str, type[Loss]]:
    """Return the losses by name."""
    kinds: tuple[type[Loss], ...] = (
        SoftTargets,
        Decoupled,
        Hints,
        Attention,
        RelationalDistance,
        RelationalAngle,
        Similarity,
        Flow,
        Contrastive,
        ActivationBoundary,
    )
    return {kind.name: kind for kind in kinds}
