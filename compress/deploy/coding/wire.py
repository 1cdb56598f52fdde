"""Bytes of the packed file: variable-length integers, and a reader that never leaves what it was given."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

_MOST_VARINT_BYTES = 9
_PART = 1 << 20
"""Numbers whose bits are laid out at a time."""
_WHOLE: Mapping[int, np.dtype] = MappingProxyType({8: np.dtype(np.uint8), 16: np.dtype(">u2"), 32: np.dtype(">u4")})
"""Widths of whole bytes, which need no shifting."""


class DamagedError(Exception):
    """Bytes that nothing of ours wrote, or that are not as they were written."""


def varint(value: int) -> bytes:
    """Return a number from 0 to 2**63 - 1 in 7-bit groups, the lowest first; the top bit says that more follow."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


class Reader:
    """Reads bytes from front to back.

    Its methods raise :class:`DamagedError` if there are too few.
    """

    def __init__(self, content: bytes) -> None:
        self._content = memoryview(content)
        self._place = 0

    @property
    def left(self) -> int:
        """Number of bytes not yet read."""
        return len(self._content) - self._place

    def take(self, count: int) -> bytes:
        """Return the next ``count`` bytes."""
        if count > self.left:
            raise DamagedError(f"{count:,} bytes needed, {self.left:,} left")
        taken = bytes(self._content[self._place : self._place + count])
        self._place += count
        return taken

    def byte(self) -> int:
        """Return the next byte."""
        return self.take(1)[0]

    def varint(self, most: int = 2**63 - 1) -> int:
        """Return the next variable-length integer, which must not be above ``most``."""
        value = 0
        for group in range(_MOST_VARINT_BYTES):
            byte = self.byte()
            value |= (byte & 127) << 7 * group
            if byte < 128:
                if value > most:
                    raise DamagedError(f"the number {value:,} where at most {most:,} can stand")
                return value
        raise DamagedError("a number of more than 63 bits")

    def array(self, dtype: np.dtype, count: int) -> np.ndarray:
        """Return the next ``count`` numbers, stored in little-endian order."""
        stored = np.frombuffer(self.take(count * dtype.itemsize), dtype.newbyteorder("<"))
        return stored.astype(dtype)

    def finish(self) -> None:
        """Refuse bytes that are left over."""
        if self.left:
            raise DamagedError(f"{self.left:,} bytes too many")


def little_endian(values: np.ndarray) -> bytes:
    """Return the numbers' bytes in little-endian order."""
    return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def pack_bits(values: np.ndarray, width: int) -> bytes:
    """Return unsigned integers [n] as ``width`` bits each, the highest first, without gaps; the last byte is filled up.

    ``width``: 0 to 32.
    """
    if not width:
        return b""
    if width in _WHOLE:
        return values.astype(_WHOLE[width]).tobytes()
    shifts = np.arange(width - 1, -1, -1, dtype=np.uint32)
    # A multiple of eight numbers fills whole bytes, so the parts can be joined.
    parts = np.split(values.astype(np.uint32, copy=False), range(_PART, len(values), _PART))
    return b"".join(np.packbits((part[:, None] >> shifts & 1).astype(np.uint8)).tobytes() for part in parts)


def unpack_bits(content: bytes, width: int, count: int) -> np.ndarray:
    """Return ``count`` integers uint32 [n] written by :func:`pack_bits`."""
    if width in _WHOLE:
        return np.frombuffer(content, _WHOLE[width], count).astype(np.uint32)
    values = np.zeros(count, np.uint32)
    stored = np.frombuffer(content, np.uint8)
    for start in range(0, count if width else 0, _PART):
        size = min(_PART, count - start)
        first = start * width // 8
        bits = np.unpackbits(stored[first : first + -(-size * width // 8)], count=size * width).reshape(size, width)
        part: np.ndarray = np.zeros(size, np.uint32)
        for column in range(width):
            part = part << 1 | bits[:, column]
        values[start : start + size] = part
    return values
