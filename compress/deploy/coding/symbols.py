"""Streams of symbols, each written by the coder that takes the fewest bytes."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from compress.deploy.coding import ans, huffman
from compress.deploy.coding.draft import Draft, Tables, smallest
from compress.deploy.coding.frequencies import Frequencies
from compress.deploy.coding.wire import DamagedError, Reader, pack_bits, unpack_bits, varint

MOST_ANS_SYMBOLS = 65536
"""Largest alphabet of :class:`Ans`."""
MOST_DEFLATE_SYMBOLS = 256
"""Largest alphabet of :class:`Deflate`."""
_LEAST_SAVING = 1 / 128
"""An entropy code that saves less of a stream than this is not worth the time that it takes to read."""
_RAW = -15
"""zlib's window size of a deflate stream without head and checksum."""
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
    """Canonical Huffman codes of alphabets that are too large for :class:`Deflate`."""

    code = 1

    def draft(self, symbols: np.ndarray, counts: np.ndarray, tables: Tables) -> Draft | None:
        """Count the bits; None for an alphabet that is too large, or one that deflate is faster with."""
        if not MOST_DEFLATE_SYMBOLS < len(counts) <= huffman.MOST_SYMBOLS:
            return None
        lengths = huffman.code_lengths(counts)
        return Draft(huffman.size(counts, lengths), tables, lambda: huffman.encode(symbols, lengths))

    def decode(self, reader: Reader, alphabet: int, count: int, tables: Tables) -> tuple[np.ndarray, Tables]:
        """Decode."""
        if alphabet > huffman.MOST_SYMBOLS:
            raise DamagedError(f"a Huffman code of {alphabet:,} symbols")
        return huffman.decode(reader, alphabet, count), tables


class Deflate(SymbolCoder):
    """Canonical Huffman codes as deflate writes them (RFC 1951), without its repeats: zlib reads short streams fast."""

    code = 3

    def draft(self, symbols: np.ndarray, counts: np.ndarray, tables: Tables) -> Draft | None:
        """Write them; None for symbols of more than a byte."""
        if len(counts) > MOST_DEFLATE_SYMBOLS:
            return None
        writer = zlib.compressobj(9, zlib.DEFLATED, _RAW, 9, zlib.Z_HUFFMAN_ONLY)
        content = writer.compress(symbols.astype(np.uint8).tobytes()) + writer.flush()
        return Draft.of(varint(len(content)) + content, tables)

    def decode(self, reader: Reader, alphabet: int, count: int, tables: Tables) -> tuple[np.ndarray, Tables]:
        """Decode."""
        opener = zlib.decompressobj(_RAW)
        try:
            # One symbol more, so that a stream that is longer than it should be is found out.
            symbols = opener.decompress(reader.take(reader.varint()), count + 1)
        except zlib.error as error:
            raise DamagedError(str(error)) from error
        if len(symbols) != count or not opener.eof or opener.unused_data:
            raise DamagedError("a deflate stream of another length")
        return np.frombuffer(symbols, np.uint8).astype(np.uint32), tables


class Ans(SymbolCoder):
    """Asymmetric numeral systems with a frequency table of its own, or one that an earlier stream has brought."""

    code = 2

    def draft(self, symbols: np.ndarray, counts: np.ndarray, tables: Tables) -> Draft | None:
        """Choose the table that takes the fewest bytes; None for an alphabet that is too large."""
        if len(counts) > MOST_ANS_SYMBOLS:
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


CODERS: tuple[SymbolCoder, ...] = (FixedWidth(), Huffman(), Deflate(), Ans())
"""All coders."""


def draft_symbols(
    symbols: np.ndarray, alphabet: int, tables: Tables, coders: tuple[SymbolCoder, ...] = CODERS
) -> Draft:
    """Return the smallest draft of a stream of symbols [n], each below ``alphabet``; fixed width if that is as good."""
    if alphabet < 2 or not len(symbols):
        return Draft(0, tables)
    counts = np.bincount(symbols, minlength=alphabet)
    drafts = [(coder.code, coder.draft(symbols, counts, tables)) for coder in coders]
    possible = {code: draft.after(bytes([code])) for code, draft in drafts if draft is not None}
    found = smallest(list(possible.values()))
    fixed = possible.get(FixedWidth.code, found)
    return fixed if found.size > (1 - _LEAST_SAVING) * fixed.size else found


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
