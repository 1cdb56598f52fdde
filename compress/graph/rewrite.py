"""Copy, flatten and rewrite functional Keras models without touching the original."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras.src.layers.core.tf_op_layer import SlicingOpLambda, TFOpLambda

from compress.errors import CompressError
from compress.graph.einsum import einsum

_RECURSION = 4
"""Calls of Keras on top of one another for each layer: one, and training puts as many layers between them again."""


@dataclass(frozen=True)
class NewLayer:
    """A layer to be put into a model, and the weights it starts from (empty: its own initial ones).

    It may be a functional model of one input and one output: its layers, with their weights, are put in.
    """

    layer: tf_keras.layers.Layer
    weights: tuple[np.ndarray, ...] = ()


Replacements = Mapping[str, Sequence[NewLayer]]
"""Layer name -> the chain of layers that takes its place; an empty chain removes the layer."""

Shape = tuple[int | None, ...]

ArgumentEdits = Mapping[tuple[str, int], Callable[[list[Any], dict[str, Any]], None]]
"""(layer name, which of its calls) -> changes the arguments of that call in place."""


def rewrite(
    model: tf_keras.Model,
    replacements: Replacements | None = None,
    arguments: ArgumentEdits | None = None,
    bypassed: Mapping[str, int] | None = None,
    size: tuple[int | None, ...] | None = None,
) -> tf_keras.Model:
    """Return a flat functional copy of ``model`` with some layers replaced by chains of new layers.

    Nested models and Sequentials are laid open; a layer used twice stays shared. All weights are copied;
    nothing is shared with ``model``. Layers that compute in 16 or 64 bits compute in 32 bits in the copy, and a
    ``tf.einsum`` of two tensors is a matrix product there, which Keras can load again.
    A layer that is replaced by several, or by none, must have one input tensor and one output tensor. ``arguments``
    changes what single calls of layers are given. ``bypassed`` (layer -> which of its input tensors) takes layers out
    that pass one of their inputs on, and with them whatever only they have read. ``size``: the sizes of the input
    between the batch and the channels; as before if None.

    Raises:
        CompressError: if the model is not functional (a subclassed model has no graph to read), or a
            name in ``replacements`` is not a layer of it.
    """
    return _rewritten(model, replacements or {}, arguments or {}, bypassed or {}, size)[0]


def flatten(model: tf_keras.Model) -> tuple[tf_keras.Model, dict[str, frozenset[str]]]:
    """Return a flat copy of the model, and for the path of each nested model the names of all layers in it."""
    flat, builder = _rewritten(model, {}, {}, {})
    return flat, {path: frozenset(names) for path, names in builder.nests.items()}


def _rewritten(
    model: tf_keras.Model,
    replacements: Replacements,
    arguments: ArgumentEdits,
    bypassed: Mapping[str, int],
    size: tuple[int | None, ...] | None = None,
) -> tuple[tf_keras.Model, _Builder]:
    require_functional(model)
    # Keras walks a graph by recursion, some calls for each layer in a row.
    sys.setrecursionlimit(max(sys.getrecursionlimit(), _RECURSION * len(list(model._flatten_layers()))))
    builder = _Builder(replacements, arguments, bypassed, frozenset(layer.name for layer in model.layers))
    shapes = [t.shape if size is None else (t.shape[0], *size, t.shape[-1]) for t in model.inputs]
    inputs = [
        tf_keras.Input(batch_shape=shape, dtype=_plain(t.dtype), name=_input_name(t))
        for t, shape in zip(model.inputs, shapes, strict=True)
    ]
    outputs = builder.inline(model, inputs)
    unknown = set(builder.replacements) - builder.replaced
    if unknown:
        raise CompressError(
            "graph",
            expected="the names of layers of the model",
            received=", ".join(sorted(unknown)),
            fix="Name layers as model.summary() shows them.",
        )
    copy = tf_keras.Model(inputs, outputs, name=model.name)
    for layer, weights in builder.pending:
        layer.set_weights(weights)
    return copy, builder


def scaled_inputs(factors: Mapping[int, Any]) -> Callable[[list[Any], dict[str, Any]], None]:
    """Return the edit of a call that multiplies its input tensors, counted in order, with ``factors``."""

    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        position = -1

        def scale(value: Any) -> Any:
            nonlocal position
            if not hasattr(value, "_keras_history"):
                return value
            position += 1
            return _Scaled(factors[position])(value) if position in factors else value

        args[:] = tf.nest.map_structure(scale, args)
        kwargs.update({name: tf.nest.map_structure(scale, value) for name, value in kwargs.items()})

    return edit


class _Scaled(tf_keras.layers.Layer):
    """Multiplies with a factor and, unlike a plain product, passes Keras' mask of the steps that count on."""

    def __init__(self, factor: Any) -> None:
        super().__init__()
        self.supports_masking = True
        self._factor = factor

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Multiply."""
        return inputs * self._factor


def in_float32(config: Any) -> None:
    """Have every layer of a configuration, in wrappers too, compute in 32 bits where it computes in 16 or 64."""
    if isinstance(config, dict):
        policy = config.get("dtype")
        name = policy.get("config", {}).get("name") if isinstance(policy, dict) else policy
        if isinstance(name, str) and name.removeprefix("mixed_") in _OTHER_FLOATS:
            config["dtype"] = "float32"
        for value in config.values():
            in_float32(value)
    elif isinstance(config, list):
        for value in config:
            in_float32(value)


def _plain(dtype: Any) -> str:
    name: str = tf.as_dtype(dtype).name
    return "float32" if name in _OTHER_FLOATS else name


_OTHER_FLOATS = ("float16", "bfloat16", "float64")


def copy_model(model: tf_keras.Model) -> tf_keras.Model:
    """Return a flat functional copy that shares nothing with ``model``."""
    return rewrite(model)


def consumers(model: tf_keras.Model) -> dict[str, list[tf_keras.layers.Layer]]:
    """Return, for each layer name, the layers of the flat ``model`` that read one of its outputs."""
    result: dict[str, list[tf_keras.layers.Layer]] = {layer.name: [] for layer in model.layers}
    for node in nodes(model):
        for parent in node.parent_nodes:
            result.setdefault(parent.layer.name, []).append(node.layer)
    return result


def calls(model: tf_keras.Model) -> dict[str, int]:
    """Return how often each layer of the flat ``model`` is called (more than once: a shared layer)."""
    result: dict[str, int] = {}
    for node in nodes(model):
        result[node.layer.name] = result.get(node.layer.name, 0) + 1
    return result


def named_calls(model: tf_keras.Model) -> list[tuple[str, Any]]:
    """Return (name, node) of every call in the flat ``model``, in order, named by :func:`call_name`."""
    times: dict[str, int] = {}
    found = []
    for node in nodes(model):
        times[node.layer.name] = times.get(node.layer.name, -1) + 1
        found.append((call_name(node.layer.name, times[node.layer.name]), node))
    return found


def call_name(layer: str, call: int) -> str:
    """Return the name of one of a layer's calls, counted from 0: the layer's own, then ``layer:1`` and so on."""
    return f"{layer}:{call}" if call else layer


def positions(model: tf_keras.Model) -> list[tuple[tf_keras.layers.Layer, list[Shape], list[Shape]]]:
    """Return (layer, input shapes, output shapes) of every call in the flat ``model``, in order."""
    return [
        (
            node.layer,
            *([tuple(tensor.shape) for tensor in tf.nest.flatten(t)] for t in (node.keras_inputs, node.outputs)),
        )
        for node in nodes(model)
        if not node.is_input
    ]


class _Builder:
    """Carries the state of one rewrite: fresh layers by original identity, and weights to set at the end."""

    def __init__(
        self, replacements: Replacements, edits: ArgumentEdits, bypassed: Mapping[str, int], outer: frozenset[str]
    ) -> None:
        self.replacements = replacements
        self.edits = edits
        self.bypassed = bypassed
        self._times: dict[str, int] = {}
        self.replaced: set[str] = set()
        self.pending: list[tuple[tf_keras.layers.Layer, list[np.ndarray]]] = []
        self._fresh: dict[int, list[tf_keras.layers.Layer]] = {}
        self._path: tuple[str, ...] = ()
        self.nests: dict[str, set[str]] = {}
        """Path of a nested model -> names of the layers in it."""
        self._names: set[str] = set()
        self._outer = outer
        """Names of the outermost layers: they are kept, and a layer of a nested model gives way."""

    def inline(self, model: tf_keras.Model, inputs: Sequence[Any], prefix: str = "") -> Any:
        """Replay the calls of ``model`` on ``inputs``; return its outputs in the model's own structure."""
        tensors: dict[int, Any] = dict(zip((id(t) for t in model.inputs), inputs, strict=True))

        def mapped(value: Any) -> Any:
            return tensors.get(id(value), value)

        for node in nodes(model):
            if node.is_input:
                continue
            arguments = list(tf.nest.map_structure(mapped, node.call_args))
            keywords = {k: tf.nest.map_structure(mapped, v) for k, v in node.call_kwargs.items()}
            if isinstance(node.layer, SlicingOpLambda):
                arguments[1:] = [_without_ellipsis(spec, len(arguments[0].shape)) for spec in arguments[1:]]
            key = (prefix + node.layer.name, self._times.get(prefix + node.layer.name, 0))
            self._times[key[0]] = key[1] + 1
            if key in self.edits:
                self.edits[key](arguments, keywords)
            if key[0] in self.bypassed:
                results = mapped(node.keras_inputs[self.bypassed[key[0]]])
            else:
                results = self._call(node.layer, arguments, keywords, prefix)
            flat_old, flat_new = tf.nest.flatten(node.outputs), tf.nest.flatten(results)
            tensors.update(zip((id(t) for t in flat_old), flat_new, strict=True))
        return [tensors[id(t)] for t in model.outputs]

    def _call(self, layer: tf_keras.layers.Layer, arguments: Any, keywords: dict[str, Any], prefix: str) -> Any:
        if isinstance(layer, tf_keras.Model):
            require_functional(layer)
            keywords.pop("training", None), keywords.pop("mask", None)
            self._path = (*self._path, layer.name)
            inner = self.inline(layer, tf.nest.flatten(arguments[0]), prefix=f"{prefix}{layer.name}_")
            self._path = self._path[:-1]
            return inner[0] if len(inner) == 1 else inner
        if isinstance(layer, TFOpLambda) and layer.symbol == "einsum" and len(arguments) == 3:
            with contextlib.suppress(ValueError):  # Of another form: it stays as it is.
                return einsum(*arguments)
        fresh = self._fresh_layers(layer, prefix)
        if len(fresh) == 1 and not isinstance(fresh[0], tf_keras.Model):
            return fresh[0](*arguments, **keywords)
        result = arguments[0]
        for replacement in fresh:
            is_model = isinstance(replacement, tf_keras.Model)
            result = self._opened(replacement, result) if is_model else replacement(result)
        return result

    def _opened(self, fragment: tf_keras.Model, value: Any) -> Any:
        """Lay a replacement open that is a model; its layers are new, so nothing is replaced in it."""
        outside = self.replacements, self.edits, self.bypassed
        self.replacements, self.edits, self.bypassed = {}, {}, {}
        (result,) = self.inline(fragment, [value])
        self.replacements, self.edits, self.bypassed = outside
        return result

    def _fresh_layers(self, layer: tf_keras.layers.Layer, prefix: str) -> list[tf_keras.layers.Layer]:
        if id(layer) not in self._fresh:
            chain = self.replacements.get(layer.name)
            if chain is None:
                config = layer.get_config()
                config["name"] = self._unused(layer.name, prefix)
                in_float32(config)
                fresh = [layer.__class__.from_config(config)]
                self.pending.append((fresh[0], layer.get_weights()))
            else:
                self.replaced.add(layer.name)
                fresh = [new.layer for new in chain]
                self._names.update(item.name for item in fresh if not isinstance(item, tf_keras.Model))
                self.pending.extend((new.layer, list(new.weights)) for new in chain if new.weights)
            for item in fresh:
                item.trainable = layer.trainable
            for depth in range(1, len(self._path) + 1):
                names = (item.name for item in fresh if not isinstance(item, tf_keras.Model))
                self.nests.setdefault("/".join(self._path[:depth]), set()).update(names)
            self._fresh[id(layer)] = fresh
        return self._fresh[id(layer)]

    def _unused(self, name: str, prefix: str) -> str:
        taken = self._names | self._outer if prefix else self._names
        chosen = name if name not in taken else prefix + name
        count = 2
        while chosen in taken:
            chosen, count = f"{prefix}{name}_{count}", count + 1
        self._names.add(chosen)
        return chosen


def _without_ellipsis(spec: Any, rank: int) -> Any:
    """Return the slices with ``...`` written out, which Keras cannot save."""
    items = spec if isinstance(spec, (tuple, list)) else (spec,)
    if not any(item is Ellipsis for item in items):
        return spec
    place = next(index for index, item in enumerate(items) if item is Ellipsis)
    whole = {"start": None, "stop": None, "step": None}
    missing = rank - sum(item is not Ellipsis and item is not None for item in items)
    return (*items[:place], *[dict(whole) for _ in range(missing)], *items[place + 1 :])


def nodes(model: tf_keras.Model) -> Iterable[Any]:
    """Yield the nodes of a functional model in an order in which every input exists before it is read.

    Raises:
        CompressError: if the model has no graph of layers.
    """
    require_functional(model)
    by_depth = model._nodes_by_depth
    for depth in sorted(by_depth, reverse=True):
        yield from by_depth[depth]


def require_functional(model: tf_keras.Model) -> None:
    """Refuse a model without a graph of layers.

    Raises:
        CompressError: if it is a subclassed model, or a Sequential that was never built.
    """
    if isinstance(model, tf_keras.Sequential) and not model.built:
        raise CompressError(
            f"model {model.name}",
            expected="a built model",
            received="a Sequential without an input shape",
            fix="Give its first layer an input_shape, or call model.build(...), then save it again.",
        )
    if not getattr(model, "_is_graph_network", False):
        kind = type(model)
        raise CompressError(
            f"model {model.name}",
            expected="a functional or Sequential Keras model",
            received=f"{kind.__module__}.{kind.__qualname__}, which has no graph of layers to read",
            fix="Rebuild it with the functional API: tf_keras.Model(inputs, outputs).",
        )


def _input_name(tensor: Any) -> str:
    name: str = tensor.node.layer.name
    return name
