"""Streams of symbols, each written by the coder that takes the fewest bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from compress.deploy.coding import ans, huffman
from compress.deploy.coding.draft import Draft, Tables, smallest
from compress.deploy.coding.frequencies import MOST_USED, Frequencies
from compress.deploy.coding.wire import DamagedError, Reader, pack_bits, unpack_bits, varint

MOST_ANS_SYMBOLS = 65536
"""Largest alphabet of :class:`Ans`."""
_SHORT = 2000
"""Symbols up to which a stream is written to know its size: of short ones, whole words count."""


class SymbolCoder(ABC):
    """Writes symbols 0 to ``alphabet`` - 1."""

    code: ClassVar[int]
    """Its number in the file."""

    @abstractmethod
    def draft(self, symbols: np.ndarray, counts: np.ndarray, tables: Tables) -> Draft | None:
        """Return the draft of symbols uint [n], n > 0, that come ``counts`` [alphabet] times; None if it cannot."""

    @abstractmethod
    def decode(self, reader: Reader, alphabet: int, count: int, tables: Tables) -> tuple[np.ndarray, Tables]:
        """Return ``count`` symbols uint32 [n], and the tables known afterwards."""


class FixedWidth(SymbolCoder):
    """As many bits for each symbol as the largest needs."""

    code = 0

    def draft(self, symbols: np.ndarray, counts: np.ndarray, tables: Tables) -> Draft:
        """Count the bits."""
        width = (len(counts) - 1).bit_length()
        return Draft(-(-len(symbols) * width // 8), tables, lambda: pack_bits(symbols, width))

    def decode(self, reader: Reader, alphabet: int, count: int, tables: Tables) -> tuple[np.ndarray, Tables]:
        """Unpack the bits."""
        width = (alphabet - 1).bit_length()
        return unpack_bits(reader.take(-(-count * width // 8)), width, count), tables


class Huffman(SymbolCoder):
    """Canonical Huffman codes."""

    code = 1

    def draft(self, symbols: np.ndarray, counts: np.ndarray, tables: Tables) -> Draft | None:
        """Count the bits; None for an alphabet that is too large."""
        if len(counts) > huffman.MOST_SYMBOLS:
            return None
        lengths = huffman.code_lengths(counts)
        return Draft(huffman.size(counts, lengths), tables, lambda: huffman.encode(symbols, lengths))

    def decode(self, reader: Reader, alphabet: int, count: int, tables: Tables) -> tuple[np.ndarray, Tables]:
        """Decode."""
        if alphabet > huffman.MOST_SYMBOLS:
            raise DamagedError(f"a Huffman code of {alphabet:,} symbols")
        return huffman.decode(reader, alphabet, count), tables


class Ans(SymbolCoder):
    """Asymmetric numeral systems with a frequency table of its own, or one that an earlier stream has brought."""

    code = 2

    def draft(self, symbols: np.ndarray, counts: np.ndarray, tables: Tables) -> Draft | None:
        """Choose the table that takes the fewest bytes; None for an alphabet that is too large."""
        if len(counts) > MOST_ANS_SYMBOLS or np.count_nonzero(counts) > MOST_USED:
            return None
        own = Frequencies.fitted(counts)
        # Number 0 says that a table follows.
        heads = [(varint(0) + own.to_bytes(), own, tables.with_table(own))]
        heads += [(varint(1 + number), table, tables) for number, table in tables.of_alphabet(len(counts))]

        def stream(head: bytes, table: Frequencies, after: Tables) -> Draft:
            if len(symbols) <= _SHORT:
                return Draft.of(head + ans.encode([(symbols, table)]), after)
            size = len(head) + ans.size(table.bits(counts))
            return Draft(size, after, lambda: head + ans.encode([(symbols, table)]))

        return smallest([stream(*head) for head in heads])

    def decode(self, reader: Reader, alphabet: int, count: int, tables: Tables) -> tuple[np.ndarray, Tables]:
        """Decode."""
        if alphabet > MOST_ANS_SYMBOLS:
            raise DamagedError(f"a stream of {alphabet:,} symbols")
        number = reader.varint(len(tables.known))
        if number:
            table = tables.known[number - 1]
            if len(table.parts) != alphabet:
                raise DamagedError(f"a frequency table of {len(table.parts)} symbols for a stream of {alphabet}")
        else:
            table = Frequencies.read(reader, alphabet)
            tables = tables.with_table(table)
        decoder = ans.Decoder(reader, count)
        symbols = decoder.pop(count, table)
        decoder.finish()
        return symbols, tables


CODERS: tuple[SymbolCoder, ...] = (FixedWidth(), Huffman(), Ans())
"""All coders."""


def draft_symbols(
    symbols: np.ndarray, alphabet: int, tables: Tables, coders: tuple[SymbolCoder, ...] = CODERS
) -> Draft:
    """Return the smallest draft of a stream of symbols [n], each below ``alphabet``."""
    if alphabet < 2 or not len(symbols):
        return Draft(0, tables)
    counts = np.bincount(symbols, minlength=alphabet)
    drafts = [(coder.code, coder.draft(symbols, counts, tables)) for coder in coders]
    return smallest([draft.after(bytes([code])) for code, draft in drafts if draft is not None])


def read_symbols(reader: Reader, alphabet: int, count: int, tables: Tables) -> tuple[np.ndarray, Tables]:
    """Return ``count`` symbols uint32 [n] of a stream, and the tables known afterwards."""
    if alphabet < 2 or not count:
        return np.zeros(count, np.uint32), tables
    code = reader.byte()
    coder = next((coder for coder in CODERS if coder.code == code), None)
    if coder is None:
        raise DamagedError(f"a stream of the unknown coder {code}")
    symbols, tables = coder.decode(reader, alphabet, count, tables)
    if int(symbols.max()) >= alphabet:
        raise DamagedError(f"a symbol above {alphabet - 1:,}")
    return symbols, tables
