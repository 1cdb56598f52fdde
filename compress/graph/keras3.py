"""The bridge from Keras 3 files: rebuild what they hold as flat functional ``tf_keras`` models."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tensorflow as tf
import tf_keras

from compress.errors import CompressError
from compress.graph.einsum import einsum
from compress.graph.nesting import Nests

layers = tf_keras.layers

_TOLERANCE = 1e-5
"""Largest difference of an output from Keras 3's, relative to the largest output (or to 1 if that is less)."""
_UNKNOWN_LENGTH = 96
"""Length used for an open dimension (but the batch) when outputs are compared."""
_NOT_REBUILT = ("RNN", "StringLookup", "IntegerLookup", "TextVectorization", "Hashing", "SpectralNormalization")
"""Classes that both libraries have, but that cannot be rebuilt from the configuration and the weights alone."""
_IMPLICIT_MASKS = ("mask", "query_mask", "value_mask", "key_mask")
"""Call arguments that both libraries fill in by themselves."""
_RENAMED = {("LeakyReLU", "negative_slope"): "alpha"}
_SAME = ("elu", "exponential", "gelu", "linear", "mish", "relu", "selu", "sigmoid", "softmax", "softplus", "softsign")
_ACTIVATIONS = {**{name: name for name in (*_SAME, "swish", "tanh")}, "silu": "swish"}
"""Activations that both libraries compute alike, with their names in ``tf_keras``."""
_REPLAYED_ACTIVATIONS = ("hard_sigmoid", "hard_silu", "hard_swish", "leaky_relu", "relu6")
"""Activations that ``tf_keras`` lacks or computes otherwise; layers take their place."""
_TENSOR_FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "Absolute": lambda _, x: tf.abs(x),
    "Max": lambda op, x: tf.reduce_max(x, op.axis, op.keepdims),
    "Mean": lambda op, x: tf.reduce_mean(x, op.axis, op.keepdims),
    "Pad": lambda op, x: tf.pad(x, op.pad_width, op.mode),
    "Split": lambda op, x: tf.split(x, _sizes(op.indices_or_sections, x.shape[op.axis]), op.axis),
    "Sum": lambda op, x: tf.reduce_sum(x, op.axis, op.keepdims),
    "Transpose": lambda op, x: tf.transpose(x, op.axes),
}
"""Functions of ``keras.ops`` that have an equal in TensorFlow."""
_PLAIN = {"alpha": 1.0, "approximate": False, "negative_slope": 0.2, "axis": -1}
"""The parameters that the name of an activation stands for."""
_FIX = "Save the model with layers that tf_keras has too, or cut this part off."


def is_keras3_file(path: Path) -> bool:
    """Say whether Keras 3 wrote the ``.keras`` or ``.h5`` file, from what it says itself; no code of it runs."""
    version: Any = ""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if "metadata.json" in archive.namelist():
                    version = json.loads(archive.read("metadata.json")).get("keras_version", "")
                if not version:
                    config = archive.read("config.json")
                    return b'"keras.src.models.' in config or b'"DTypePolicy"' in config
        elif h5py.is_hdf5(path):
            with h5py.File(path) as file:
                version = file.attrs.get("keras_version", "")
    except (OSError, ValueError, LookupError, AttributeError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return False
    return str(version.decode() if isinstance(version, bytes) else version).startswith("3.")


def from_keras3(path: Path, *, allow_code: bool = False) -> tf_keras.Model:
    """Return the model of :func:`read_keras3`."""
    return read_keras3(path, allow_code=allow_code)[0]


def read_keras3(path: Path, *, allow_code: bool = False) -> tuple[tf_keras.Model, Nests]:
    """Return the model of a Keras 3 file as a flat functional ``tf_keras`` model with equal outputs; and its nests.

    ``allow_code``: load Lambda layers too, which runs code of the file.

    Raises:
        CompressError: if the file cannot be loaded, a layer of it has no counterpart, or the outputs of the
            rebuilt model differ.
    """
    keras = import_keras()
    try:
        source = keras.saving.load_model(str(path), compile=False, safe_mode=not allow_code)
    except Exception as error:
        # Keras raises whatever its layers raise.
        raise CompressError(
            f"model {path}",
            expected="a model that Keras 3 can load by itself",
            received=short(error),
            fix=f"Save it again as .keras with Keras {keras.__version__} and Keras' own layers only.",
        ) from error
    functional = _functional(source, f"model {path}")
    _use_full_precision(functional)
    replay = _Replay()
    try:
        inputs = [tf_keras.Input(batch_shape=x.shape, dtype=x.dtype, name=tf_name(x.name)) for x in functional.inputs]
        model = tf_keras.Model(inputs, replay.inline(functional, inputs), name=tf_name(source.name))
        for ours, theirs in replay.pending:
            _copy_weights(ours, theirs)
        _compare(path, functional, model)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, tf.errors.OpError) as error:
        raise CompressError(
            f"model {path}",
            expected="a Keras 3 model that tf_keras can build and run",
            received=f"{short(error)} (at layer {replay.at})",
            fix=_FIX,
        ) from error
    return model, {name: frozenset(names) for name, names in replay.nests.items()}


def short(error: BaseException) -> str:
    """Return the kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:200]}"


def import_keras() -> Any:
    """Return the module ``keras`` 3 with its TensorFlow backend.

    Raises:
        CompressError: if it is not installed, or another one is already imported.
    """
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = "tensorflow"
    try:
        import keras
    except ImportError as error:
        raise CompressError(
            "Keras 3",
            expected="the package keras 3, to read or write files of Keras 3",
            received=f"none that can be imported ({error})",
            fix="Install it: pip install 'compress[keras3]'. Files of tf_keras work without it.",
        ) from error
    backend = keras.backend.backend()
    if not keras.__version__.startswith("3.") or backend != "tensorflow":
        raise CompressError(
            "Keras 3",
            expected="the package keras 3 with its TensorFlow backend",
            received=f"keras {keras.__version__} with backend {backend}, already imported",
            fix="Install keras>=3 and set KERAS_BACKEND=tensorflow.",
        )
    return keras


def _functional(model: Any, where: str) -> Any:
    """Return the Keras 3 functional model behind a model that may be Sequential."""
    import keras

    if isinstance(model, keras.Sequential):
        model = model._functional
    if not isinstance(model, keras.Model) or not hasattr(model, "_nodes_by_depth"):
        raise CompressError(
            where,
            expected="a functional Keras 3 model, or a Sequential with a known input shape",
            received="an unbuilt Sequential" if model is None else f"{type(model).__module__}.{type(model).__name__}",
            fix="Rebuild it with the functional API: keras.Model(inputs, outputs).",
        )
    return model


def _use_full_precision(model: Any) -> None:
    """Let layers that compute in 16 bits with 32-bit weights compute in 32 bits."""
    for layer in model._flatten_layers():
        if layer.quantization_mode is not None:
            raise _unsupported(layer, f"weights quantized to {layer.quantization_mode}")
        if layer.compute_dtype != layer.variable_dtype:
            layer.dtype_policy = layer.variable_dtype


def tf_name(name: str) -> str:
    """Return a name that TensorFlow takes as a scope."""
    legal = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    return legal if re.match(r"[A-Za-z0-9.]", legal) else f"layer{legal}"


def _unsupported(layer: Any, found: str = "") -> CompressError:
    return CompressError(
        f"layer {layer.name}",
        expected="a layer or operation with a counterpart in tf_keras",
        received=f"Keras 3's {type(layer).__module__}.{type(layer).__name__}{' with ' if found else ''}{found}",
        fix=_FIX,
    )


class _Replay:
    """Calls the counterpart of every layer of a Keras 3 model once more, on ``tf_keras`` tensors."""

    def __init__(self) -> None:
        self.pending: list[tuple[tf_keras.layers.Layer, Any]] = []
        self.at = "-"
        self._made: dict[int, tf_keras.layers.Layer] = {}
        self._names: set[str] = set()
        self._path: tuple[str, ...] = ()
        self.nests: dict[str, set[str]] = {}
        """Path of a nested model -> names of the layers in it."""

    def inline(self, model: Any, inputs: Sequence[Any], prefix: str = "") -> list[Any]:
        """Replay ``model`` on ``inputs``; return the flat list of its outputs."""
        import keras

        tensors = {id(old): new for old, new in zip(model.inputs, inputs, strict=True)}
        self._names.update(tensor.node.layer.name for tensor in tensors.values())

        def mapped(value: Any) -> Any:
            return keras.tree.map_structure(lambda leaf: tensors.get(id(leaf), leaf), value)

        for node, kwargs in _needed_calls(model):
            results = tf.nest.flatten(self._call(node, mapped(node.arguments.args), mapped(kwargs), prefix))
            tensors.update((id(old), new) for old, new in zip(node.outputs, results, strict=True))
        return [tensors[id(tensor)] for tensor in model.outputs]

    def _call(self, node: Any, args: tuple[Any, ...], kwargs: dict[str, Any], prefix: str) -> Any:
        import keras

        operation = node.operation
        self.at = f"{prefix}{operation.name}"
        if isinstance(operation, keras.Model):
            inner = _functional(operation, f"layer {operation.name}")
            self._path = (*self._path, tf_name(operation.name))
            outputs = self.inline(inner, keras.tree.flatten(args[0]), f"{prefix}{operation.name}_")
            self._path = self._path[:-1]
            return outputs
        if not isinstance(operation, keras.layers.Layer):
            if kwargs:
                raise _unsupported(operation, f"arguments {', '.join(kwargs)}")
            return self._operation(node, args, prefix)
        if id(operation) not in self._made:
            self._made[id(operation)] = _counterpart(operation, self._unused(prefix, operation.name))
            self.pending.append((self._made[id(operation)], operation))
        layer, activation = self._made[id(operation)], _replayed_activation(operation)
        if "training" in kwargs and not layer._call_spec.expects_training_arg:
            del kwargs["training"]
        result = layer(*args, **kwargs)
        return result if activation is None else self._activate(activation, result, f"{layer.name}_")

    def _unused(self, prefix: str, name: str) -> str:
        base = tf_name(name if tf_name(name) not in self._names else prefix + name)
        chosen = next(
            n for n in itertools.chain([base], map(f"{base}_{{}}".format, itertools.count(1))) if n not in self._names
        )
        self._names.add(chosen)
        for depth in range(1, len(self._path) + 1):
            self.nests.setdefault("/".join(self._path[:depth]), set()).add(chosen)
        return chosen

    def _activate(self, activation: str, x: Any, prefix: str) -> Any:
        def name(part: str) -> str:
            return self._unused("", prefix + part)

        if activation in _ACTIVATIONS:
            return layers.Activation(_ACTIVATIONS[activation], name=name("activation"))(x)
        if activation == "relu6":
            return layers.ReLU(6.0, name=name("relu6"))(x)
        if activation == "leaky_relu":
            return layers.LeakyReLU(alpha=0.2, name=name("leaky_relu"))(x)
        gate = layers.Rescaling(1.0, offset=3.0, name=name("shift"))(x)
        gate = layers.ReLU(6.0, name=name("relu6"))(gate)
        gate = layers.Rescaling(1.0 / 6.0, name=name("scale"))(gate)
        return gate if activation == "hard_sigmoid" else layers.Multiply(name=name("gate"))([x, gate])

    def _operation(self, node: Any, args: tuple[Any, ...], prefix: str) -> Any:
        """Replay a function of ``keras.ops``, or an operator between tensors."""
        operation, kind = node.operation, type(node.operation).__name__
        name, shape = self._unused(prefix, operation.name), node.outputs[0].shape
        activation = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind).lower()
        is_plain = all(getattr(operation, key, value) == value for key, value in _PLAIN.items())
        tensors, affine = [value for value in args if _is_tensor(value)], _affine(kind, args)
        if kind in ("Add", "Subtract", "Multiply", "Maximum", "Minimum") and len(tensors) == 2:
            if len(tensors[0].shape) == len(tensors[1].shape):
                return getattr(layers, kind)(name=name)(tensors)
        elif affine is not None:
            return layers.Rescaling(affine[0], offset=affine[1], name=name)(tensors[0])
        elif is_plain and activation in (*_ACTIVATIONS, *_REPLAYED_ACTIVATIONS):
            return self._activate(activation, args[0], f"{name}_")
        elif kind in ("Reshape", "ExpandDims", "Squeeze") and shape[:1] == args[0].shape[:1]:
            return layers.Reshape([-1 if size is None else size for size in shape[1:]], name=name)(args[0])
        elif kind == "Concatenate":
            return layers.Concatenate(axis=operation.axis, name=name)(list(args[0]))
        elif kind == "Matmul" and len(args[0].shape) > 1 < len(args[1].shape):
            return tf.matmul(*args)
        elif kind == "Einsum" and len(args) == 2:
            return einsum(operation.subscripts, *args)
        elif kind == "GetItem":
            return args[0][args[1]]
        elif kind in _TENSOR_FUNCTIONS and len(args) == 1:
            return _TENSOR_FUNCTIONS[kind](operation, args[0])
        raise _unsupported(operation)


def _sizes(split: Any, whole: int) -> Any:
    """Return the parts of a split as TensorFlow counts them: how many, or the size of each."""
    return split if isinstance(split, int) else np.diff([0, *split, whole]).tolist()


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "_keras_history")


def _affine(kind: str, args: tuple[Any, ...]) -> tuple[float, float] | None:
    """Return (a, b) for which an operation between one tensor x and a number is ``a * x + b``, else None."""
    number = next((float(value) for value in args if isinstance(value, int | float)), None)
    if number is None or len(args) != 2:
        return (-1.0, 0.0) if kind == "Negative" else None
    known = {"Add": (1.0, number), "Subtract": (-1.0, number), "Multiply": (number, 0.0)}
    if _is_tensor(args[0]):
        known["Subtract"] = (1.0, -number)
        known["Divide"] = known["TrueDivide"] = (1.0 / number if number else np.inf, 0.0)
    return known.get(kind)


def _needed_calls(model: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Return the calls that the outputs depend on, each after those it depends on, without the implicit masks."""
    import keras

    calls, needed = [], {id(tensor) for tensor in model.outputs}
    for depth in sorted(model._nodes_by_depth):
        for node in model._nodes_by_depth[depth]:
            if node.is_input or not any(id(tensor) in needed for tensor in node.outputs):
                continue
            kwargs = {k: v for k, v in node.arguments.kwargs.items() if k not in _IMPLICIT_MASKS and v is not None}
            needed.update(id(leaf) for leaf in keras.tree.flatten((node.arguments.args, kwargs)))
            calls.append((node, kwargs))
    return calls[::-1]


def _replayed_activation(layer: Any) -> str | None:
    """Return the activation that layers after this one must compute, if any."""
    kind, name = type(layer).__name__, getattr(getattr(layer, "activation", None), "__name__", None)
    applied_last = kind in ("Activation", "Dense", "EinsumDense") or ("Conv" in kind and "LSTM" not in kind)
    return name if applied_last and name in _REPLAYED_ACTIVATIONS else None


def _counterpart(layer: Any, name: str) -> tf_keras.layers.Layer:
    """Return the unbuilt ``tf_keras`` layer that does what the Keras 3 ``layer`` does."""
    kind = type(layer).__name__
    if not type(layer).__module__.startswith("keras."):
        raise _unsupported(layer)
    common = {"name": name, "trainable": layer.trainable, "dtype": layer.variable_dtype}
    if kind == "Lambda":
        return layers.Lambda(layer.function, arguments=layer.arguments, **common)
    if kind == "Normalization":
        given = {"axis": layer.axis, "invert": layer.invert}
        return layers.Normalization(mean=np.asarray(layer.mean), variance=np.asarray(layer.variance), **given, **common)
    if kind == "TimeDistributed" and _replayed_activation(layer.layer) is None:
        return layers.TimeDistributed(_counterpart(layer.layer, tf_name(layer.layer.name)), **common)
    if kind == "Bidirectional":
        forward = _counterpart(layer.forward_layer, tf_name(layer.forward_layer.name.removeprefix("forward_")))
        backward = _counterpart(layer.backward_layer, tf_name(layer.backward_layer.name.removeprefix("backward_")))
        return layers.Bidirectional(forward, merge_mode=layer.merge_mode, backward_layer=backward, **common)
    if kind in (*_NOT_REBUILT, "TimeDistributed") or not hasattr(layers, kind):
        raise _unsupported(layer)
    for switch in ("stateful", "lora_enabled"):
        if getattr(layer, switch, False):
            raise _unsupported(layer, switch)
    target = getattr(layers, kind)
    return target(**_arguments(layer, target), **common)


def _arguments(layer: Any, target: type) -> dict[str, Any]:
    """Return the arguments for ``target``; what it does not know must have no effect in ``layer`` either."""
    known, defaults = _parameters(target), _parameters(type(layer))
    result: dict[str, Any] = {}
    for key, value in layer.get_config().items():
        renamed = _RENAMED.get((target.__name__, key), key)
        if key in ("name", "trainable", "dtype", "seed") or key.endswith("_initializer"):
            continue
        if key.endswith("activation") and value is not None:
            if value not in _ACTIVATIONS and value != _replayed_activation(layer):
                raise _unsupported(layer, f"activation {value}")
            value = _ACTIVATIONS.get(value, "linear")
        if renamed in known or (key == "zero_output_for_mask" and value):
            result[renamed] = value
        elif value != defaults.get(key) and value not in (None, False, "channels_last"):
            raise _unsupported(layer, f"{key}={value}")
    return result


def _parameters(kind: type) -> dict[str, Any]:
    """Return the parameters of a class and of those it inherits from, with their defaults."""
    own = [vars(base)["__init__"] for base in reversed(kind.__mro__) if "__init__" in vars(base)]
    return {k: p.default for init in own for k, p in inspect.signature(init).parameters.items()}


def _copy_weights(ours: tf_keras.layers.Layer, theirs: Any) -> None:
    """Give ``ours`` the weights of ``theirs``: by name where names are unique and the same, else by position."""
    if type(theirs).__name__ == "Normalization":
        return  # It got them as constants.
    source = {w.name: np.asarray(w) for w in theirs.weights}
    names = [w.name.split("/")[-1].split(":")[0] for w in ours.weights]
    values = [np.asarray(w) for w in theirs.weights]
    if len(source) == len(values) and set(source) == set(names) and len(set(names)) == len(names):
        values = [source[name] for name in names]
    wanted, given = [tuple(w.shape) for w in ours.weights], [v.shape for v in values]
    if wanted != given:
        raise CompressError(
            f"layer {theirs.name} ({type(theirs).__name__})",
            expected=f"weights of shapes {wanted}, as tf_keras has them",
            received=f"{given} in the Keras 3 file",
            fix=_FIX,
        )
    ours.set_weights(values)


def _compare(path: Path, source: Any, model: tf_keras.Model) -> None:
    """Refuse a rebuilt model whose outputs differ on a random batch of 2."""
    import keras

    samples = _samples(source)
    wanted = keras.tree.flatten(source(keras.tree.pack_sequence_as(source._inputs_struct, samples), training=False))
    given = tf.nest.flatten(model(samples, training=False))
    for tensor, theirs, ours in zip(model.outputs, map(np.asarray, wanted), map(np.asarray, given), strict=True):
        limit = _TOLERANCE * max(1.0, float(np.abs(theirs[np.isfinite(theirs)]).max(initial=0.0)))
        if theirs.shape != ours.shape or not np.allclose(ours, theirs, rtol=0.0, atol=limit, equal_nan=True):
            with np.errstate(invalid="ignore"):
                gap = f"up to {np.abs(theirs - ours).max():.2g}" if theirs.shape == ours.shape else "in shape"
            raise CompressError(
                f"model {path}, output {tensor.node.layer.name}",
                expected=f"the outputs of Keras 3 within {limit:.2g}",
                received=f"outputs that differ {gap}",
                fix="Save the model with tf_keras, and report this model: the bridge rebuilds a layer of it wrongly.",
            )


def _samples(model: Any) -> list[Any]:
    """Return random inputs: normal, or valid indices where an input is integer or the model has an Embedding."""
    random = np.random.default_rng(0)
    sizes = [layer.input_dim for layer in model._flatten_layers() if type(layer).__name__ == "Embedding"]
    samples = []
    for tensor in model.inputs:
        open_sizes = [2, *[_UNKNOWN_LENGTH] * (len(tensor.shape) - 1)]
        shape = [given or size for size, given in zip(open_sizes, tensor.shape, strict=True)]
        dtype = tf.as_dtype(tensor.dtype)
        indices = bool(sizes) or not dtype.is_floating
        values = random.integers(0, min(sizes, default=2), shape) if indices else random.standard_normal(shape)
        samples.append(tf.constant(values.astype(dtype.as_numpy_dtype)))
    return samples
