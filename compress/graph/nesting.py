"""Nested models: which layers of a flat model were in one, and how it gets them back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from compress.graph.rewrite import nodes

Nests = Mapping[str, frozenset[str]]
"""Path of a nested model ("backbone", "backbone/head") -> the names that all layers in it have in the flat model."""


def nest(flat: tf_keras.Model, nests: Nests) -> tf_keras.Model:
    """Return a copy of ``flat`` in which the nested models are models again, under their own names.

    Layers that have been put between those of a nested model belong to it; layers that are gone are not missed. A
    nested model stays laid open where it can be none any more: when it was called twice, shares a layer with the rest
    of the network, or nothing of it is left.
    """
    builder = _Builder(nests)
    inputs = [tf_keras.Input(batch_shape=t.shape, dtype=t.dtype, name=t.node.layer.name) for t in flat.inputs]
    tensors: dict[int, Any] = {id(old): new for old, new in zip(flat.inputs, inputs, strict=True)}
    wanted = {id(tensor) for tensor in flat.outputs}
    builder.build([node for node in nodes(flat) if not node.is_input], tensors, wanted, "")
    model = tf_keras.Model(inputs, [tensors[id(t)] for t in flat.outputs], name=flat.name)
    for layer, weights in builder.weights:
        layer.set_weights(weights)
    return model


@dataclass(frozen=True)
class _Part:
    """One call, or all calls of a nested model."""

    calls: list[Any]
    path: str = ""
    """Of the nested model; empty for a single call."""

    @property
    def written(self) -> set[int]:
        return {id(tensor) for call in self.calls for tensor in tf.nest.flatten(call.outputs)}

    @property
    def read(self) -> list[Any]:
        """Tensors from outside, in the order of their first use."""
        found = {id(t): t for call in self.calls for t in call.keras_inputs}
        return [tensor for key, tensor in found.items() if key not in self.written]


class _Builder:
    def __init__(self, nests: Nests) -> None:
        self.nests = nests
        self.weights: list[tuple[tf_keras.layers.Layer, list[np.ndarray]]] = []
        self._made: dict[int, tf_keras.layers.Layer] = {}

    def build(self, calls: list[Any], tensors: dict[int, Any], wanted: Collection[int], path: str) -> None:
        """Replay the calls of the (nested) model at ``path``; enter what they give into ``tensors``.

        ``wanted``: tensors that are read outside of it.
        """
        waiting = self._parts(calls, path)
        while waiting:
            ready = [part for part in waiting if all(id(tensor) in tensors for tensor in part.read)]
            for part in ready:
                if not part.path:
                    self._call(part.calls[0], tensors)
                else:
                    outside = {id(t) for other in waiting if other is not part for t in other.read} | set(wanted)
                    self._nested(part, tensors, part.written & outside)
            done = {id(part) for part in ready}
            waiting = [part for part in waiting if id(part) not in done]

    def _call(self, call: Any, tensors: dict[int, Any]) -> None:
        def mapped(value: Any) -> Any:
            return tensors.get(id(value), value)

        args = tf.nest.map_structure(mapped, call.call_args)
        kwargs = {name: tf.nest.map_structure(mapped, value) for name, value in call.call_kwargs.items()}
        layer = call.layer
        if id(layer) not in self._made:
            self._made[id(layer)] = layer.__class__.from_config(layer.get_config())
            self.weights.append((self._made[id(layer)], layer.get_weights()))
        results = tf.nest.flatten(self._made[id(layer)](*args, **kwargs))
        tensors.update((id(o), new) for o, new in zip(tf.nest.flatten(call.outputs), results, strict=True))

    def _nested(self, part: _Part, tensors: dict[int, Any], outputs: Collection[int]) -> None:
        read = part.read
        inner: dict[int, Any] = {id(t): tf_keras.Input(batch_shape=t.shape, dtype=t.dtype) for t in read}
        given = [inner[id(tensor)] for tensor in read]
        self.build(part.calls, inner, outputs, part.path)
        model = tf_keras.Model(given, [inner[key] for key in outputs], name=part.path.rpartition("/")[2])
        arguments = [tensors[id(tensor)] for tensor in read]
        results = model(arguments if len(arguments) > 1 else arguments[0])
        tensors.update(zip(outputs, tf.nest.flatten(results), strict=True))

    def _parts(self, calls: list[Any], path: str) -> list[_Part]:
        """Return the calls, those of nested models directly in ``path`` taken together."""
        prefix = f"{path}/" if path else ""
        taken: set[int] = set()
        parts = []
        for name, members in self.nests.items():
            if not name.startswith(prefix) or "/" in name.removeprefix(prefix) or name == path:
                continue
            inside = _with_those_between([call for call in calls if call.layer.name in members], calls)
            apart = {id(call.layer) for call in calls} - {id(call.layer) for call in inside}
            shared = any(id(call.layer) not in apart and call not in inside for call in calls)
            whole = len(inside) == len(calls)
            twice = len({id(call.layer) for call in inside}) < len(inside)
            if not inside or shared or whole or twice or taken & {id(call) for call in inside}:
                continue
            taken |= {id(call) for call in inside}
            parts.append(_Part(inside, name))
        return parts + [_Part([call]) for call in calls if id(call) not in taken]


def _with_those_between(chosen: list[Any], calls: Iterable[Any]) -> list[Any]:
    """Return the chosen calls and all on the way from one of them to another, in order."""
    after: set[int] = set()
    listed = list(calls)
    members = {id(call) for call in chosen}

    def reached(call: Any, known: set[int]) -> bool:
        return any(id(tensor) in known for tensor in call.keras_inputs)

    for call in listed:
        if id(call) in members or reached(call, after):
            after |= {id(tensor) for tensor in tf.nest.flatten(call.outputs)}
    before: set[int] = set()
    for call in reversed(listed):
        outputs = {id(tensor) for tensor in tf.nest.flatten(call.outputs)}
        if id(call) in members or outputs & before:
            before |= {id(tensor) for tensor in call.keras_inputs}
    return [
        call
        for call in listed
        if id(call) in members
        or (reached(call, after) and {id(tensor) for tensor in tf.nest.flatten(call.outputs)} & before)
    ]
