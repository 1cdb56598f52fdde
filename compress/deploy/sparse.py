"""Stores the kernels of a ``.tflite`` file sparsely where that is smaller and the runtime can expand them."""

from __future__ import annotations

import numpy as np
from tensorflow.lite.python import schema_py_generated as schema

from compress.deploy.flatbuffer import add_buffer, expand, parse, serialize

_MINIMUM_ZEROS = 0.3
"""Share of zeros from which a kernel is stored sparsely; that of TFLite's converter."""
_OVERHEAD = 256
"""Bytes of the operator and the tensor that one more sparse kernel needs, about."""

_OPERATORS = {
    schema.BuiltinOperator.CONV_2D,
    schema.BuiltinOperator.DEPTHWISE_CONV_2D,
    schema.BuiltinOperator.FULLY_CONNECTED,
    schema.BuiltinOperator.TRANSPOSE_CONV,
}
_DTYPES: dict[int, np.dtype] = {
    schema.TensorType.FLOAT32: np.dtype(np.float32),
    schema.TensorType.FLOAT16: np.dtype(np.float16),
    schema.TensorType.INT8: np.dtype(np.int8),
}


def store_sparsely(content: bytes) -> bytes | None:
    """Return the ``.tflite`` file with its kernels of many zeros stored as values and indices.

    The form is what the converter writes under ``EXPERIMENTAL_SPARSITY`` for zeros at random: the last dimension
    compressed, a DENSIFY operator behind it. Not its blocks, whose products LiteRT gets wrong under float16 and
    dynamic; and not where LiteRT refuses expanded weights, which the converter writes all the same.

    Returns:
        The file, or None if no kernel gets smaller.
    """
    model = parse(content)
    graph = model.subgraphs[0]
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    for index in _kernels(graph, codes):
        tensor = graph.tensors[index]
        data = model.buffers[tensor.buffer].data
        encoded = None if data is None else _encode(data.view(_DTYPES[tensor.type]).reshape(tensor.shape))
        if encoded is None:
            continue
        values, sparsity = encoded
        stored = schema.TensorT(
            type=tensor.type,
            buffer=add_buffer(model, values),
            quantization=tensor.quantization,
            sparsity=sparsity,
        )
        expand(model, index, stored, schema.BuiltinOperator.DENSIFY, schema.DensifyOptionsT())
    smaller = serialize(model)
    return smaller if len(smaller) < len(content) else None


def _kernels(graph: schema.SubGraphT, codes: list[int]) -> list[int]:
    """Return the indices of the kernels that LiteRT's operators accept from a DENSIFY."""
    converted = {
        int(op.outputs[0]): int(op.inputs[0])
        for op in graph.operators
        if codes[op.opcodeIndex] == schema.BuiltinOperator.DEQUANTIZE
    }
    found: dict[int, bool] = {}
    for operator in graph.operators:
        code = codes[operator.opcodeIndex]
        if code not in _OPERATORS:
            continue
        index = converted.get(int(operator.inputs[1]), int(operator.inputs[1]))
        kind = graph.tensors[index].type
        accepted = kind in _DTYPES
        if kind == schema.TensorType.INT8:
            # XNNPACK takes such operators over and then fails: LiteRT gives no way to run them.
            image = operator.inputs[2 if code == schema.BuiltinOperator.TRANSPOSE_CONV else 0]
            accepted = (
                graph.tensors[int(image)].type == schema.TensorType.INT8
                and code != schema.BuiltinOperator.FULLY_CONNECTED
            )
        found[index] = found.get(index, True) and accepted
    return [index for index, accepted in found.items() if accepted]


def _encode(dense: np.ndarray) -> tuple[np.ndarray, schema.SparsityParametersT] | None:
    """Return the values that are not zero and where they belong; None if that is not smaller."""
    rows = dense.reshape(-1, dense.shape[-1])
    row, column = np.nonzero(rows)
    if not 0 < row.size <= (1 - _MINIMUM_ZEROS) * rows.size:
        return None
    values = rows[row, column]
    segments = _narrow(np.searchsorted(row, np.arange(len(rows) + 1)))
    indices = _narrow(column)
    if values.nbytes + segments.nbytes + indices.nbytes + _OVERHEAD > dense.nbytes:
        return None
    levels = [schema.DimensionMetadataT(denseSize=size) for size in dense.shape[:-1]]
    last = schema.DimensionMetadataT(format=schema.DimensionType.SPARSE_CSR)
    last.arraySegmentsType, last.arraySegments = _vector(segments)
    last.arrayIndicesType, last.arrayIndices = _vector(indices)
    order = np.arange(dense.ndim, dtype=np.int32)
    return values, schema.SparsityParametersT(traversalOrder=order, dimMetadata=[*levels, last])


def _narrow(indices: np.ndarray) -> np.ndarray:
    largest = int(indices.max(initial=0))
    return indices.astype(np.uint8 if largest < 2**8 else np.uint16 if largest < 2**16 else np.int32)


def _vector(indices: np.ndarray) -> tuple[int, object]:
    kind, vector = {
        1: (schema.SparseIndexVector.Uint8Vector, schema.Uint8VectorT),
        2: (schema.SparseIndexVector.Uint16Vector, schema.Uint16VectorT),
        4: (schema.SparseIndexVector.Int32Vector, schema.Int32VectorT),
    }[indices.itemsize]
    return kind, vector(values=indices)
