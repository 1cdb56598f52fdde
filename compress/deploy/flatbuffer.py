"""Changes of a ``.tflite`` file's tensors and buffers."""

from __future__ import annotations

import numpy as np
from tensorflow.lite.python import schema_py_generated as schema
from tensorflow.lite.tools import flatbuffer_utils


def parse(content: bytes) -> schema.ModelT:
    """Return the file as an object that can be changed."""
    return flatbuffer_utils.convert_bytearray_to_object(bytearray(content))


def serialize(model: schema.ModelT) -> bytes:
    """Return the bytes of the file, without what no tensor reads any more."""
    used = {tensor.buffer for subgraph in model.subgraphs for tensor in subgraph.tensors}
    used |= {entry.buffer for entry in model.metadata or ()}
    for number, buffer in enumerate(model.buffers):
        if number not in used:
            buffer.data = None
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def add_buffer(model: schema.ModelT, values: np.ndarray) -> int:
    """Add the bytes of an array and return the number of its buffer.

    To write a tensor anew takes a buffer of its own: the converter stores equal ones once.
    """
    model.buffers.append(schema.BufferT(data=np.ascontiguousarray(values).reshape(-1).view(np.uint8)))
    return len(model.buffers) - 1


def expand(model: schema.ModelT, index: int, stored: schema.TensorT, operator: int, options: object) -> None:
    """Let an operator compute a constant tensor from another form of it, in which alone it is stored.

    Args:
        model: the file, changed in place.
        index: of the tensor. Every operator goes on reading it; only where it comes from is another.
        stored: the other form; its shape and name are those of the tensor.
        operator: code of the builtin operator.
        options: of the operator, an object of the schema's ``...OptionsT``.
    """
    graph = model.subgraphs[0]
    tensor = graph.tensors[index]
    stored.shape, stored.name = tensor.shape, tensor.name
    tensor.buffer, tensor.name = 0, tensor.name + b"_expanded"
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    if operator not in codes:
        codes.append(operator)
        # The runtime wants a version; each of these operators is older than any file written here.
        model.operatorCodes.append(schema.OperatorCodeT(operator, builtinCode=operator))
    graph.tensors.append(stored)
    step = schema.OperatorT(opcodeIndex=codes.index(operator), inputs=[len(graph.tensors) - 1], outputs=[index])
    step.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
    step.builtinOptions = options
    graph.operators = [step, *graph.operators]
