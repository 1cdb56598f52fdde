"""Where a sparse array has its entries: four ways to write it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from compress.deploy.coding import ans
from compress.deploy.coding.draft import Draft, Tables
from compress.deploy.coding.frequencies import Frequencies
from compress.deploy.coding.symbols import CODERS, MOST_ANS_SYMBOLS, Ans, SymbolCoder, draft_symbols, read_symbols
from compress.deploy.coding.wire import DamagedError, Reader, varint

_GAP_BITS = (2, 3, 4, 5, 6, 8)
_CLASSES = 24
"""Classes of rows and columns by the number of their entries: none, then two for each doubling."""


class Positions(ABC):
    """Writes the places of entries in an array of ``rows`` x ``columns``, as indices into it, row after row."""

    code: ClassVar[int]
    """Its number in the file."""

    @abstractmethod
    def drafts(
        self, places: np.ndarray, rows: int, columns: int, tables: Tables, coders: tuple[SymbolCoder, ...]
    ) -> list[tuple[Draft, np.ndarray]]:
        """Return drafts of places int64 [n], increasing, n > 0, each with the places whose values it asks for."""

    @abstractmethod
    def decode(self, reader: Reader, rows: int, columns: int, tables: Tables) -> tuple[np.ndarray, Tables]:
        """Return the places int64 [n] whose values are written, and the tables."""


class Relative(Positions):
    """Zeros between an entry and the one before; where they do not fit, an entry more that is zero.

    Source: Deep Compression (arXiv 1510.00149, section 2 and figure 2).
    """

    code = 0

    def drafts(
        self, places: np.ndarray, rows: int, columns: int, tables: Tables, coders: tuple[SymbolCoder, ...]
    ) -> list[tuple[Draft, np.ndarray]]:
        """Draft the gaps in several numbers of bits."""
        gaps = np.diff(places, prepend=-1) - 1
        drafts = []
        for bits in _GAP_BITS:
            # An entry may stand for its own gap and 2**bits - 1 zeros before it, each of which ends in a filler.
            fillers = gaps >> bits
            ends = np.cumsum(fillers + 1)
            entries = np.full(int(ends[-1]), 2**bits - 1, np.int64)
            entries[ends - 1] = gaps & 2**bits - 1
            stored = np.cumsum(entries + 1) - 1
            stream = draft_symbols(entries, 2**bits, tables, coders)
            drafts.append((stream.after(bytes([bits]), varint(len(entries))), stored))
        return drafts

    def decode(self, reader: Reader, rows: int, columns: int, tables: Tables) -> tuple[np.ndarray, Tables]:
        """Sum up the gaps."""
        bits = reader.byte()
        if bits not in _GAP_BITS:
            raise DamagedError(f"gaps of {bits} bits")
        entries, tables = read_symbols(reader, 2**bits, reader.varint(rows * columns), tables)
        # In place: a few bytes may say that there are very many.
        entries += np.uint32(1)
        places = np.cumsum(entries, dtype=np.int64)
        places -= 1
        return places, tables


class Rows(Positions):
    """Compressed sparse rows: the number of entries of each row, and their columns."""

    code = 1

    def drafts(
        self, places: np.ndarray, rows: int, columns: int, tables: Tables, coders: tuple[SymbolCoder, ...]
    ) -> list[tuple[Draft, np.ndarray]]:
        """Draft counts and columns."""
        if columns >= MOST_ANS_SYMBOLS:
            return []
        row, column = np.divmod(places, columns)
        counts = draft_symbols(np.bincount(row, minlength=rows), columns + 1, tables, coders)
        indices = draft_symbols(column, columns, counts.tables, coders)
        return [(indices.after(counts), places)]

    def decode(self, reader: Reader, rows: int, columns: int, tables: Tables) -> tuple[np.ndarray, Tables]:
        """Read counts and columns."""
        counts, tables = read_symbols(reader, columns + 1, rows, tables)
        indices, tables = read_symbols(reader, columns, int(counts.sum(dtype=np.int64)), tables)
        return np.repeat(np.arange(rows, dtype=np.int64), counts) * columns + indices, tables


class Mask(Positions):
    """A bit for each place, expected to be set as often as its row and its column let one think.

    Rows and columns fall into classes by the number of their entries; all places of the same two classes have one
    frequency table. Pruned layers have dead and busy inputs and outputs, which this makes use of.
    """

    code = 2

    def drafts(
        self, places: np.ndarray, rows: int, columns: int, tables: Tables, coders: tuple[SymbolCoder, ...]
    ) -> list[tuple[Draft, np.ndarray]]:
        """Draft the classes, how full each pair of them is, and the bits."""
        if not any(isinstance(coder, Ans) for coder in coders):
            return []
        mask = np.zeros(rows * columns, bool)
        mask[places] = True
        of_row, of_column = (_classes(mask.reshape(rows, columns).sum(axis, dtype=np.int64)) for axis in (1, 0))
        parts = [mask.reshape(rows, columns)[group].reshape(-1) for group in _groups(of_row, of_column)]
        shares = np.array([_share(int(part.sum()), len(part)) for part in parts])
        first = draft_symbols(of_row, _CLASSES, tables, coders)
        second = draft_symbols(of_column, _CLASSES, first.tables, coders)
        third = draft_symbols(shares, _SHARES, second.tables, coders)
        expected = [_frequencies(share) for share in shares.tolist()]
        bits = sum(table.bits(np.bincount(part, minlength=2)) for part, table in zip(parts, expected, strict=True))
        stream = Draft(ans.size(bits), third.tables, lambda: ans.encode(list(zip(parts, expected, strict=True))))
        return [(stream.after(first, second, third), places)]

    def decode(self, reader: Reader, rows: int, columns: int, tables: Tables) -> tuple[np.ndarray, Tables]:
        """Read the classes, how full each pair of them is, and the bits."""
        of_row, tables = read_symbols(reader, _CLASSES, rows, tables)
        of_column, tables = read_symbols(reader, _CLASSES, columns, tables)
        groups = _groups(of_row, of_column)
        shares, tables = read_symbols(reader, _SHARES, len(groups), tables)
        decoder = ans.Decoder(reader, rows * columns)
        mask = np.zeros((rows, columns), bool)
        for (row, column), share in zip(groups, shares, strict=True):
            bits = decoder.pop(row.size * column.size, _frequencies(int(share)))
            mask[row, column] = bits.reshape(row.size, column.size)
        decoder.finish()
        return np.flatnonzero(mask), tables


_SHARES = 64
_SHARE_PRECISION = 16


def _classes(counts: np.ndarray) -> np.ndarray:
    """Return the class of each count int64 [n]: 0 for none, then two for each doubling."""
    return np.where(counts, np.minimum(1 + np.floor(2 * np.log2(np.maximum(counts, 1))), _CLASSES - 1), 0).astype(int)


def _groups(of_row: np.ndarray, of_column: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return rows [n, 1] and columns [1, m] of each pair of classes, none of them 0, in the order of the pairs."""
    rows, columns = (
        [there for number in range(1, _CLASSES) if len(there := np.flatnonzero(classes == number))]
        for classes in (of_row, of_column)
    )
    return [(row[:, None], column[None]) for row in rows for column in columns]


def _share(count: int, size: int) -> int:
    """Return the symbol for a share of set bits: quarters of a power of two below one half, and above it."""
    parts = min(max(count / size, 2.0**-_SHARE_PRECISION), 1 - 2.0**-_SHARE_PRECISION)
    half = _SHARES // 2
    if parts <= 0.5:
        return min(round(-2 * np.log2(parts)) - 2, half - 1)
    return half + min(round(-2 * np.log2(1 - parts)) - 2, half - 1)


def _frequencies(share: int) -> Frequencies:
    half = _SHARES // 2
    rare = max(1, round(2**_SHARE_PRECISION * 2.0 ** (-(share % half + 2) / 2)))
    parts = [2**_SHARE_PRECISION - rare, rare]
    return Frequencies(_SHARE_PRECISION, np.array(parts if share < half else parts[::-1]))


POSITIONS: tuple[Positions, ...] = (Relative(), Rows(), Mask())
"""All ways."""


def draft_positions(
    places: np.ndarray, rows: int, columns: int, tables: Tables, coders: tuple[SymbolCoder, ...] = CODERS
) -> list[tuple[Draft, np.ndarray]]:
    """Return the drafts of all ways, each with the places int64 [m] whose values it asks for."""
    return [
        (draft.after(bytes([way.code])), stored)
        for way in POSITIONS
        for draft, stored in way.drafts(places, rows, columns, tables, coders)
    ]


def read_positions(reader: Reader, rows: int, columns: int, tables: Tables) -> tuple[np.ndarray, Tables]:
    """Return the places int64 [n] whose values are written, increasing, and the tables."""
    code = reader.byte()
    way = next((way for way in POSITIONS if way.code == code), None)
    if way is None:
        raise DamagedError(f"positions of the unknown kind {code}")
    places, tables = way.decode(reader, rows, columns, tables)
    if len(places) and (places[-1] >= rows * columns or (places[1:] <= places[:-1]).any()):
        raise DamagedError("positions outside the array")
    return places, tables
