"""A SavedModel without Keras layers: its serving function as one layer. Nothing of it runs while it is read."""

from __future__ import annotations

import base64
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2, trackable_object_graph_pb2

from compress.errors import CompressError
from compress.graph.keras3 import tf_name
from compress.graph.saved_graph import Capture, SavedGraph, require_tensor_operations

_MOST_BYTES = 2**31
"""Protocol buffers end there."""
_OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_SIGNATURE = "serving_default"
_EXPORT = "Export it with TensorFlow 2: model.export(folder), or tf.saved_model.save(module, folder, signatures=...)."
_DAMAGED = (DecodeError, tf.errors.OpError, LookupError, ValueError, TypeError, OSError, RuntimeError)


def is_saved_model(path: Path) -> bool:
    """Say whether the folder looks like a SavedModel."""
    return (path / "saved_model.pb").is_file()


def load_saved_model(path: Path, where: str) -> tf_keras.Model:
    """Return the serving function of a SavedModel as a model of one layer, with its variables as weights.

    Only data are read: the graph, the object graph, the checkpoint. TensorFlow's own loader would call functions
    of the file to restore tables and other resources.

    Raises:
        CompressError: if the folder is damaged or too large, has no serving function with one input and one output,
            or its graph does more than to compute tensors.
    """
    try:
        return _Reader(path, where).model()
    except _DAMAGED as error:
        lines = str(error).strip().splitlines() or ["no message"]
        raise CompressError(
            where,
            expected="an undamaged SavedModel",
            received=f"{type(error).__name__}: {lines[0][:200]}",
            fix=f"Copy the folder again, or: {_EXPORT}",
        ) from error


class _Reader:
    def __init__(self, path: Path, where: str) -> None:
        self.path, self.where = path, where
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        if size > _MOST_BYTES:
            raise self._refused(f"at most {_MOST_BYTES / 2**30:.0f} GiB", f"{size / 2**30:.1f} GiB")
        content = (path / "saved_model.pb").read_bytes()
        graphs = [g for g in saved_model_pb2.SavedModel.FromString(content).meta_graphs if _is_for_serving(g)]
        if len(graphs) != 1 or not graphs[0].HasField("object_graph_def"):
            received = "one of TensorFlow 1" if graphs else "no graph with the tag serve"
            raise self._refused("a SavedModel of TensorFlow 2", received)
        self.graph, self.objects = graphs[0].graph_def, graphs[0].object_graph_def
        self.signatures = graphs[0].signature_def

    def model(self) -> tf_keras.Model:
        """Return the model."""
        signature = self.signatures.get(_SIGNATURE)
        if signature is None or len(signature.inputs) != 1 or len(signature.outputs) != 1:
            given = ", ".join(f"{k} ({len(s.inputs)} to {len(s.outputs)})" for k, s in sorted(self.signatures.items()))
            raise self._refused(f"a signature {_SIGNATURE} with one input and one output", given or "no signature")
        (source,), (target,) = signature.inputs.values(), signature.outputs.values()
        shape = _shape(source)
        if shape[:1] not in ([None], [1]):
            raise self._refused("an input of shape [batch, ...], the batch open or 1", f"the shape {shape}")
        call = next(node for node in self.graph.node if node.name == target.name.partition(":")[0])
        if call.op not in ("StatefulPartitionedCall", "PartitionedCall"):
            raise self._refused("a serving function", f"the operation {call.op} in its place")
        name = call.attr["f"].func.name
        captures = [self._capture(node) for node in self.objects.concrete_functions[name].bound_inputs]
        layer = SavedGraph(
            base64.b64encode(self._part(name).SerializeToString(deterministic=True)).decode(),
            function=name,
            output_size=_shape(target),
            captures=[(value.shape, value.dtype.name, kind) for value, kind in captures],
            name="graph",
        )
        image = tf_keras.Input(batch_shape=shape, name="image")
        model = tf_keras.Model(image, layer(image), name=tf_name(self.path.resolve().name))
        for weight, (value, _) in zip(layer.captured, captures, strict=True):
            weight.assign(value)
        return model

    def _part(self, name: str) -> meta_graph_pb2.MetaGraphDef:
        """Return a function with its signature, and all the functions that it calls."""
        part = meta_graph_pb2.MetaGraphDef()
        functions = {function.signature.name: function for function in self.graph.library.function}
        pending, seen = [name], set()
        while pending:
            name = pending.pop()
            if name not in seen:
                seen.add(name)
                part.graph_def.library.function.add().CopyFrom(functions[name])
                pending += [inner for node in functions[name].node_def for inner in _called(node)]
        for name in seen & set(self.objects.concrete_functions):
            part.object_graph_def.concrete_functions[name].CopyFrom(self.objects.concrete_functions[name])
        require_tensor_operations(part.graph_def.library, self.where)
        return part

    def _capture(self, index: int) -> tuple[np.ndarray, Capture]:
        """Return the value of an object that the serving function captures, and what it is."""
        item = self.objects.nodes[index]
        kind = item.WhichOneof("kind")
        if kind == "variable":
            (key,) = [part.checkpoint_key for part in self.stored[index] if part.name == "VARIABLE_VALUE"]
            return np.asarray(self.checkpoint.get_tensor(key)), "parameter" if item.variable.trainable else "state"
        if kind == "constant":
            node = next(node for node in self.graph.node if node.name == item.constant.operation)
            return tf.make_ndarray(node.attr["value"].tensor), "constant"
        raise self._refused("a serving function that reads variables and constants only", f"one that reads a {kind}")

    @cached_property
    def checkpoint(self) -> Any:
        """The reader of the variables' values."""
        return tf.train.load_checkpoint(str(self.path / "variables" / "variables"))

    @cached_property
    def stored(self) -> dict[int, Any]:
        """Index of an object -> what the checkpoint holds of it; its own numbering of the objects is another."""
        theirs = trackable_object_graph_pb2.TrackableObjectGraph.FromString(self.checkpoint.get_tensor(_OBJECT_GRAPH))
        found: dict[int, Any] = {}
        pending = [(0, 0)]
        while pending:
            index, other = pending.pop()
            if index not in found:
                found[index] = theirs.nodes[other].attributes
                named = {child.local_name: child.node_id for child in theirs.nodes[other].children}
                children = [(child.node_id, child.local_name) for child in self.objects.nodes[index].children]
                pending += [(node, named[name]) for node, name in children if name in named]
        return found

    def _refused(self, expected: str, received: str) -> CompressError:
        return CompressError(self.where, expected=expected, received=received, fix=_EXPORT)


def _is_for_serving(graph: meta_graph_pb2.MetaGraphDef) -> bool:
    return "serve" in graph.meta_info_def.tags


def _shape(tensor: meta_graph_pb2.TensorInfo) -> list[int | None]:
    return [None if axis.size < 0 else axis.size for axis in tensor.tensor_shape.dim]


def _called(node: Any) -> list[str]:
    """Return the names of the functions that a node calls."""
    groups = [[value.func, *value.list.func] for value in node.attr.values()]
    return [function.name for group in groups for function in group if function.name]
