"""The bridge back: write a ``tf_keras`` model as a Keras 3 ``.keras`` file that needs nothing but Keras 3."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras.src.layers.core.tf_op_layer import SlicingOpLambda, TFOpLambda

from compress.errors import CompressError
from compress.graph.keras3 import import_keras, short
from compress.graph.rewrite import nodes

_TOLERANCE = 1e-5
_RENAMED = {("LeakyReLU", "alpha"): "negative_slope"}
_FIX = "Use the tf_keras file or the .tflite file, or put a layer of Keras in its place."


def to_keras3(model: tf_keras.Model, path: Path) -> None:
    """Write ``model`` to ``path`` in the format of Keras 3; its outputs are compared first.

    Written to a temporary name and renamed.

    Raises:
        CompressError: if a layer has no counterpart in Keras 3, or the outputs differ by more than 1e-5 of the largest.
    """
    rebuilt = keras3_model(model)
    partial = path.with_name(f".{path.stem}.partial.keras")
    rebuilt.save(str(partial))
    partial.replace(path)


def keras3_model(model: tf_keras.Model) -> Any:
    """Return the Keras 3 model that computes what the ``tf_keras`` model computes; nested models stay nested.

    Raises:
        CompressError: as :func:`to_keras3`.
    """
    keras = import_keras()
    tensors: dict[int, Any] = {}
    for tensor in model.inputs:
        made = keras.Input(batch_shape=tuple(tensor.shape), dtype=tensor.dtype.name, name=tensor.node.layer.name)
        tensors[id(tensor)] = made
    layers: dict[str, Any] = {}
    for node in nodes(model):
        if node.is_input:
            continue
        args = tf.nest.map_structure(lambda value: tensors.get(id(value), value), node.call_args)
        kwargs = {
            name: tf.nest.map_structure(lambda value: tensors.get(id(value), value), value)
            for name, value in node.call_kwargs.items()
        }
        try:
            results = _call(keras, node.layer, args, kwargs, layers)
        except CompressError:
            raise
        except Exception as error:
            # Keras 3 raises whatever its layers raise.
            raise _unsupported(node.layer, short(error)) from error
        flat = tf.nest.flatten(results)
        tensors.update((id(old), new) for old, new in zip(tf.nest.flatten(node.outputs), flat, strict=True))
    # Keras 3 warns of a single input in a list when it is called with that input alone.
    inputs, outputs = ([tensors[id(t)] for t in side] for side in (model.inputs, model.outputs))
    _name_apart(keras, outputs, {layer.name for layer in model.layers})
    rebuilt = keras.Model(*(side if len(side) > 1 else side[0] for side in (inputs, outputs)), name=model.name)
    for name, layer in layers.items():
        if not isinstance(layer, keras.Model):
            layer.set_weights(model.get_layer(name).get_weights())
    _compare(model, rebuilt)
    return rebuilt


def _name_apart(keras: Any, outputs: Sequence[Any], taken: set[str]) -> None:
    """Give operations, which Keras 3 names itself, names that no layer has."""
    waiting, seen = list(outputs), set()
    while waiting:
        operation, index, _ = waiting.pop()._keras_history
        if (id(operation), index) not in seen:
            seen.add((id(operation), index))
            waiting.extend(operation._inbound_nodes[index].input_tensors)
            if not isinstance(operation, keras.layers.Layer):
                name = operation.name
                others = map(f"{name}_{{}}".format, itertools.count(1))
                operation.name = next(n for n in itertools.chain([name], others) if n not in taken)
                taken.add(operation.name)


def _call(keras: Any, layer: tf_keras.layers.Layer, args: Any, kwargs: dict[str, Any], made: dict[str, Any]) -> Any:
    if isinstance(layer, (TFOpLambda, SlicingOpLambda)):
        return _operation(keras, layer, list(args), {k: v for k, v in kwargs.items() if v is not None and k != "name"})
    if layer.name not in made:
        nested = isinstance(layer, tf_keras.Model)
        made[layer.name] = keras3_model(layer) if nested else _counterpart(keras, layer)
    kwargs.pop("mask", None)
    return made[layer.name](*args, **{name: value for name, value in kwargs.items() if value is not None})


def _counterpart(keras: Any, layer: tf_keras.layers.Layer) -> Any:
    kind = getattr(keras.layers, type(layer).__name__, None)
    if kind is None or not type(layer).__module__.startswith("tf_keras."):
        raise _unsupported(layer, "no layer of that name")
    return kind(**_translated(keras, kind, layer.get_config()))


def _translated(keras: Any, kind: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with the arguments that Keras 3 knows."""
    known = {
        name
        for base in kind.__mro__
        if "__init__" in vars(base)
        for name in inspect.signature(vars(base)["__init__"]).parameters
    }
    result: dict[str, Any] = {}
    for key, value in config.items():
        name = _RENAMED.get((kind.__name__, key), key)
        if name not in known or name.endswith(("_initializer", "_regularizer", "_constraint")):
            continue
        if isinstance(value, dict) and "class_name" in value and "config" in value:
            inner = getattr(keras.layers, value["class_name"], None)
            if inner is not None:
                value = inner(**_translated(keras, inner, value["config"]))
        if name == "axis" and isinstance(value, (list, tuple)) and len(value) == 1:
            value = value[0]
        if name in ("scale", "offset") and isinstance(value, (list, tuple, np.ndarray)):
            value = np.asarray(value, np.float32).tolist()
        result[name] = value
    if kind.__name__ == "ReLU" and result.get("max_value") is not None:
        result["max_value"] = float(result["max_value"])
    return result


def _operation(keras: Any, layer: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Call the function of ``keras.ops`` that stands for a TensorFlow function."""
    symbol = layer.symbol
    if isinstance(layer, SlicingOpLambda):
        return args[0][_slices(args[1] if len(args) > 1 else kwargs["slice_spec"])]
    table = _operations(keras)
    if symbol not in table:
        raise _unsupported(layer, f"tf.{symbol}")
    while args and args[-1] is None:
        args.pop()
    return table[symbol](*args, **kwargs)


def _slices(spec: Any) -> Any:
    if isinstance(spec, (tuple, list)):
        return tuple(_slices(item) for item in spec)
    return slice(spec["start"], spec["stop"], spec["step"]) if isinstance(spec, dict) else spec


def _operations(keras: Any) -> dict[str, Callable[..., Any]]:
    ops = keras.ops

    def pad(x: Any, paddings: Any, mode: str = "CONSTANT", name: Any = None, constant_values: float = 0) -> Any:
        if mode != "CONSTANT" or constant_values:
            raise ValueError(f"padding of mode {mode} with {constant_values}")
        return ops.pad(x, [list(map(int, pair)) for pair in paddings])

    def gelu(x: Any, approximate: bool = False) -> Any:
        return ops.gelu(x, approximate=approximate)

    def reduce(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, axis=None, keepdims=False: function(x, axis=axis, keepdims=keepdims)

    def split(x: Any, num_or_size_splits: Any, axis: int = 0) -> Any:
        if isinstance(num_or_size_splits, int):
            return ops.split(x, num_or_size_splits, axis=axis)
        return ops.split(x, np.cumsum(num_or_size_splits)[:-1].tolist(), axis=axis)

    def matmul(a: Any, b: Any, transpose_a: bool = False, transpose_b: bool = False) -> Any:
        return ops.matmul(*(_turned(ops, x) if turn else x for x, turn in ((a, transpose_a), (b, transpose_b))))

    names = {
        ops.add: ("__operators__.add", "__operators__.radd", "math.add"),
        ops.subtract: ("__operators__.sub", "math.subtract"),
        ops.multiply: ("__operators__.mul", "__operators__.rmul", "math.multiply"),
        ops.true_divide: ("__operators__.truediv", "math.divide", "math.truediv"),
        ops.maximum: ("math.maximum",),
        ops.minimum: ("math.minimum",),
        ops.abs: ("abs", "math.abs"),
        ops.sign: ("math.sign", "sign"),
        ops.round: ("math.round", "round"),
        ops.clip: ("clip_by_value", "compat.v1.clip_by_value"),
        ops.stop_gradient: ("stop_gradient",),
        ops.exp: ("math.exp",),
        ops.log: ("math.log",),
        ops.sqrt: ("math.sqrt",),
        ops.square: ("math.square",),
        ops.tanh: ("math.tanh", "tanh"),
        ops.sigmoid: ("math.sigmoid", "sigmoid"),
        ops.relu: ("nn.relu",),
        ops.relu6: ("nn.relu6",),
        ops.silu: ("nn.silu", "nn.swish"),
        gelu: ("nn.gelu",),
        ops.softmax: ("nn.softmax",),
        ops.reshape: ("reshape",),
        ops.expand_dims: ("expand_dims",),
        ops.squeeze: ("squeeze", "compat.v1.squeeze"),
        matmul: ("linalg.matmul",),
        pad: ("pad", "compat.v1.pad"),
        split: ("split",),
        reduce(ops.mean): ("math.reduce_mean", "compat.v1.reduce_mean"),
        reduce(ops.sum): ("math.reduce_sum", "compat.v1.reduce_sum"),
        reduce(ops.max): ("math.reduce_max", "compat.v1.reduce_max"),
    }
    table = {symbol: function for function, symbols in names.items() for symbol in symbols}
    table["einsum"] = ops.einsum
    table["concat"] = lambda values, axis: ops.concatenate(values, axis=axis)
    table["transpose"] = table["compat.v1.transpose"] = lambda x, perm=None, conjugate=False: ops.transpose(x, perm)
    return table


def _turned(ops: Any, x: Any) -> Any:
    rank = len(x.shape)
    return ops.transpose(x, [*range(rank - 2), rank - 1, rank - 2])


def _compare(model: tf_keras.Model, rebuilt: Any) -> None:
    random = np.random.default_rng(0)
    samples = [
        random.integers(0, 2, [size or 32 for size in (2, *t.shape[1:])]).astype(t.dtype.as_numpy_dtype)
        if not t.dtype.is_floating or any(isinstance(layer, tf_keras.layers.Embedding) for layer in model.layers)
        else random.standard_normal([size or 32 for size in (2, *t.shape[1:])]).astype(np.float32)
        for t in model.inputs
    ]
    given = samples if len(samples) > 1 else samples[0]
    ours, theirs = (tf.nest.flatten(m(given, training=False)) for m in (model, rebuilt))
    for tensor, one, other in zip(model.outputs, map(np.asarray, ours), map(np.asarray, theirs), strict=True):
        limit = _TOLERANCE * max(1.0, float(np.abs(one).max(initial=0.0)))
        if one.shape != other.shape or not np.abs(one - other).max(initial=0.0) <= limit:
            raise CompressError(
                f"model {model.name}, output {tensor.node.layer.name}",
                expected=f"a Keras 3 model with the same outputs within {limit:.2g}",
                received="outputs that differ",
                fix=f"{_FIX} Please report this model.",
            )


def _unsupported(layer: tf_keras.layers.Layer, found: str) -> CompressError:
    return CompressError(
        f"layer {layer.name}",
        expected="a layer or operation with a counterpart in Keras 3",
        received=f"{type(layer).__module__}.{type(layer).__name__} ({found})",
        fix=_FIX,
    )
