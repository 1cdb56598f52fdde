"""Who learns: the model as it is, another network, or a narrower or shallower copy of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import tf_keras
from annotated_types import Gt, Lt
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate, Effect, Skipped, Storage
from compress.errors import CompressError
from compress.graph.rewrite import copy_model
from compress.graph.scaling import narrower, shallower, with_fresh_weights
from compress.graph.selection import Selection
from compress.strategies.options import refuse_without_effect
from compress.strategies.strategy import STRICT, Context, Strategy

AGAIN = "again"
"""How ``student`` names the architecture that the stage receives, with fresh weights."""


@dataclass(frozen=True, config=STRICT)
class StudentStrategy(Strategy):
    """Shared by the strategies that train a student, which may be another network than the one they receive.

    Attributes:
        student: null: the model that the stage receives; a name of ``conf/model``: that network, with weights as
            initialised by the seed; ``again``: the architecture that the stage receives, likewise.
        width: a copy whose layers have this share of the channels; see :func:`compress.graph.scaling.narrower`.
        depth: a copy with this share of the residual blocks; see :func:`compress.graph.scaling.shallower`.
        start: of such a copy: ``random``, weights as initialised by the seed; ``teacher``, those of what was kept.
    """

    student: str | None = None
    width: Annotated[float, Gt(0), Lt(1)] | None = None
    depth: Annotated[float, Gt(0), Lt(1)] | None = None
    start: Literal["random", "teacher"] = "random"

    needs_training = True

    def __post_init__(self) -> None:
        """Refuse two students at once."""
        copies = self.width is not None or self.depth is not None
        refuse_without_effect(self, [(self.student is None, ("width", "depth"), "student=null")])
        refuse_without_effect(self, [(copies, ("start",), "width or depth")])

    @property
    def replaces(self) -> bool:
        """Whether the student is another network than the one that the stage receives."""
        return not (self.student is None and self.width is None and self.depth is None)

    @property
    def effects(self) -> frozenset[Effect]:  # type: ignore[override]
        """Another student is another network."""
        return frozenset({Effect.TRAIN, Effect.REPLACE} if self.replaces else {Effect.TRAIN})

    def models(self) -> Mapping[str, str]:
        """Name the network that is to learn."""
        return {} if self.student is None or self.student == AGAIN else {self.student: "student"}

    @property
    def asks_of_student(self) -> bool:
        """Whether :meth:`student_of` may find a student that will not do."""
        return self.replaces

    def targets(self, model: tf_keras.Model, selection: Selection) -> frozenset[str]:
        """Return every layer, where another network takes the model's place."""
        chosen = selection.names(model)
        return frozenset(layer.name for layer in model.layers) if self.replaces else chosen

    def clashes_with(self, earlier: Strategy) -> str | None:
        """Nothing that was established outlives the network that it was established on."""
        if self.replaces and earlier.establishes is not None:
            return "it puts another network in place of the whole model"
        return super().clashes_with(earlier)

    def student_of(self, candidate: Candidate, context: Context) -> Candidate:
        """Return the candidate whose model is the student, before any training.

        Raises:
            CompressError: if the network does not fit the data, or the model cannot be made smaller.
        """
        if not self.replaces:
            return candidate.evolve(model=copy_model(candidate.model), skipped=())
        self._require_free(candidate, context)
        if self.student is not None and (context.selection.only or context.selection.skip):
            raise CompressError(
                f"strategy.{context.stage}.only, skip",
                expected=f"nothing: student={self.student} is another network as a whole",
                received="a rule that names layers",
                fix="Leave only and skip out; they choose layers of width and depth.",
            )
        skipped: tuple[Skipped, ...] = ()
        if self.student == AGAIN:
            model = with_fresh_weights(candidate.model, context.seed)
        elif self.student is not None:
            model = context.untrained(self.student)
        else:
            model, skipped = self._smaller(candidate.model, context)
        return candidate.evolve(model=model, storage=Storage(), samples=None, skipped=skipped)

    def _require_free(self, candidate: Candidate, context: Context) -> None:
        """Refuse to put a network in place of one that is still bound by a guarantee."""
        if candidate.guarantees:
            bound = candidate.guarantees[0]
            raise CompressError(
                f"stage {context.stage} after stage {bound.stage}",
                expected=f"a model that is bound by nothing ({bound.stage}: {bound.describe()})",
                received="another network in its place",
                fix=f"Put {context.stage} before {bound.stage}, or write "
                f"strategy.{context.stage}.release=[{bound.stage}].",
            )

    def _smaller(self, model: tf_keras.Model, context: Context) -> tuple[tf_keras.Model, tuple[Skipped, ...]]:
        names = context.selection.names(model)
        every = names == frozenset(layer.name for layer in model.layers)
        changed, left_alone = 0, []
        small = model
        if self.depth is not None:
            done = shallower(small, self.depth, None if every else names)
            if not done.changed:
                what = "residual blocks, or layers that keep their input's shape, more than depth leaves"
                raise self._nothing(context, "depth", what)
            small, changed = done.model, changed + len(done.changed)
        if self.width is not None:
            left = {layer.name for layer in small.layers}
            done = narrower(small, self.width, None if every else names & left)
            left_alone = [Skipped(name, reason, True) for name, reason in done.left_alone if name in names]
            if not done.changed:
                raise self._nothing(context, "width", "layers with channels that may go")
            small = done.model
        small = copy_model(small) if self.start == "teacher" else with_fresh_weights(small, context.seed)
        return small, context.skip(left_alone)

    def _nothing(self, context: Context, field: str, wanted: str) -> CompressError:
        return CompressError(
            f"strategy.{context.stage}.{field}",
            expected=f"a model with {wanted}",
            received=f"none of them: {field}={getattr(self, field)} changes nothing",
            fix=f"Write a smaller {field}, widen only and skip, or name another network: "
            f"strategy.{context.stage}.student=<model>.",
        )
