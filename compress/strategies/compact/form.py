"""What a compact form is: a cheaper kind of convolution, how it is started from an ordinary one, how it is built."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import tf_keras

from compress.candidate import Guarantee
from compress.graph.kernels import Kernel
from compress.graph.rewrite import NewLayer
from compress.graph.walk import Step
from compress.strategies.goal import Goal, goal_of, matrix_with
from compress.strategies.least_squares import Moments, matrix_of
from compress.strategies.repair import RIDGE, Repair

Parts = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Order:
    """In which order a layer's channels had best lie.

    ``energy`` [c, f]: what is lost of a filter if its part for an input is not there; ``whole`` [c, f]: which places
    of inputs and filters the form leaves whole. ``filters``: which filter had best lie at each place, whatever
    the inputs are.
    """

    energy: np.ndarray | None = None
    whole: np.ndarray | None = None
    filters: np.ndarray | None = None


class Form(ABC):
    """One kind of convolution. Its *parts* are arrays, the last of which has the filters along its last axis."""

    name: ClassVar[str]
    before_relu: ClassVar[bool] = False
    """Whether the layer must be followed by a ReLU, and by nothing else."""

    @abstractmethod
    def misfit(self, layer: tf_keras.layers.Conv2D) -> str | None:
        """Say why an ordinary Conv2D layer cannot have this form."""

    @abstractmethod
    def macs(self, kernel: Kernel) -> float:
        """Return the multiply-adds of what takes the layer's place."""

    @abstractmethod
    def nearest(self, goal: Goal, start: Parts | None = None) -> Parts:
        """Return the parts that come nearest to the goal; ``start``: those of a goal close by."""

    @abstractmethod
    def kernel(self, parts: Parts) -> np.ndarray:
        """Return the ordinary kernel [h, w, c, f] that parts amount to, as the stand-in reads it."""

    def loss(self, goal: Goal, parts: Parts) -> float:
        """Return the squared error of the outputs, relative to their squares."""
        energy = goal.energy
        return goal.error(self.kernel(parts)) / energy if energy else 0.0

    @abstractmethod
    def build(self, layer: tf_keras.layers.Conv2D, parts: Parts) -> list[NewLayer]:
        """Return what takes the layer's place; the layer has the bias that it should have."""

    @abstractmethod
    def added(self, name: str) -> list[str]:
        """Return the names of the layers that it adds to the one that keeps the old layer's name."""

    @abstractmethod
    def guarantee(self, stage: str, names: Sequence[str]) -> Guarantee:
        """Return what is guaranteed of the layers that have this form."""

    def order(self, kernel: np.ndarray, inputs: Mapping[str, np.ndarray]) -> Order | None:
        """Return how the channels had best lie; ``inputs``: mean squares of each input, ``whole`` and ``fine``."""
        return None

    def stand_in(self, layer: tf_keras.layers.Conv2D) -> tf_keras.layers.Conv2D:
        """Return a layer with kernel and bias of the same shapes that computes as the form does."""
        return type(layer).from_config(layer.get_config())

    def solver(self, repair: Repair, step: Step) -> Solver:
        """Return what solves for a layer on what it reads."""
        return KernelSolver(self, repair, step)


def obstacle(layer: tf_keras.layers.Layer) -> str | None:
    """Say why no form can take the layer's place."""
    if type(layer) is not tf_keras.layers.Conv2D:
        return "not an ordinary convolution"
    if layer.groups > 1:
        return "a grouped convolution"
    return "channels first" if layer.data_format != "channels_last" else None


def keeps_size(layer: tf_keras.layers.Conv2D) -> str | None:
    """Say why a smaller kernel at the middle of each window would not see the same pixel."""
    if set(layer.strides) != {1}:
        return "it is strided"
    if min(size % 2 for size in layer.kernel_size) == 0:
        return "its kernel has no middle"
    return None if layer.padding == "same" else "its maps lose their borders (padding valid)"


def apart(layer: tf_keras.layers.Conv2D) -> str | None:
    """Say why its filters cannot be computed in two parts."""
    mixes = getattr(layer.activation, "__name__", "").startswith(("softmax", "log_softmax"))
    return "its activation weighs the filters against each other" if mixes else None


def bias_of(layer: tf_keras.layers.Conv2D) -> tuple[np.ndarray, ...]:
    """Return the bias, if there is one, as the last of a layer's weights."""
    return (np.asarray(layer.bias),) if layer.use_bias else ()


class Solver(ABC):
    """Solves for one layer again and again, as its target moves."""

    parts: Parts

    @abstractmethod
    def solve(self, target: np.ndarray | None) -> np.ndarray:
        """Return kernel and bias [d + 1, filters] for a target, by default what the layer gives; keep the parts."""


class KernelSolver(Solver):
    """Of a form that amounts to an ordinary kernel: the one nearest to the solution of the least squares."""

    def __init__(self, form: Form, repair: Repair, step: Step) -> None:
        self._form, self._repair, self._step = form, repair, step
        self._before = matrix_of(step.node.layer)
        self._known: Moments | None = None
        self._found: Parts | None = None

    def solve(self, target: np.ndarray | None) -> np.ndarray:
        """Return the best kernel of the form, and the bias that gives the mean of the target."""
        layer, repair = self._step.node.layer, self._repair
        self._known = repair.moments(self._step, target, self._known)
        best = repair.solved(layer.name, self._known, self._before, RIDGE)
        goal = goal_of(self._known, best, tuple(layer.kernel.shape), repair.metric(layer.name))
        self.parts = self._found = self._form.nearest(goal, self._found)
        return matrix_with(self._known, best, self._form.kernel(self.parts))
