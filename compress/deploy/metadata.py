"""Metadata inside a ``.tflite`` file: what goes in, what comes out, how a photo is normalised, the classes' names.

The convention is that of TensorFlow Lite: the buffer ``TFLITE_METADATA`` holds a flatbuffer of its own (file identifier
``M001``, tables as in ``tensorflow_lite_support/metadata/metadata_schema.fbs``), and associated files, here the labels,
are a zip archive at the end of the file. Android Studio, ML Kit, MediaPipe and the TensorFlow Lite Support library read
it; a runtime that does not know of it skips both.
"""

from __future__ import annotations

import io
import struct
import zipfile
from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from flatbuffers.number_types import Float32Flags, Int8Flags
from flatbuffers.table import Table

from compress.deploy.interface import Interface, Scores

BUFFER = "TFLITE_METADATA"
LABELS_FILE = "labels.txt"
_IDENTIFIER = b"M001"
_PARSER = "1.0.0"
"""The oldest version of the schema with all tables that are used here."""
_DATE = (1980, 1, 1, 0, 0, 0)
_MOST_LABEL_BYTES = 64 << 20
_AXIS_LABELS = 2
"""``AssociatedFileType.TENSOR_AXIS_LABELS``: a line for each index of an output."""
_FEATURES, _IMAGE = 1, 2
"""Places of ``FeatureProperties`` and ``ImageProperties`` in the union ``ContentProperties``."""
_NORMALIZATION = 1
"""Place of ``NormalizationOptions`` in the union ``ProcessUnitOptions``."""
_COLORS = {3: 1, 1: 2}
"""Channels -> ``ColorSpaceType``: RGB, GRAYSCALE."""
_SCORES: dict[Scores, str] = {
    "probabilities": "probabilities of the classes",
    "logits": "logits of the classes: softmax makes them probabilities",
}


@dataclass(frozen=True)
class Metadata:
    """What a file's metadata say of a classifier.

    ``mean`` and ``std``: a pixel p of 0 to 255 goes in as (p - mean) / std; one number, or one for each channel.
    ``labels``: names of the classes; empty if there are none.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    labels: tuple[str, ...]


def add_metadata(content: bytes, interface: Interface, *, author: str = "", licence: str = "") -> bytes:
    """Return the ``.tflite`` file with metadata in place of any that it has; what it computes stays the same."""
    # Needs TensorFlow, which reading metadata does without.
    from compress.deploy.flatbuffer import add_buffer, parse, serialize

    model = parse(content)
    entry = schema.MetadataT()
    entry.name = BUFFER.encode()
    entry.buffer = add_buffer(model, np.frombuffer(_flatbuffer(interface, author, licence), np.uint8))
    model.metadata = [*(other for other in model.metadata or () if other.name != entry.name), entry]
    whole = io.BytesIO(serialize(model))
    if interface.labels:
        with zipfile.ZipFile(whole, "a") as archive:
            archive.writestr(zipfile.ZipInfo(LABELS_FILE, _DATE), "\n".join(interface.labels) + "\n")
    return whole.getvalue()


def read_metadata(content: bytes) -> Metadata | None:
    """Return what the metadata of a ``.tflite`` file say of its first input and output; None if it has none.

    Metadata that are damaged, or that describe no classifier of images, count as none.
    """
    try:
        described = _buffer(content)
        return None if described is None else _read(described, content)
    except (
        *(struct.error, ValueError, IndexError, KeyError, TypeError, AttributeError),
        *(zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError),
    ):
        # What flatbuffers and zipfile raise on bytes that lie.
        return None


@dataclass(frozen=True)
class _Number:
    """A number in a table: of one byte, or unsigned of four."""

    value: int
    wide: bool = False


def _flatbuffer(interface: Interface, author: str, licence: str) -> bytes:
    low, high = interface.pixels
    source: list[Any] = ["image", "An image.", None, None, None, ([high], [low])]
    if interface.channels is None:
        source[:2] = ["features", "The numbers to classify."]
        source[3] = (_Number(_FEATURES), ())
    else:
        rows, columns = interface.input.shape[1:3]
        size = (_Number(columns, wide=True), _Number(rows, wide=True))
        source[3] = (_Number(_IMAGE), (_Number(_COLORS[interface.channels]), size))
        source[4] = [(_Number(_NORMALIZATION), ([interface.mean], [interface.std]))]
    files = None
    if interface.labels:
        files = [(LABELS_FILE, "Names of the classes, one a line.", _Number(_AXIS_LABELS))]
    target = ("scores", _SCORES[interface.scores], None, (_Number(_FEATURES), ()), None, None, files)
    graph = (None, None, [tuple(source)], [target])
    what = f"A classifier of {interface.output.shape[-1]} classes, made smaller by compress."
    root = (interface.name, what, None, [graph], author or None, licence or None, None, _PARSER)
    builder = flatbuffers.Builder(1024)
    builder.Finish(_write(builder, root), file_identifier=_IDENTIFIER)
    return bytes(builder.Output())


def _write(builder: flatbuffers.Builder, value: Any) -> int:
    """Write a string, a list as a vector, or a tuple as a table with a value or None for each slot; return its offset.

    What a vector or table refers to is written before it.
    """
    if isinstance(value, str):
        return int(builder.CreateString(value))
    if isinstance(value, tuple):
        fields = [
            (slot, item if isinstance(item, _Number) else _write(builder, item))
            for slot, item in enumerate(value)
            if item is not None
        ]
        builder.StartObject(len(value))
        for slot, item in fields:
            if not isinstance(item, _Number):
                builder.PrependUOffsetTRelativeSlot(slot, item, 0)
            elif item.wide:
                builder.PrependUint32Slot(slot, item.value, 0)
            else:
                builder.PrependInt8Slot(slot, item.value, 0)
        return int(builder.EndObject())
    if all(isinstance(item, float) for item in value):
        return int(builder.CreateNumpyVector(np.asarray(value, np.float32)))
    offsets = [_write(builder, item) for item in value]
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())


class _View:
    """A table of a flatbuffer, its fields by slot."""

    def __init__(self, content: bytes, place: int) -> None:
        self._table = Table(content, place)

    @classmethod
    def root(cls, content: bytes) -> _View:
        return cls(content, struct.unpack_from("<I", content)[0])

    def _place(self, slot: int) -> int:
        offset = self._table.Offset(4 + 2 * slot)
        return int(self._table.Pos + offset) if offset else 0

    def text(self, slot: int) -> str:
        place = self._place(slot)
        return self._table.String(place).decode() if place else ""

    def byte(self, slot: int) -> int:
        place = self._place(slot)
        return int(self._table.Get(Int8Flags, place)) if place else 0

    def table(self, slot: int) -> _View | None:
        place = self._place(slot)
        return _View(self._table.Bytes, self._table.Indirect(place)) if place else None

    def tables(self, slot: int) -> list[_View]:
        start, length = self._vector(slot)
        return [_View(self._table.Bytes, self._table.Indirect(start + 4 * index)) for index in range(length)]

    def floats(self, slot: int) -> tuple[float, ...]:
        start, length = self._vector(slot)
        return tuple(float(self._table.Get(Float32Flags, start + 4 * index)) for index in range(length))

    def _vector(self, slot: int) -> tuple[int, int]:
        offset = self._table.Offset(4 + 2 * slot)
        if not offset:
            return 0, 0
        length = self._table.VectorLen(offset)
        if length > len(self._table.Bytes):
            raise ValueError("a vector longer than the file")
        return self._table.Vector(offset), length


def _buffer(content: bytes) -> bytes | None:
    model = schema.Model.GetRootAs(content, 0)
    for index in range(model.MetadataLength()):
        entry = model.Metadata(index)
        if entry.Name() == BUFFER.encode():
            return bytes(model.Buffers(entry.Buffer()).DataAsNumpy().tobytes())
    return None


def _read(described: bytes, content: bytes) -> Metadata | None:
    if described[4:8] != _IDENTIFIER:
        return None
    root = _View.root(described)
    (graph,) = root.tables(3)[:1]
    (source,), (target,) = graph.tables(2)[:1], graph.tables(3)[:1]
    units = [unit.table(1) for unit in source.tables(4) if unit.byte(0) == _NORMALIZATION]
    mean, std = ((0.0,), (1.0,)) if not units or units[0] is None else (units[0].floats(0), units[0].floats(1))
    if not (mean and std and np.isfinite([*mean, *std]).all() and all(std)):
        return None
    names = [file.text(0) for file in target.tables(6) if file.byte(2) == _AXIS_LABELS]
    return Metadata(root.text(0), mean, std, _labels(content, names[0]) if names else ())


def _labels(content: bytes, name: str) -> tuple[str, ...]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if archive.getinfo(name).file_size > _MOST_LABEL_BYTES:
            raise ValueError("labels of many megabytes")
        return tuple(archive.read(name).decode().splitlines())
