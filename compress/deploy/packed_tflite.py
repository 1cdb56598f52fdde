"""A ``.tflite`` file into a packed one and back, byte by byte the same."""

from __future__ import annotations

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from compress.deploy.packed import Packed
from compress.errors import CompressError
from compress.metrics.tflite_file import TFLiteFile, stored_dtype

_LEAST_BYTES = 32
"""Smaller buffers stay where they are."""
_DATA_FIELD = 4
"""Place of a buffer's data in the flatbuffer's table."""


def from_tflite(content: bytes, name: str) -> Packed:
    """Return what a packed file holds of a ``.tflite`` file: its constants, and the rest of it.

    Raises:
        CompressError: if it is damaged.
    """
    TFLiteFile(content, name)
    model = schema.Model.GetRootAs(content, 0)
    tensors = _readers(model)
    arrays: dict[str, np.ndarray] = {}
    places: list[int] = []
    left, end = [], 0
    for start, length, number in sorted(_segments(model)):
        if length < _LEAST_BYTES or start < end:
            continue
        raw = np.frombuffer(content, np.uint8, length, start)
        arrays[str(number)] = _in_shape(raw, tensors.get(number))
        places.append(start)
        left.append(content[end:start])
        end = start + length
    left.append(content[end:])
    return Packed("tflite", arrays, {"places": places}, b"".join(left))


def to_tflite(packed: Packed, name: str) -> bytes:
    """Return the ``.tflite`` file that was packed.

    Raises:
        CompressError: if the parts do not fit together.
    """
    places = packed.structure.get("places")
    if not isinstance(places, list) or len(places) != len(packed.arrays):
        raise _unfit(name, "places of another number than the arrays")
    parts, taken, written = [], 0, 0
    for place, array in zip(places, packed.arrays.values(), strict=True):
        if type(place) is not int or not 0 <= place - written <= len(packed.skeleton) - taken:
            raise _unfit(name, f"an array at byte {place}")
        between = place - written
        parts += [packed.skeleton[taken : taken + between], np.ascontiguousarray(array).tobytes()]
        taken += between
        written += between + array.nbytes
    return b"".join([*parts, packed.skeleton[taken:]])


def _segments(model: schema.Model) -> list[tuple[int, int, int]]:
    """Return start, length and number of each buffer's data."""
    found = []
    for number in range(model.BuffersLength()):
        buffer = model.Buffers(number)
        if buffer.DataLength():
            table = buffer._tab
            found.append((table.Vector(table.Offset(_DATA_FIELD)), buffer.DataLength(), number))
    return found


def _readers(model: schema.Model) -> dict[int, schema.Tensor]:
    """Return, for the number of a buffer, a tensor that it belongs to."""
    graphs = (model.Subgraphs(i) for i in range(model.SubgraphsLength()))
    return {t.Buffer(): t for graph in graphs for t in (graph.Tensors(i) for i in range(graph.TensorsLength()))}


def _in_shape(raw: np.ndarray, tensor: schema.Tensor | None) -> np.ndarray:
    """Return the bytes as the numbers of the tensor, if they are as many as its shape says; its rows are outputs."""
    dtype = None if tensor is None else stored_dtype(tensor.Type())
    if tensor is None or dtype is None or raw.nbytes % dtype.itemsize:
        return raw
    numbers = raw.view(dtype.newbyteorder("<")).astype(dtype)
    shape = tuple(int(v) for v in tensor.ShapeAsNumpy()) if tensor.ShapeLength() else ()
    return numbers.reshape(shape) if numbers.size == np.prod(shape, dtype=np.int64) else numbers


def _unfit(name: str, received: str) -> CompressError:
    return CompressError(
        name, expected="the parts of a .tflite file that fit together", received=received, fix="Pack the file again."
    )
