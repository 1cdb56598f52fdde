"""Distillation as a strategy: train a student on its teacher's soft targets.

Sources: Hinton, Vinyals, Dean (arXiv 1503.02531). A chain of assistants (Mirzadeh et al., arXiv 1902.03393) is several
such stages, and born-again networks (Furlanello et al., arXiv 1805.04770) one that is repeated, each with
``recovery.teachers=[previous]``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import tf_keras
from annotated_types import Ge, Gt, Le
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate
from compress.data.source import Data
from compress.errors import CompressError
from compress.strategies.distillation.judging import probabilities
from compress.strategies.distillation.student import StudentStrategy
from compress.strategies.options import refuse_without_effect
from compress.strategies.strategy import STRICT, Context
from compress.training import Recovery

_STEPS = 60


@dataclass(frozen=True, config=STRICT)
class Distill(StudentStrategy):
    """Train the student on the soft targets of the pipeline's reference model, or of ``recovery.teachers``.

    Attributes:
        temperature: None: as ``recovery`` says.
        soft_weight: None: as ``recovery`` says.
        omit: classes whose images the student is not shown: it knows them from the soft targets of others alone
            (section 3 of the paper).
        raise_bias: afterwards raise the biases of these classes by one number, so that the student gives them as much
            probability as the teacher does, over the validation images, whose labels are not looked at. (The paper
            chooses the number that is best on the test set.)
    """

    temperature: Annotated[float, Gt(0), Le(1e6)] | None = None
    soft_weight: Annotated[float, Ge(0), Le(1)] | None = None
    omit: tuple[Annotated[int, Ge(0)], ...] = ()
    raise_bias: bool = False

    own_method = "distill"

    def __post_init__(self) -> None:
        """Refuse fields that do nothing."""
        super().__post_init__()
        refuse_without_effect(self, [(bool(self.omit), ("raise_bias",), "omit")])

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Make the student, and train it."""
        context.require_training(self.own_method)
        self.require(context.data, context.recovery, context.stage)
        if self.omit:
            context = context.for_stage(context.stage, data=context.data.without(self.omit))
        student = self.student_of(candidate, context)
        recovery = self.trains_with(context.recovery)
        student = context.for_stage(context.stage, recovery=recovery).recover(student)
        if self.raise_bias:
            raised = self._raise_bias(student.model, context)
            student = student.evolve(measured={**student.measured, "bias_raised": raised})
        return student

    @property
    def asks_of_student(self) -> bool:
        """Its biases, if they are to be raised."""
        return self.raise_bias or super().asks_of_student

    def student_of(self, candidate: Candidate, context: Context) -> Candidate:
        """Return the student, which has the biases that are to be raised."""
        student = super().student_of(candidate, context)
        if self.raise_bias:
            self._biased(student.model, context)
        return student

    def trains_with(self, recovery: Recovery) -> Recovery:
        """Return the stage's recovery with the temperature and the weight given here."""
        own = {"temperature": self.temperature, "soft_weight": self.soft_weight}
        chosen: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
        return replace(recovery, method="distill", **chosen)

    def require(self, data: Data, recovery: Recovery, stage: str) -> None:
        """Refuse to omit classes that are not there, or whose images nobody can tell."""
        if not self.omit:
            return
        if max(self.omit) >= data.classes or len(set(self.omit)) >= data.classes:
            raise CompressError(
                f"strategy.{stage}.omit",
                expected=f"some of the classes from 0 to {data.classes - 1}",
                received=str(list(self.omit)),
                fix="Name classes of the data by their numbers, and leave one at least.",
            )
        unknown = len(data.train) if not data.train.labelled else 0 if data.unlabelled is None else len(data.unlabelled)
        if unknown:
            raise CompressError(
                f"strategy.{stage}.omit",
                expected="labels of all training images, which say what is to be left out",
                received=f"data {data.name}, {unknown} of whose images have none",
                fix=f"Write strategy.{stage}.omit=[], or bring data with y_train and without x_unlabelled.",
            )

    def _biased(self, model: tf_keras.Model, context: Context) -> tf_keras.layers.Layer:
        """Return the layer whose biases can be raised."""
        layer = model.outputs[0].node.layer
        while getattr(layer, "bias", None) is None and len(parents := list(layer.inbound_nodes[0].parent_nodes)) == 1:
            if layer.weights:
                break
            layer = parents[0].layer
        if getattr(layer, "bias", None) is None:
            raise CompressError(
                f"strategy.{context.stage}.raise_bias",
                expected="a student whose last layer has biases",
                received=f"{layer.name} ({type(layer).__name__}), which has none",
                fix=f"Write strategy.{context.stage}.raise_bias=false.",
            )
        return layer

    def _raise_bias(self, model: tf_keras.Model, context: Context) -> float:
        """Raise the biases in place; return by how much."""
        layer, omitted = self._biased(model, context), sorted(set(self.omit))
        x = context.data.validation.x
        wanted = float(probabilities(context.teacher_models(), x)[:, omitted].sum(axis=1).mean())
        given = probabilities([model], x)[:, omitted].sum(axis=1)
        raised = _offset(given, wanted)
        bias = np.asarray(layer.bias).copy()
        bias[omitted] += raised
        layer.bias.assign(bias)
        return raised


def _offset(given: np.ndarray, wanted: float) -> float:
    """Return what some classes' logits must be raised by, for their probabilities [n] to have the mean ``wanted``.

    By halving: the mean grows with the offset.
    """
    odds = np.log(np.clip(given, 1e-12, 1 - 1e-12)) - np.log(np.clip(1 - given, 1e-12, 1.0))
    low, high = -50.0, 50.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if float(np.mean(1 / (1 + np.exp(-(odds + middle))))) < wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2
