"""Which layer of a student is compared with which layer of its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tensorflow as tf
import tf_keras

from compress.errors import CompressError, did_you_mean
from compress.graph.kernels import kernel_attributes
from compress.graph.residual import sums
from compress.graph.rewrite import Shape, calls, nodes

_PADDING = (tf_keras.layers.ZeroPadding2D, tf_keras.layers.Cropping2D)
_ACTIVATIONS = (
    tf_keras.layers.ReLU,
    tf_keras.layers.Activation,
    tf_keras.layers.LeakyReLU,
    tf_keras.layers.PReLU,
    tf_keras.layers.ELU,
    tf_keras.layers.ThresholdedReLU,
)
_ACTIVATION_FUNCTIONS = ("relu", "relu6", "leaky_relu", "elu", "silu", "swish", "gelu")
_DROPPING = (tf_keras.layers.Dropout, tf_keras.layers.SpatialDropout2D)
_PASSING = (*_DROPPING, tf_keras.layers.MaxPooling2D, tf_keras.layers.AveragePooling2D)
"""Layers behind an activation that have none of their own."""


@dataclass(frozen=True)
class Pair:
    """A layer of the student and one of the teacher, with the shapes of what they give, without the batch."""

    student: str
    teacher: str
    student_shape: Shape
    teacher_shape: Shape


class Layers:
    """The layers of a flat model whose outputs can be looked at: each called once, and giving one tensor."""

    def __init__(self, model: tf_keras.Model, folded: Mapping[str, str] | None = None) -> None:
        """Read the model; ``folded``: batch norm that is gone -> the layer that it has been folded into."""
        self.model = model
        self.folded = folded or {}
        once = {name for name, times in calls(model).items() if times == 1}
        self._nodes = [node for node in nodes(model) if node.layer.name in once]
        self.shapes: dict[str, Shape] = {
            node.layer.name: tuple(tf.nest.flatten(node.outputs)[0].shape)[1:]
            for node in self._nodes
            if len(tf.nest.flatten(node.outputs)) == 1
        }

    @cached_property
    def learned(self) -> tuple[str, ...]:
        """The layers that weights have a part in, in order, without the one that gives the model's output."""
        ending = {tensor.node.layer.name for tensor in self.model.outputs}
        found: dict[str, None] = {}
        for node in nodes(self.model):
            # A layer that is called several times passes on what it has learned, too.
            if kernel_attributes(node.layer) or any(parent.layer.name in found for parent in node.parent_nodes):
                found[node.layer.name] = None
        return tuple(name for name in found if name in self.shapes and name not in ending)

    def maps(self) -> dict[Shape, tuple[str, ...]]:
        """Return size of the maps (height, width) -> where the stage of this size ends.

        That are the sums of its residual blocks, in order; in a network without any, its last layer. Maps that were
        only padded, for the next layer, are no stage.
        """
        added = set(sums(self.model))
        stages: dict[Shape, list[str]] = {}
        for name in self.learned:
            if len(self.shapes[name]) == 3 and not isinstance(self.model.get_layer(name), _PADDING):
                stages.setdefault(self.shapes[name][:2], []).append(name)
        return {size: tuple(name for name in names if name in added) or (names[-1],) for size, names in stages.items()}

    def hidden(self) -> tuple[str, ...]:
        """Return the layers that those with weights read, from the second on: the ends of a network of Dense layers."""
        fed = [self._feeding(node) for node in self._nodes if kernel_attributes(node.layer)]
        return tuple(dict.fromkeys(name for name in fed if name in self.learned))

    def features(self) -> str | None:
        """Return the layer that the last layer with weights reads: the features that the classes are told by."""
        weighted = [node for node in self._nodes if kernel_attributes(node.layer)]
        name = self._feeding(weighted[-1]) if weighted else None
        return name if name in self.shapes and name in self.learned else None

    def last_maps(self) -> str | None:
        """Return the last layer that gives feature maps."""
        return next((name for name in reversed(self.learned) if len(self.shapes[name]) == 3), None)

    def before_activation(self, name: str) -> str | None:
        """Return the layer that the last activation up to the layer ``name`` reads, beyond any pooling.

        The name itself if it does not end with an activation; None if that is within a layer, and so is what it reads.
        """
        node = next(node for node in self._nodes if node.layer.name == name)
        while (isinstance(node.layer, _PASSING) or getattr(node.layer, "rounds_only", False)) and node.parent_nodes:
            (node,) = node.parent_nodes
        if _is_activation(node.layer):
            (parent,) = node.parent_nodes
            return parent.layer.name if parent.layer.name in self.shapes else None
        return name if _is_linear(getattr(node.layer, "activation", None)) else None

    def _feeding(self, node: Any) -> str | None:
        """Return the layer that a call reads, leaving out those that drop features at random."""
        parent = next(iter(node.parent_nodes), None)
        while parent is not None and isinstance(parent.layer, _DROPPING):
            parent = next(iter(parent.parent_nodes), None)
        return None if parent is None else parent.layer.name


def _is_activation(layer: tf_keras.layers.Layer) -> bool:
    """Say whether the layer does nothing but activate; an operation layer carries the function that it calls."""
    if isinstance(layer, tf_keras.layers.Activation):
        return not _is_linear(layer.activation)
    function = str(getattr(getattr(layer, "function", None), "__name__", ""))
    return isinstance(layer, _ACTIVATIONS) or function in _ACTIVATION_FUNCTIONS


def _is_linear(activation: Any) -> bool:
    return activation is None or getattr(activation, "__name__", "") == "linear"


def pair(teacher: Layers, student: Layers, name: str, other: str) -> Pair:
    """Return the pair of the student's layer ``name`` and the teacher's layer ``other``."""
    return Pair(name, other, student.shapes[name], teacher.shapes[other])


def stage_pairs(teacher: Layers, student: Layers) -> list[Pair]:
    """Pair the ends of stages whose maps have the same size, at the same relative depth within the stage.

    Without any size that both have, the stages themselves are paired by relative depth. In two networks without maps,
    the hidden layers are: those of one name and size, or else by depth. Empty where one has maps and the other none.
    """
    ours, theirs = student.maps(), teacher.maps()
    if not ours and not theirs:
        hidden = teacher.hidden()
        # A layer that has become several is known by the one that kept its name.
        shared = [name for name in hidden if name in student.learned and student.shapes[name] == teacher.shapes[name]]
        if shared:
            return [pair(teacher, student, name, name) for name in shared]
        return _by_depth(teacher, student, student.hidden(), hidden)
    common = [size for size in ours if size in theirs]
    if common:
        return [found for size in common for found in _by_depth(teacher, student, ours[size], theirs[size])]
    lasts = (tuple(names[-1] for names in stages.values()) for stages in (ours, theirs))
    return _by_depth(teacher, student, *lasts)


def same_layers(teacher: Layers, student: Layers) -> list[Pair]:
    """Pair layers of one name and one shape that end the networks' parts: sums of residual blocks.

    Without any, the last such layer at each size of the maps. Empty for networks of one family that are not equally
    deep: there, a name says which block it is, not how deep it lies.
    """
    if _another_depth(teacher, student):
        return []
    # The teacher's layer gives what its batch norm, which has been folded into it, gave.
    normed = {linear for norm, linear in teacher.folded.items() if norm in student.shapes}
    others = {name: teacher.folded.get(name, name) for name in student.learned if name not in normed}
    shared = {
        name: other
        for name, other in others.items()
        if len(student.shapes[name]) == 3 and teacher.shapes.get(other) == student.shapes[name]
    }
    added = [name for name in shared if isinstance(student.model.get_layer(name), tf_keras.layers.Add)]
    chosen = added or list({student.shapes[name][:2]: name for name in shared}.values())
    return [pair(teacher, student, name, shared[name]) for name in chosen]


def _another_depth(teacher: Layers, student: Layers) -> bool:
    """Say whether a stage of one network is, by the names of its blocks, the start of the other's."""
    ours, theirs = student.maps(), teacher.maps()
    for size in ours.keys() & theirs.keys():
        fewer, more = sorted((ours[size], theirs[size]), key=len)
        if len(fewer) < len(more) and more[: len(fewer)] == fewer:
            return True
    return False


def feature_pairs(teacher: Layers, student: Layers) -> list[Pair]:
    """Pair the features that the classes are told by.

    Where the student's classifier has become several layers, the features are what goes into the first.
    """
    ours, theirs = student.features(), teacher.features()
    if theirs is not None and theirs in student.learned and ours not in teacher.shapes:
        ours = theirs
    return [] if ours is None or theirs is None else [pair(teacher, student, ours, theirs)]


def pairs_by_rule(rule: Mapping[str, str], teacher: Layers, student: Layers, where: str) -> list[Pair]:
    """Return the pairs that a rule names: student's layer -> teacher's layer.

    A batch norm of the teacher that is gone stands for the layer before it, which it has been folded into.

    Raises:
        CompressError: if there is no such layer to look at.
    """
    found = []
    for name, other in rule.items():
        other = teacher.folded.get(other, other)
        for layers, which, wanted in ((student, "student", name), (teacher, "teacher", other)):
            if wanted not in layers.shapes:
                raise CompressError(
                    where,
                    expected=f"layers of the {which}, {layers.model.name}, that are called once and give one tensor",
                    received=f"{name}: {rule[name]}, with {wanted} as the {which}'s",
                    fix=did_you_mean(wanted, layers.shapes),
                )
        found.append(pair(teacher, student, name, other))
    return found


def _by_depth(teacher: Layers, student: Layers, ours: tuple[str, ...], theirs: tuple[str, ...]) -> list[Pair]:
    """Pair as many as the shorter one has, the last with the last."""
    count = min(len(ours), len(theirs))
    places = (
        (-(-number * len(ours) // count) - 1, -(-number * len(theirs) // count) - 1) for number in range(1, count + 1)
    )
    return [pair(teacher, student, ours[one], theirs[other]) for one, other in places]
