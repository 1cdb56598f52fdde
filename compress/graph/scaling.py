"""A smaller copy of an architecture: narrower, shallower, or the same with weights as initialised.

Nothing here looks at data: how the copy is trained is not this room's business.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tf_keras

from compress.graph.channels.groups import Channels, Group
from compress.graph.channels.surgery import remove_channels
from compress.graph.kernels import kernel_attributes
from compress.graph.residual import residual_blocks, sums
from compress.graph.rewrite import NewLayer, consumers, in_float32, positions, rewrite

_KEEP_SHAPE = (
    *(tf_keras.layers.Activation, tf_keras.layers.ReLU, tf_keras.layers.LeakyReLU, tf_keras.layers.PReLU),
    *(tf_keras.layers.ELU, tf_keras.layers.ThresholdedReLU, tf_keras.layers.BatchNormalization),
    *(tf_keras.layers.Dropout, tf_keras.layers.SpatialDropout1D, tf_keras.layers.SpatialDropout2D),
)
"""Layers that go with the weighted layer that they follow."""
_CONSTANT = ("zeros", "ones", "constant")


@dataclass(frozen=True)
class Smaller:
    """A smaller copy of a model, with the weights that it has kept, and what could not be made smaller, and why."""

    model: tf_keras.Model
    changed: tuple[str, ...]
    """Layers of the original that are narrower, or gone."""
    left_alone: tuple[tuple[str, str], ...] = ()
    """(layer, reason)."""


def narrower(model: tf_keras.Model, share: float, names: Collection[str] | None = None) -> Smaller:
    """Return a copy in which every layer has about ``share`` of its channels, at least one.

    Coupled channels go together. Where several layers write some of a group's channels each, every one of them is
    narrowed alike: the stages of a residual network keep their proportions. Of channels that are coupled to the same
    layers, those of the largest weights stay.

    Args:
        model: a flat functional model.
        share: part of the channels that is kept, above 0 and below 1.
        names: layers that may become narrower; coupled ones do only if all of them may. None: all.
    """
    channels = Channels(model)
    stay = np.ones(channels.count, bool)
    norms = np.zeros(channels.count)
    left_alone = []
    changed: list[str] = []
    for group in channels.groups:
        if group.kept_because is not None:
            if group.members:
                left_alone.append((group.name, group.kept_because))
            continue
        owners = {member.weight.layer for member in group.members}
        if names is not None and not set(group.writers) & owners <= set(names):
            continue
        norms[group.units] = _norms(model, group)
        for units in _alike(channels, group):
            count = max(1, round(share * len(units)))
            order = np.argsort(-norms[units], kind="stable")
            stay[units[order[count:]]] = False
    stay = channels.viable(stay, norms)
    for group in channels.groups:
        if not stay[group.units].all():
            changed += group.writers
    return Smaller(remove_channels(channels, stay), tuple(dict.fromkeys(changed)), tuple(left_alone))


def _alike(channels: Channels, group: Group) -> list[np.ndarray]:
    """Return the units of a group that may go, in parts that the same layers write."""
    written = [channels.labels[event.ids.ravel()] for event in group.events if event.verb == "writes"]
    table = np.stack([np.isin(group.units, units) for units in written], axis=1)
    _, kinds = np.unique(table, axis=0, return_inverse=True)
    free = ~channels.pinned[group.units]
    parts = [group.units[(kinds.ravel() == kind) & free] for kind in np.unique(kinds)]
    return [part for part in parts if part.size]


def _norms(model: tf_keras.Model, group: Group) -> np.ndarray:
    """Return the sum of the squares of the weights that write each unit: [units]."""
    total = np.zeros(len(group))
    for member in group.members:
        if member.weight.trainable and not member.reads:
            value = np.asarray(model.get_layer(member.weight.layer).weights[member.weight.index], np.float64)
            others = tuple(axis for axis in range(value.ndim) if axis != member.axis)
            squares = np.square(value).sum(axis=others)[member.places]
            total += np.bincount(member.units, squares, len(group))
    return total


def shallower(model: tf_keras.Model, share: float, names: Collection[str] | None = None) -> Smaller:
    """Return a copy in which every stage has about ``share`` of its residual blocks, at least one, evenly spread.

    A stage are the sums of one shape. A block whose shortcut changes something stays, and counts as one of its stage. A
    network without residual blocks loses weighted layers that keep their input's shape, with the normalisation and the
    activation behind them; a stage are then all the layers of one output shape.

    Args:
        model: a flat functional model.
        share: part of the blocks that is kept, above 0 and below 1.
        names: layers that may go; a block does only if all of its layers with weights may. None: all.
    """
    blocks = {block.add: block for block in residual_blocks(model)}
    if blocks:
        shapes = {name: tuple(model.get_layer(name).output_shape) for name in sums(model)}
        may = {name for name, block in blocks.items() if names is None or _weighted(model, block.layers) <= set(names)}
        gone = _spread(shapes, may, share)
        bypassed = {name: blocks[name].shortcut for name in gone}
        return Smaller(rewrite(model, bypassed=bypassed), tuple(n for name in gone for n in blocks[name].layers))
    shapes, removable = _plain_layers(model)
    may = {name for name, own in removable.items() if names is None or _weighted(model, own) <= set(names)}
    gone = _spread(shapes, may, share)
    names = [layer for name in gone for layer in removable[name]]
    return Smaller(rewrite(model, {name: [] for name in names}), tuple(names))


def _weighted(model: tf_keras.Model, names: Collection[str]) -> set[str]:
    return {name for name in names if kernel_attributes(model.get_layer(name))}


def _spread(shapes: dict[str, tuple[Any, ...]], removable: set[str], share: float) -> list[str]:
    """Return which of the removable things go, so that in each group of one shape those that stay lie evenly."""
    gone: list[str] = []
    for shape in dict.fromkeys(shapes.values()):
        stage = [name for name, own in shapes.items() if own == shape]
        free = [name for name in stage if name in removable]
        wanted = max(1, round(share * len(stage))) - (len(stage) - len(free))
        keep = min(max(wanted, 0), len(free))
        chosen = {int((i + 0.5) * len(free) / keep) for i in range(keep)}
        gone += [name for place, name in enumerate(free) if place not in chosen]
    return gone


def _plain_layers(model: tf_keras.Model) -> tuple[dict[str, tuple[Any, ...]], dict[str, tuple[str, ...]]]:
    """Return the output shapes of all weighted layers; and of those that can go, what goes with each.

    A depthwise convolution is one with the layer that mixes its channels.
    """
    readers = consumers(model)
    calls = {layer.name: (inputs, outputs) for layer, inputs, outputs in positions(model)}

    def alone(layer: tf_keras.layers.Layer) -> bool:
        inputs, outputs = calls[layer.name]
        once = len(inputs) == len(outputs) == len(layer.inbound_nodes) == 1
        return once and inputs == outputs and not any(output.node.layer is layer for output in model.outputs)

    def chain_from(layer: tf_keras.layers.Layer) -> list[tf_keras.layers.Layer]:
        chain = [layer]
        while len(after := readers[chain[-1].name]) == 1 and isinstance(after[0], _KEEP_SHAPE) and alone(after[0]):
            chain.append(after[0])
        return chain

    shapes: dict[str, tuple[Any, ...]] = {}
    removable: dict[str, tuple[str, ...]] = {}
    before: dict[str, list[str]] = {}
    for layer, _, outputs in positions(model):
        if not kernel_attributes(layer):
            continue
        chain = chain_from(layer)
        if isinstance(layer, (tf_keras.layers.DepthwiseConv1D, tf_keras.layers.DepthwiseConv2D)):
            after = readers[chain[-1].name]
            if len(after) == 1 and kernel_attributes(after[0]):
                before[after[0].name] = [item.name for item in chain] if all(map(alone, chain)) else []
                continue
        shapes[layer.name] = tuple(outputs[0])
        if all(map(alone, chain)) and before.get(layer.name) != []:
            removable[layer.name] = (*before.get(layer.name, ()), *(item.name for item in chain))
    return shapes, removable


def with_fresh_weights(model: tf_keras.Model, seed: int) -> tf_keras.Model:
    """Return a copy whose trainable layers have weights as their initialisers draw them from ``seed``.

    What is not trained stays: the statistics of a Normalization layer, a frozen embedding. A kernel whose initialiser
    is a constant gets Glorot's uniform one: all its outputs would stay the same.
    """
    tf_keras.utils.set_random_seed(seed)
    replacements: dict[str, Sequence[NewLayer]] = {}
    for layer in model.layers:
        if layer.trainable_weights:
            config = copy.deepcopy(layer.get_config())
            in_float32(config)
            _by_the_seed(config)
            replacements[layer.name] = [NewLayer(layer.__class__.from_config(config))]
    return rewrite(model, replacements)


def _by_the_seed(config: Any) -> None:
    """Have every initialiser draw from the program's seed, and no kernel start as a constant."""
    if isinstance(config, dict):
        for name, value in config.items():
            if name.endswith("_initializer"):
                kind = str(value.get("class_name") if isinstance(value, dict) else value).lower()
                if name.endswith(("kernel_initializer", "embeddings_initializer")) and kind in _CONSTANT:
                    config[name] = "glorot_uniform"
                elif isinstance(value, dict) and "seed" in (value.get("config") or {}):
                    value["config"]["seed"] = None
            else:
                _by_the_seed(value)
    elif isinstance(config, list):
        for value in config:
            _by_the_seed(value)
