"""The packed file (``.cmp``): a whole network in few bytes, from which the very same network comes back.

``docs/packed_file.md`` describes it byte by byte.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from compress.deploy.coding.draft import Tables
from compress.deploy.coding.symbols import CODERS, SymbolCoder
from compress.deploy.coding.tensors import FORMS, Form, draft_array, read_array
from compress.deploy.coding.wire import DamagedError, Reader
from compress.errors import CompressError

Kind = Literal["keras", "tflite"]

MAGIC = b"\x93CMP"
VERSION = 2
DEFAULT_LIMIT = 4 << 30
"""Bytes of memory that unpacking a file may take, unless more are allowed."""

_HEADER = struct.Struct("<4sHHQQQII")
"""Magic, version, kind, bytes of the file, of the directory unpacked, of all unpacked, of the directory; checksum."""
_CHECKSUM = struct.Struct("<I")
_KINDS: tuple[Kind, ...] = ("keras", "tflite")
_DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64"),
)
_MOST_DIMENSIONS = 32
_MOST_NAME = 10_000
"""Bytes of an array's name."""
_PER_NUMBER, _PER_CHARACTER = 24, 32
"""Bytes of memory that a number and a character of the directory's text take, at most, while they are unpacked."""


@dataclass(frozen=True)
class Packed:
    """What a packed file holds: the numbers by name, and what else it takes to put the network together."""

    kind: Kind
    arrays: Mapping[str, np.ndarray]
    structure: Mapping[str, Any] = field(default_factory=dict)
    """In JSON's types."""
    skeleton: bytes = b""
    """What is left of a ``.tflite`` file without the arrays."""


def can_hold(array: np.ndarray) -> bool:
    """Say whether a packed file can hold an array of this type."""
    return array.dtype.name in _DTYPES


def write_packed(packed: Packed, coders: tuple[SymbolCoder, ...] = CODERS, forms: tuple[Form, ...] = FORMS) -> bytes:
    """Return the bytes of the file.

    Args:
        packed: the content.
        coders: what streams of symbols may be written with.
        forms: what arrays may be written in.

    Raises:
        ValueError: if an array's type is none that :func:`can_hold` allows.
    """
    tables, bodies, rows = Tables(), [], []
    for name, array in packed.arrays.items():
        if not can_hold(array):
            raise ValueError(f"{name}: a packed file holds no {array.dtype}")
        draft = draft_array(array, tables, coders, forms)
        tables = draft.tables
        body = draft.write()
        bodies += [body, _checksum(body)]
        rows.append([name, array.dtype.name, list(array.shape), len(body)])
    text = json.dumps({"arrays": rows, "structure": packed.structure}, separators=(",", ":")).encode()
    directory = struct.pack("<Q", len(text)) + text + packed.skeleton
    stored = zlib.compress(directory, 9)
    total = len(directory) + sum(array.nbytes for array in packed.arrays.values())
    length = _HEADER.size + len(stored) + _CHECKSUM.size + sum(map(len, bodies))
    fields = (MAGIC, VERSION, _KINDS.index(packed.kind), length, len(directory), total, len(stored))
    header = _HEADER.pack(*fields, 0)[: -_CHECKSUM.size]
    return b"".join([header, _checksum(header), stored, _checksum(stored), *bodies])


def read_packed(content: bytes, name: str, limit: int = DEFAULT_LIMIT) -> Packed:
    """Return the content of a packed file.

    Args:
        content: its bytes.
        name: of the file, for errors.
        limit: bytes of memory that it may take.

    Raises:
        CompressError: if it is none, was written by a later version, is damaged (naming the part), or would take more
            than the limit.
    """
    if content[: len(MAGIC)] != MAGIC:
        start = f"{len(content):,} bytes that begin with {content[:8]!r}" if content else "an empty file"
        raise CompressError(
            name, expected="a packed file of compress (.cmp)", received=start, fix="Check the path of the file."
        )
    kind, sizes, stored = _read_header(content, name)
    unpacked_directory, total = sizes
    _require(max(total, unpacked_directory), limit, name)
    reader = Reader(content[_HEADER.size :])
    try:
        inner, text = _open_directory(reader, stored, unpacked_directory)
        _require(total + _PER_CHARACTER * len(text), limit, name)
        directory = _read_directory(inner, text)
    except (DamagedError, zlib.error, ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(name, "the directory", error) from error
    rows, structure, skeleton = directory
    if sum(row.bytes for row in rows) + unpacked_directory != total:
        raise _damaged(name, "the directory", DamagedError("sizes that do not add up"))
    # Some forms hold a place and a bucket for each number of an array, whatever its type.
    _require(total + _PER_NUMBER * max((math.prod(row.shape) for row in rows), default=0), limit, name)
    arrays: dict[str, np.ndarray] = {}
    tables = Tables()
    for row in rows:
        try:
            body = reader.take(row.length)
            _check(body, reader.take(_CHECKSUM.size))
            inner = Reader(body)
            arrays[row.name], tables = read_array(inner, row.dtype, row.shape, tables)
            inner.finish()
        except DamagedError as error:
            raise _damaged(name, f"array {row.name}", error) from error
    if reader.left or len(arrays) < len(rows):
        raise _damaged(name, "the end", DamagedError(f"{reader.left} bytes too many"))
    return Packed(kind, arrays, structure, skeleton)


@dataclass(frozen=True)
class _Row:
    """An array of the directory."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    length: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _read_header(content: bytes, name: str) -> tuple[Kind, tuple[int, int], int]:
    """Return the kind, the bytes of the directory and of all unpacked, and those of the directory in the file."""
    # Only what stands before the version is the same in all versions.
    version = int.from_bytes(content[4:6], "little") if len(content) >= 6 else VERSION
    if version > VERSION:
        raise CompressError(
            name,
            expected=f"a packed file of version {VERSION} or older",
            received=f"version {version} (or a damaged file)",
            fix="Install a newer compress.",
        )
    if len(content) < _HEADER.size:
        raise _damaged(name, "the header", DamagedError(f"it has {len(content)} of {_HEADER.size} bytes"))
    _, _, kind, length, directory, total, stored, _ = _HEADER.unpack_from(content)
    try:
        split = _HEADER.size - _CHECKSUM.size
        _check(content[:split], content[split : _HEADER.size])
        if kind >= len(_KINDS) or version < 1:
            raise DamagedError(f"kind {kind}, version {version}")
        if length != len(content):
            raise DamagedError(f"a file of {len(content):,} bytes that says it has {length:,}")
    except DamagedError as error:
        raise _damaged(name, "the header", error) from error
    return _KINDS[kind], (directory, total), stored


def _require(needed: int, limit: int, name: str) -> None:
    """Refuse a file that takes more memory than it may."""
    if needed > limit:
        raise CompressError(
            name,
            expected=f"a file that takes at most {limit:,} bytes of memory to unpack",
            received=f"one that may take {needed:,} bytes",
            fix="If you trust whoever made it, allow more with --limit.",
        )


def _open_directory(reader: Reader, stored: int, size: int) -> tuple[Reader, bytes]:
    """Return the directory behind its text, and the text."""
    packed = reader.take(stored)
    _check(packed, reader.take(_CHECKSUM.size))
    opener = zlib.decompressobj()
    # One byte more, so that a directory that is larger than it says is found out.
    unpacked = opener.decompress(packed, size + 1)
    if len(unpacked) != size or not opener.eof or opener.unused_data:
        raise DamagedError("another size than it says")
    inner = Reader(unpacked)
    (length,) = struct.unpack("<Q", inner.take(8))
    return inner, inner.take(length)


def _read_directory(inner: Reader, text: bytes) -> tuple[list[_Row], dict[str, Any], bytes]:
    said = json.loads(text)
    rows = [_row(*row) for row in said["arrays"]]
    structure = said["structure"]
    if not isinstance(structure, dict) or len({row.name for row in rows}) < len(rows):
        raise DamagedError("a structure that is none")
    return rows, structure, inner.take(inner.left)


def _row(name: str, dtype: str, shape: list[int], length: int) -> _Row:
    sizes = [*shape, length]
    known = isinstance(name, str) and dtype in _DTYPES and len(shape) <= _MOST_DIMENSIONS
    known = known and "\0" not in name and 0 < len(name.encode()) <= _MOST_NAME
    known = known and all(type(size) is int and 0 <= size < 1 << 62 for size in sizes)
    # NumPy counts what an array would have if it were not empty.
    if not known or math.prod(size or 1 for size in shape) * np.dtype(dtype).itemsize >= 1 << 62:
        raise DamagedError(f"an array {name!r} of {dtype!r} {shape!r}"[:200])
    return _Row(name, np.dtype(dtype), tuple(shape), length)


def _checksum(content: bytes) -> bytes:
    return _CHECKSUM.pack(zlib.crc32(content))


def _check(content: bytes, checksum: bytes) -> None:
    if _checksum(content) != checksum:
        raise DamagedError("its checksum does not match")


def _damaged(name: str, part: str, error: Exception) -> CompressError:
    return CompressError(
        f"{name}, {part}",
        expected="a packed file as it was written",
        received=f"a damaged one ({str(error)[:200]})",
        fix="Copy it again from where it comes from, or pack the model again.",
    )
