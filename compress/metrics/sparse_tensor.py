"""Reads a tensor that TFLite stores sparsely: its non-zero values, and where they belong."""

from __future__ import annotations

import math

import numpy as np
from ai_edge_litert import schema_py_generated as schema

_LARGEST = 2**31 - 1
_VECTORS = {
    schema.SparseIndexVector.Int32Vector: schema.Int32Vector,
    schema.SparseIndexVector.Uint16Vector: schema.Uint16Vector,
    schema.SparseIndexVector.Uint8Vector: schema.Uint8Vector,
}


def expand(sparsity: schema.SparsityParameters, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the tensor [shape] with its zeros.

    The format is a tree whose levels are the dimensions, blocks last (TACO: Kjolstad et al., "The Tensor Algebra
    Compiler", 2017; ``SparsityParameters`` in TFLite's schema). A dense level has a child for each index, a sparse
    one for the listed indices only; the leaves are ``values``.

    Args:
        sparsity: the levels.
        values: the stored values [n], blocks written out.
        shape: of the tensor.

    Raises:
        ValueError: if the levels do not describe ``values`` in a tensor of this shape. No more than such a
            tensor is ever allocated.
    """
    size = math.prod(shape)
    if min(shape, default=0) < 1 or size * values.itemsize > _LARGEST:
        raise ValueError(f"a sparse tensor of shape {shape}")
    places = np.zeros(1, np.int64)
    for level, (length, stride) in enumerate(_levels(sparsity, shape)):
        metadata = sparsity.DimMetadata(level)
        if metadata.Format() == schema.DimensionType.DENSE:
            if metadata.DenseSize() != length:
                raise ValueError(f"level {level} of length {metadata.DenseSize()}, expected {length}")
            _require_room(len(places) * length, size, level)
            places = (places[:, None] + np.arange(length) * stride).ravel()
        else:
            segments = _vector(metadata.ArraySegmentsType(), metadata.ArraySegments())
            indices = _vector(metadata.ArrayIndicesType(), metadata.ArrayIndices())
            counts = np.diff(segments)
            if len(counts) != len(places) or segments[0] != 0 or (counts < 0).any() or segments[-1] != len(indices):
                raise ValueError(f"level {level} whose segments do not fit")
            if ((indices < 0) | (indices >= length)).any():
                raise ValueError(f"level {level} with an index outside 0 to {length - 1}")
            _require_room(len(indices), size, level)
            places = np.repeat(places, counts) + indices * stride
    if len(places) != len(values):
        raise ValueError(f"{len(values)} values for {len(places)} places")
    flat = np.zeros(size, values.dtype)
    flat[places] = values
    return flat.reshape(shape)


def _levels(sparsity: schema.SparsityParameters, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return how many indices each level has and how far apart in the flat tensor they lie, in traversal order."""
    order = sparsity.TraversalOrderAsNumpy().tolist()
    blocked = sparsity.BlockMapAsNumpy().tolist() if sparsity.BlockMapLength() else []
    rank = len(shape)
    if sorted(order) != list(range(rank + len(blocked))) or sparsity.DimMetadataLength() != len(order):
        raise ValueError(f"{sparsity.DimMetadataLength()} levels in the order {order} for shape {shape}")
    if len(set(blocked)) != len(blocked) or not set(blocked) <= set(range(rank)):
        raise ValueError(f"blocks of the dimensions {blocked} in shape {shape}")
    block = {d: sparsity.DimMetadata(order.index(rank + i)).DenseSize() for i, d in enumerate(blocked)}
    if any(length < 1 or shape[dimension] % length for dimension, length in block.items()):
        raise ValueError(f"blocks of {block} in shape {shape}")
    stride = [math.prod(shape[d + 1 :]) for d in range(rank)]
    levels = [(shape[d] // block.get(d, 1), stride[d] * block.get(d, 1)) for d in range(rank)]
    levels += [(length, stride[d]) for d, length in block.items()]
    return [levels[level] for level in order]


def _vector(kind: int, table: object) -> np.ndarray:
    if kind not in _VECTORS:
        raise ValueError(f"a level with indices of kind {kind}")
    found = _VECTORS[kind]()
    found.Init(table.Bytes, table.Pos)  # type: ignore[attr-defined]
    return np.asarray(found.ValuesAsNumpy() if found.ValuesLength() else np.zeros(0), np.int64)


def _require_room(places: int, size: int, level: int) -> None:
    if places > size:
        raise ValueError(f"level {level} with {places} places in a tensor of {size}")
