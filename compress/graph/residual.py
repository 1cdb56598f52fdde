"""Residual blocks: what lies beside a shortcut that passes its input on unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf
import tf_keras

from compress.graph.rewrite import nodes, rewrite, scaled_inputs


@dataclass(frozen=True)
class ResidualBlock:
    """An Add of a tensor and of what layers have made of this tensor, and of it alone.

    ``layers``: all of them, in order; nothing else reads what they make, so they can go with the Add.
    """

    add: str
    shortcut: int
    """Which input of the Add is passed on when the block goes."""
    layers: tuple[str, ...]


def residual_blocks(model: tf_keras.Model) -> tuple[ResidualBlock, ...]:
    """Return the residual blocks of a flat model that could be taken out, in order."""
    every = list(nodes(model))
    maker = {id(tensor): node for node in every for tensor in tf.nest.flatten(node.outputs)}
    readers: dict[int, list[Any]] = {}
    for node in every:
        for tensor in node.keras_inputs:
            readers.setdefault(id(tensor), []).append(node)
    results = {id(tensor) for tensor in model.outputs}
    found = []
    for node in every:
        if _adds(node.layer) and len(node.keras_inputs) == 2:
            for shortcut in (0, 1):
                inside = _between(node, shortcut, every, maker, readers, results)
                if inside:
                    found.append(ResidualBlock(node.layer.name, shortcut, tuple(n.layer.name for n in inside)))
                    break
    return tuple(found)


def sums(model: tf_keras.Model) -> tuple[str, ...]:
    """Return the layers of a flat model that add two tensors, in order."""
    added = (node.layer.name for node in nodes(model) if _adds(node.layer) and len(node.keras_inputs) == 2)
    return tuple(dict.fromkeys(added))


def _adds(layer: tf_keras.layers.Layer) -> bool:
    return isinstance(layer, tf_keras.layers.Add) or getattr(layer, "symbol", "") in ("__operators__.add", "math.add")


def _between(
    add: Any, shortcut: int, every: list[Any], maker: dict[int, Any], readers: dict[int, list[Any]], results: set[int]
) -> list[Any]:
    """Return the calls between the shortcut and the Add, in order; none if they read or feed anything else."""
    start, end = add.keras_inputs[shortcut], add.keras_inputs[1 - shortcut]
    if start.shape != end.shape or start is end:
        return []
    inside: set[int] = set()
    waiting = [end]
    reaches_start = False
    while waiting:
        tensor = waiting.pop()
        if tensor is start:
            reaches_start = True
            continue
        node = maker[id(tensor)]
        if node.is_input:
            return []
        if id(node) not in inside:
            inside.add(id(node))
            waiting.extend(node.keras_inputs)
    chosen = [node for node in every if id(node) in inside]
    for node in chosen:
        outputs = tf.nest.flatten(node.outputs)
        fed = [reader for tensor in outputs for reader in readers.get(id(tensor), ())]
        if len(node.layer.inbound_nodes) != 1 or any(id(tensor) in results for tensor in outputs):
            return []
        if any(id(reader) not in inside and reader is not add for reader in fed):
            return []
    return chosen if reaches_start and len(add.layer.inbound_nodes) == 1 else []


def without_blocks(model: tf_keras.Model, blocks: tuple[ResidualBlock, ...]) -> tf_keras.Model:
    """Return a copy of the model in which the blocks pass their input on."""
    return rewrite(model, bypassed={block.add: block.shortcut for block in blocks})


def without_branches(model: tf_keras.Model, blocks: tuple[ResidualBlock, ...]) -> tf_keras.Model:
    """Return a copy in which the blocks' branches are multiplied with zero: the oracle of :func:`without_blocks`."""
    return rewrite(model, arguments={(b.add, 0): scaled_inputs({1 - b.shortcut: 0.0}) for b in blocks})
