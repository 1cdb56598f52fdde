"""Arrays into bytes and back, bit by bit the same: each in the form that takes the fewest bytes.

An array is written as the unsigned integers that its bits spell, so that every value survives: NaNs, negative zeros,
numbers too small to be normal.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from compress.candidate import Hash, Transfer
from compress.deploy.coding.draft import Draft, Tables, smallest
from compress.deploy.coding.hashing import KEYS, book_of, buckets_and_signs, find_hash, negated
from compress.deploy.coding.looked import grid_steps, looked_up, present
from compress.deploy.coding.positions import draft_positions, read_positions
from compress.deploy.coding.symbols import CODERS, MOST_ANS_SYMBOLS, SymbolCoder, draft_symbols, read_symbols
from compress.deploy.coding.transfers import TRANSFORMS, can_be, labels_of, metas_of, transformations
from compress.deploy.coding.vectors import MOST_LENGTH, Cut, repeated
from compress.deploy.coding.wire import DamagedError, Reader, little_endian, varint

_SIGNED, _LOWEST = 128, 64
"""Set in a grid's number of bits if it has a symbol for the negative zero: one more, or the lowest level's."""
_NEGATIVE_ZERO = np.uint32(1 << 31)
_DOWN = 128
"""Added to the length of vectors that stand in columns."""
_FIRST = 128
"""Added to the number of a transformation if the filters' axis comes first."""
_MOST_SPARSE = 0.5
"""Share of values other than zero up to which zeros are left out."""


@dataclass(frozen=True)
class Shape:
    """The form of an array whose values are written: ``rows`` x ``columns``, and whether its numbers are float32."""

    rows: int
    columns: int
    float32: bool = False

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: np.dtype) -> Shape:
        """Return that of an array: its last axis makes the columns."""
        size = math.prod(shape)
        columns = shape[-1] if shape and size else 1
        return cls(size // columns, columns, dtype == np.float32)


class Form(ABC):
    """A way to write the values of an array."""

    code: ClassVar[int]
    """Its number in the file."""

    @abstractmethod
    def draft(self, values: np.ndarray, shape: Shape, tables: Tables, coders: tuple[SymbolCoder, ...]) -> Draft | None:
        """Return the draft of values uint [n], n > 0; None if it cannot write them, or knows that it would not pay."""

    @abstractmethod
    def decode(self, reader: Reader, dtype: np.dtype, shape: Shape, tables: Tables) -> tuple[np.ndarray, Tables]:
        """Return the values uint [n], n the number that the shape has, and the tables known afterwards."""


class Raw(Form):
    """The numbers as they are."""

    code = 0

    def draft(self, values: np.ndarray, shape: Shape, tables: Tables, coders: tuple[SymbolCoder, ...]) -> Draft:
        """Draft their bytes."""
        return Draft(values.nbytes, tables, lambda: little_endian(values))

    def decode(self, reader: Reader, dtype: np.dtype, shape: Shape, tables: Tables) -> tuple[np.ndarray, Tables]:
        """Read the bytes."""
        return reader.array(dtype, shape.rows * shape.columns), tables


class Planes(Form):
    """A stream for the first byte of all numbers, one for the second, and so on: exponents repeat, fractions do not."""

    code = 1

    def draft(self, values: np.ndarray, shape: Shape, tables: Tables, coders: tuple[SymbolCoder, ...]) -> Draft:
        """Draft a stream for each byte, the lowest first."""
        planes = np.frombuffer(little_endian(values), np.uint8).reshape(len(values), -1)
        streams: list[Draft] = []
        for place in range(planes.shape[1]):
            streams.append(draft_symbols(np.ascontiguousarray(planes[:, place]), 256, tables, coders))
            tables = streams[-1].tables
        return streams[-1].after(*streams[:-1])

    def decode(self, reader: Reader, dtype: np.dtype, shape: Shape, tables: Tables) -> tuple[np.ndarray, Tables]:
        """Read a stream for each byte."""
        count = shape.rows * shape.columns
        planes = np.empty((count, dtype.itemsize), np.uint8)
        for place in range(dtype.itemsize):
            planes[:, place], tables = read_symbols(reader, 256, count, tables)
        return planes.reshape(-1).view(dtype.newbyteorder("<")).astype(dtype), tables


class Codebook(Form):
    """The distinct values, and which of them each number is."""

    code = 2

    def draft(self, values: np.ndarray, shape: Shape, tables: Tables, coders: tuple[SymbolCoder, ...]) -> Draft | None:
        """Draft both; None if there are too many distinct values for this to pay."""
        found = looked_up(values, min(MOST_ANS_SYMBOLS, len(values) // 2 + 1))
        if found is None:
            return None
        book, indices = found
        return draft_symbols(indices, len(book), tables, coders).after(varint(len(book)), little_endian(book))

    def decode(self, reader: Reader, dtype: np.dtype, shape: Shape, tables: Tables) -> tuple[np.ndarray, Tables]:
        """Look the numbers up."""
        book = reader.array(dtype, reader.varint(MOST_ANS_SYMBOLS))
        indices, tables = read_symbols(reader, len(book), shape.rows * shape.columns, tables)
        if not len(book):
            raise DamagedError("an empty codebook")
        return book[indices], tables


class GridLevels(Form):
    """A step for each column, and the whole number of steps that each float32 value is: 1 to 8 bits.

    The negative zero, if there is any, takes the symbol of the lowest level, or one more where that is in use.
    """

    code = 3

    def draft(self, values: np.ndarray, shape: Shape, tables: Tables, coders: tuple[SymbolCoder, ...]) -> Draft | None:
        """Draft steps and levels; None if the values do not lie on such grids to the last bit."""
        if not shape.float32:
            return None
        found = grid_steps(values.view(np.float32).reshape(shape.rows, shape.columns))
        if found is None:
            return None
        steps, levels = found
        bits = int(max(levels.max(), -levels.min() - 1, 0)).bit_length() + 1
        symbols = levels + 2 ** (bits - 1)
        negative_zeros = (values == _NEGATIVE_ZERO).reshape(symbols.shape)
        mark = int(negative_zeros.any()) and (_LOWEST if symbols.min() > 0 else _SIGNED)
        symbols[negative_zeros] = 0 if mark == _LOWEST else 2**bits
        stream = draft_symbols(symbols.reshape(-1), 2**bits + (mark == _SIGNED), tables, coders)
        return stream.after(bytes([bits | mark]), little_endian(steps))

    def decode(self, reader: Reader, dtype: np.dtype, shape: Shape, tables: Tables) -> tuple[np.ndarray, Tables]:
        """Multiply."""
        head = reader.byte()
        bits, signed, lowest = head & ~(_SIGNED | _LOWEST), bool(head & _SIGNED), bool(head & _LOWEST)
        if not 1 <= bits <= 8 or (signed and lowest) or not shape.float32:
            raise DamagedError(f"a grid of {bits} bits for numbers of {dtype.itemsize} bytes")
        steps = reader.array(np.dtype(np.float32), shape.columns)
        symbols, tables = read_symbols(reader, 2**bits + signed, shape.rows * shape.columns, tables)
        levels = symbols.astype(np.float32).reshape(shape.rows, shape.columns)
        levels -= 2 ** (bits - 1)
        with np.errstate(all="ignore"):
            levels *= steps
        values = levels.reshape(-1).view(np.uint32)
        if signed or lowest:
            values[symbols == (0 if lowest else 2**bits)] = _NEGATIVE_ZERO
        return values, tables


class Sparse(Form):
    """Where the values other than zero are, and these in one of the other forms."""

    code = 4

    def draft(self, values: np.ndarray, shape: Shape, tables: Tables, coders: tuple[SymbolCoder, ...]) -> Draft | None:
        """Draft positions and values; None if few values are zero."""
        places = np.flatnonzero(values)
        if not len(places) or len(places) > _MOST_SPARSE * len(values):
            return None
        drafts = []
        for positions, stored in draft_positions(places, shape.rows, shape.columns, tables, coders):
            inner = Shape(len(stored), 1, shape.float32)
            drafts.append(_draft(values[stored], inner, positions.tables, coders, _DENSE).after(positions))
        return smallest(drafts)

    def decode(self, reader: Reader, dtype: np.dtype, shape: Shape, tables: Tables) -> tuple[np.ndarray, Tables]:
        """Put the values where they belong."""
        places, tables = read_positions(reader, shape.rows, shape.columns, tables)
        stored, tables = _read_values(reader, dtype, Shape(len(places), 1, shape.float32), tables, _DENSE)
        values = np.zeros(shape.rows * shape.columns, dtype)
        values[places] = stored
        return values, tables


class Vectors(Form):
    """The distinct vectors that an array is put together from, in one of the other forms, and which of them each is."""

    code = 5

    def draft(self, values: np.ndarray, shape: Shape, tables: Tables, coders: tuple[SymbolCoder, ...]) -> Draft | None:
        """Draft both; None if no way to cut the array gives few distinct vectors."""
        found = repeated(values, shape.rows, shape.columns)
        if found is None:
            return None
        cut, book, indices = found
        numbers = _draft(book.reshape(-1), Shape(book.size, 1, shape.float32), tables, coders, _DENSE)
        stream = draft_symbols(indices, len(book), numbers.tables, coders)
        return stream.after(bytes([cut.length | _DOWN * cut.down]), varint(len(book)), numbers)

    def decode(self, reader: Reader, dtype: np.dtype, shape: Shape, tables: Tables) -> tuple[np.ndarray, Tables]:
        """Put the vectors where they belong."""
        head = reader.byte()
        cut = Cut(shape.rows, shape.columns, head & ~_DOWN, bool(head & _DOWN))
        if not 2 <= cut.length <= MOST_LENGTH or not cut.fits:
            raise DamagedError(f"vectors of {cut.length} in {shape.rows:,} x {shape.columns:,} numbers")
        # No more vectors than the array has, so that a few bytes do not ask for much memory.
        count = reader.varint(min(MOST_ANS_SYMBOLS, cut.vectors))
        numbers, tables = _read_values(reader, dtype, Shape(count * cut.length, 1, shape.float32), tables, _DENSE)
        indices, tables = read_symbols(reader, count, cut.vectors, tables)
        if not count:
            raise DamagedError("no vectors")
        return cut.together(numbers.reshape(count, cut.length)[indices]), tables


class Hashed(Form):
    """The numbers of few buckets: a hash of its place says which one a value is, and whether it is negated.

    The hash of float32 values is found from them.

    Args:
        hints: hashes that values may be shared by.
    """

    code = 6

    def __init__(self, hints: tuple[Hash, ...] = ()) -> None:
        self._hints = hints

    def draft(self, values: np.ndarray, shape: Shape, tables: Tables, coders: tuple[SymbolCoder, ...]) -> Draft | None:
        """Draft hash and buckets, and which values are zero beside them; None if the values do not follow a hash."""
        tried = [(hint, outputs) for hint in self._hints for outputs in dict.fromkeys((1, hint.outputs))]
        found = find_hash(values) if shape.float32 else None
        tried += [] if found is None else [(found, 1)]
        for hashing, outputs in tried:
            fits = hashing.buckets <= len(values) < 1 << 32 and not len(values) % outputs
            book = book_of(values, hashing, outputs) if fits else None
            if book is not None:
                return self._draft(values, shape, tables, coders, hashing, outputs, book)
        return None

    def _draft(
        self,
        values: np.ndarray,
        shape: Shape,
        tables: Tables,
        coders: tuple[SymbolCoder, ...],
        hashing: Hash,
        outputs: int,
        book: np.ndarray,
    ) -> Draft:
        buckets, _ = buckets_and_signs(hashing, len(values), outputs)
        places = np.flatnonzero(values)
        masked = bool(book[buckets[values == 0]].any())
        head = bytes([hashing.key, masked]) + varint(hashing.buckets) + varint(outputs)
        positions = Draft.of(b"", tables)
        if masked:
            # An entry that only fills a gap is not zero here.
            ways = draft_positions(places, shape.rows, shape.columns, tables, coders)
            positions = smallest([draft for draft, stored in ways if len(stored) == len(places)])
        stored = book[present(buckets[places] if masked else buckets, hashing.buckets)]
        inner = Shape(len(stored), 1, shape.float32)
        return _draft(stored, inner, positions.tables, coders, _DENSE).after(head, positions)

    def decode(self, reader: Reader, dtype: np.dtype, shape: Shape, tables: Tables) -> tuple[np.ndarray, Tables]:
        """Look up each value's bucket."""
        count = shape.rows * shape.columns
        key, masked = reader.byte(), reader.byte()
        hashing, outputs = Hash(key % KEYS, reader.varint(count)), reader.varint(count)
        if not hashing.buckets or not outputs or count % outputs or count >= 1 << 32:
            raise DamagedError(f"{hashing.buckets:,} buckets, {outputs:,} outputs for {count:,} numbers")
        buckets, signs = buckets_and_signs(hashing, count, outputs)
        if masked:
            places, tables = read_positions(reader, shape.rows, shape.columns, tables)
            buckets, signs = buckets[places], signs[places]
        used = present(buckets, hashing.buckets)
        inner = Shape(int(np.count_nonzero(used)), 1, shape.float32)
        stored, tables = _read_values(reader, dtype, inner, tables, _DENSE)
        book = np.zeros(hashing.buckets, dtype)
        book[used] = stored
        taken = book[buckets]
        signed = np.where(signs, negated(taken), taken)
        if not masked:
            return signed, tables
        values = np.zeros(count, dtype)
        values[places] = signed
        return values, tables


class Transferred(Form):
    """The numbers of meta filters, and which transformation of which of them each filter is.

    Args:
        hints: how the filters of kernels may follow from fewer ones.
    """

    code = 7

    def __init__(self, hints: tuple[Transfer, ...] = ()) -> None:
        self._hints = hints

    def draft(self, values: np.ndarray, shape: Shape, tables: Tables, coders: tuple[SymbolCoder, ...]) -> Draft | None:
        """Draft the transformations and the numbers; None if the values are none of the kernels that were hinted at."""
        for hint in self._hints:
            count = math.prod(hint.shape) * len(hint.slots)
            if count != shape.rows * shape.columns or not count or not can_be(hint, metas_of(hint), count):
                continue
            for outputs_first in (False, True):
                labels = _places_of(hint, outputs_first)
                used = present(labels, int(labels.max()) + 1)
                book = np.zeros(int(labels.max()) + 1, values.dtype)
                book[labels] = values
                if not np.array_equal(book[labels], values):
                    continue
                head = bytes([TRANSFORMS.index(hint.transform) | _FIRST * outputs_first])
                head += b"".join(map(varint, (hint.size, *hint.shape)))
                slots = np.array(hint.slots, np.uint32)
                stream = draft_symbols(slots, metas_of(hint) * transformations(hint), tables, coders)
                stored = book[used]
                inner = Shape(len(stored), 1, shape.float32)
                return _draft(stored, inner, stream.tables, coders, _DENSE).after(head, varint(metas_of(hint)), stream)
        return None

    def decode(self, reader: Reader, dtype: np.dtype, shape: Shape, tables: Tables) -> tuple[np.ndarray, Tables]:
        """Put every number where the transformations say."""
        count = shape.rows * shape.columns
        head, size = reader.byte(), reader.varint(count)
        sides = (reader.varint(count), reader.varint(count), reader.varint(count))
        metas, weights = reader.varint(count), math.prod(sides)
        kind = head & ~_FIRST
        if kind >= len(TRANSFORMS) or size < 2 or not weights or count % weights or not metas:
            raise DamagedError(f"filters of {sides} for {count:,} numbers")
        transfer = Transfer(TRANSFORMS[kind], size, sides)
        if not can_be(transfer, metas, count):
            raise DamagedError(f"{metas:,} meta filters for {count:,} numbers")
        slots, tables = read_symbols(reader, metas * transformations(transfer), count // weights, tables)
        labels = _places_of(replace(transfer, slots=tuple(map(int, slots))), bool(head & _FIRST))
        used = present(labels, int(labels.max()) + 1)
        inner = Shape(int(np.count_nonzero(used)), 1, shape.float32)
        stored, tables = _read_values(reader, dtype, inner, tables, _DENSE)
        book = np.zeros(int(labels.max()) + 1, dtype)
        book[used] = stored
        return book[labels], tables


def _places_of(transfer: Transfer, outputs_first: bool) -> np.ndarray:
    """Return which number each value of the array is, row after row; ``outputs_first``: as in a ``.tflite`` file."""
    labels = labels_of(transfer)
    return (np.moveaxis(labels, -1, 0) if outputs_first else labels).reshape(-1)


_DENSE: tuple[Form, ...] = (Raw(), Planes(), Codebook(), GridLevels())
FORMS: tuple[Form, ...] = (*_DENSE, Sparse(), Vectors(), Hashed(), Transferred())
"""All forms."""


def draft_array(
    array: np.ndarray,
    tables: Tables,
    coders: tuple[SymbolCoder, ...] = CODERS,
    forms: tuple[Form, ...] = FORMS,
) -> Draft:
    """Return the smallest draft of an array.

    Args:
        array: of any shape; numbers of 1, 2, 4 or 8 bytes.
        tables: frequency tables of the arrays before it in the file.
        coders: what streams may be written with; one of them must take every alphabet, as ``FixedWidth`` does.
        forms: what it may be written in.
    """
    values = np.ascontiguousarray(array).reshape(-1).view(_bits_of(array.dtype))
    return _draft(values, Shape.of(array.shape, array.dtype), tables, coders, forms)


def read_array(reader: Reader, dtype: np.dtype, shape: tuple[int, ...], tables: Tables) -> tuple[np.ndarray, Tables]:
    """Return the array, and the tables known afterwards.

    Raises:
        DamagedError: if the bytes are none that :func:`draft_array` writes for such an array.
    """
    values, tables = _read_values(reader, _bits_of(dtype), Shape.of(shape, dtype), tables, FORMS)
    return values.view(dtype).reshape(shape), tables


def _bits_of(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"u{dtype.itemsize}")


def _draft(
    values: np.ndarray, shape: Shape, tables: Tables, coders: tuple[SymbolCoder, ...], forms: tuple[Form, ...]
) -> Draft:
    if not len(values):
        return Draft(0, tables)
    drafts = [(form.code, form.draft(values, shape, tables, coders)) for form in forms]
    return smallest([draft.after(bytes([code])) for code, draft in drafts if draft is not None])


def _read_values(
    reader: Reader, dtype: np.dtype, shape: Shape, tables: Tables, forms: tuple[Form, ...]
) -> tuple[np.ndarray, Tables]:
    if not shape.rows * shape.columns:
        return np.zeros(0, dtype), tables
    code = reader.byte()
    form = next((form for form in forms if form.code == code), None)
    if form is None:
        raise DamagedError(f"values in the unknown form {code}")
    return form.decode(reader, dtype, shape, tables)
