"""A reader of packed files in plain Python, written from ``docs/packed_file.md`` and sharing no code with the project.

Slow, and it trusts its input: an oracle for tests, and a start for whoever reads the files elsewhere.
"""

from __future__ import annotations

import json
import struct
import zlib
from math import prod
from typing import Any

SIZES = {"bool": 1, "float16": 2, "float32": 4, "float64": 8, "complex64": 8}
SIZES |= {f"{sign}int{bits}": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)}

Table = tuple[int, list[int]]


class Bytes:
    """Bytes read from front to back."""

    def __init__(self, content: bytes) -> None:
        self.content, self.place = content, 0

    def take(self, count: int) -> bytes:
        taken = self.content[self.place : self.place + count]
        assert len(taken) == count
        self.place += count
        return taken

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        value, shift = 0, 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def numbers(self, count: int, size: int) -> list[int]:
        raw = self.take(count * size)
        return [int.from_bytes(raw[i : i + size], "little") for i in range(0, len(raw), size)]


def read_file(content: bytes) -> tuple[int, Any, dict[str, tuple[str, list[int], bytes]], bytes]:
    """Return kind, structure, arrays (type, shape, bytes) by name, and skeleton."""
    magic, version, kind, length, size, total, stored, checksum = struct.unpack("<4sHHQQQII", content[:40])
    assert (magic, length) == (b"\x93CMP", len(content))
    assert version in (1, 2)
    assert zlib.crc32(content[:36]) == checksum
    reader = Bytes(content[40:])
    directory = zlib.decompress(reader.take(stored))
    assert len(directory) == size
    assert zlib.crc32(content[40 : 40 + stored]) == reader.numbers(1, 4)[0]
    text_length = int.from_bytes(directory[:8], "little")
    text = json.loads(directory[8 : 8 + text_length])
    arrays: dict[str, tuple[str, list[int], bytes]] = {}
    tables: list[Table] = []
    for name, dtype, shape, body_length in text["arrays"]:
        body = reader.take(body_length)
        assert zlib.crc32(body) == reader.numbers(1, 4)[0]
        columns = shape[-1] if shape else 1
        rows = prod(shape[:-1]) if prod(shape) else 0
        inner = Bytes(body)
        values = read_values(inner, rows, columns, SIZES[dtype], tables)
        assert inner.place == len(body)
        arrays[name] = (dtype, shape, b"".join(v.to_bytes(SIZES[dtype], "little") for v in values))
    assert size + sum(len(raw) for _, _, raw in arrays.values()) == total
    return kind, text["structure"], arrays, directory[8 + text_length :]


def read_values(reader: Bytes, rows: int, columns: int, size: int, tables: list[Table]) -> list[int]:
    count = rows * columns
    if not count:
        return []
    form = reader.byte()
    if form == 0:
        return reader.numbers(count, size)
    if form == 1:
        planes = [read_stream(reader, 256, count, tables) for _ in range(size)]
        return [sum(plane[i] << 8 * k for k, plane in enumerate(planes)) for i in range(count)]
    if form == 2:
        book = reader.numbers(reader.varint(), size)
        return [book[i] for i in read_stream(reader, len(book), count, tables)]
    if form == 3:
        head = reader.byte()
        bits, lowest, signed = head & 63, head >> 6 & 1, head >> 7
        steps = struct.unpack(f"<{columns}f", reader.take(4 * columns))
        symbols = read_stream(reader, 2**bits + signed, count, tables)
        values = []
        for i, symbol in enumerate(symbols):
            # A product of a float32 and a small whole number is exact in Python's floats; packing rounds it once.
            product = (symbol - 2 ** (bits - 1)) * steps[i % columns]
            (value,) = struct.unpack("<I", struct.pack("<f", product))
            values.append(0x80000000 if symbol == 2**bits or (lowest and not symbol) else value)
        return values
    if form == 5:
        head, known = reader.byte(), reader.varint()
        length = head & 127
        numbers = read_values(reader, known * length, 1, size, tables)
        values = [0] * count
        for number, vector in enumerate(read_stream(reader, known, count // length, tables)):
            first, step = number * length, 1
            if head & 128:
                first, step = number // columns * length * columns + number % columns, columns
            values[first : first + length * step : step] = numbers[vector * length : (vector + 1) * length]
        return values
    if form == 7:
        return read_transferred(reader, rows * columns, size, tables)
    if form == 6:
        return read_hashed(reader, rows, columns, size, tables)
    assert form == 4
    places = read_positions(reader, rows, columns, tables)
    values = [0] * count
    for place, value in zip(places, read_values(reader, len(places), 1, size, tables), strict=True):
        values[place] = value
    return values


def mix(bits: int) -> int:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ bits >> shift) * factor % 2**32
    return bits ^ bits >> 16


def read_hashed(reader: Bytes, rows: int, columns: int, size: int, tables: list[Table]) -> list[int]:
    key, masked, buckets, outputs = reader.byte(), reader.byte(), reader.varint(), reader.varint()
    count = rows * columns
    inner = count // outputs
    entries = read_positions(reader, rows, columns, tables) if masked else list(range(count))
    mixed = [mix(((e % inner * outputs + e // inner) * 0x9E3779B1 + key * 0x85EBCA77) % 2**32) for e in entries]
    used = sorted({bits % buckets for bits in mixed})
    book = dict(zip(used, read_values(reader, len(used), 1, size, tables), strict=True))
    values = [0] * count
    for entry, bits in zip(entries, mixed, strict=True):
        value = book[bits % buckets]
        if mix((bits + 0xC2B2AE3D) % 2**32) >= 2**31 and value:
            value = 256 - value if size == 1 else value ^ 1 << 8 * size - 1
        values[entry] = value
    return values


def read_transferred(reader: Bytes, count: int, size: int, tables: list[Table]) -> list[int]:
    head = reader.byte()
    kind, first = head & 127, head >> 7
    s, height, width, channels, metas = (reader.varint() for _ in range(5))
    transformations, more = (s * s, s - 1) if kind == 0 else (s, 0)
    filters = count // (height * width * channels)
    slots = read_stream(reader, metas * transformations, filters, tables)
    where: list[int] = []
    for entry in range(count):
        place, one = divmod(entry, filters)
        if first:
            one, place = divmod(entry, height * width * channels)
        y, x, z = place // channels // width, place // channels % width, place % channels
        meta, t = divmod(slots[one], transformations)
        if kind == 0:
            y, x = y + t // s, x + t % s
        elif kind == 1:
            x = width - 1 - x if t >= 4 else x
            for _ in range(2 * t if s == 2 else t % 4):
                y, x = x, width - 1 - y
        else:
            z = z // s * s + (z - t) % s
        where.append(((meta * (height + more) + y) * (width + more) + x) * channels + z)
    used = sorted(set(where))
    book = dict(zip(used, read_values(reader, len(used), 1, size, tables), strict=True))
    return [book[number] for number in where]


def read_positions(reader: Bytes, rows: int, columns: int, tables: list[Table]) -> list[int]:
    kind = reader.byte()
    if kind == 0:
        bits = reader.byte()
        place, places = -1, []
        for gap in read_stream(reader, 2**bits, reader.varint(), tables):
            place += gap + 1
            places.append(place)
        return places
    if kind == 1:
        counts = read_stream(reader, columns + 1, rows, tables)
        indices = iter(read_stream(reader, columns, sum(counts), tables))
        return [row * columns + next(indices) for row, count in enumerate(counts) for _ in range(count)]
    assert kind == 2
    of_row = read_stream(reader, 24, rows, tables)
    of_column = read_stream(reader, 24, columns, tables)
    groups: dict[tuple[int, int], list[int]] = {}
    for place in range(rows * columns):
        pair = (of_row[place // columns], of_column[place % columns])
        if all(pair):
            groups.setdefault(pair, []).append(place)
    shares = read_stream(reader, 64, len(groups), tables)
    parts = []
    for pair, share in zip(sorted(groups), shares, strict=True):
        rare = max(1, round(65536 * 2 ** (-(share % 32 + 2) / 2)))
        table = (16, [65536 - rare, rare] if share < 32 else [rare, 65536 - rare])
        parts.append((len(groups[pair]), table))
    bits = read_ans(reader, parts)
    order = [place for pair in sorted(groups) for place in groups[pair]]
    return sorted(place for place, bit in zip(order, bits, strict=True) if bit)


def read_stream(reader: Bytes, alphabet: int, count: int, tables: list[Table]) -> list[int]:
    if alphabet < 2 or not count:
        return [0] * count
    coder = reader.byte()
    if coder == 0:
        return bit_fields(reader, (alphabet - 1).bit_length(), count)
    if coder == 1:
        lengths = bit_fields(reader, 4, alphabet)
        total, width = reader.varint(), reader.byte()
        bit_fields(reader, width, -(-count // 512) - 1)
        bits = f"{int.from_bytes(reader.take(-(-total // 8)), 'big'):0{8 * -(-total // 8)}b}"
        codes, code, last = {}, 0, 0
        for length, symbol in sorted((length, symbol) for symbol, length in enumerate(lengths) if length):
            code <<= length - last
            codes[f"{code:0{length}b}"] = symbol
            code, last = code + 1, length
        symbols, word = [], ""
        for bit in bits[:total]:
            word += bit
            if word in codes:
                symbols.append(codes[word])
                word = ""
        assert len(symbols) == count
        assert not word
        return symbols
    if coder == 3:
        symbols = list(zlib.decompress(reader.take(reader.varint()), wbits=-15))
        assert len(symbols) == count
        return symbols
    assert coder == 2
    number = reader.varint()
    if not number:
        precision, parts, symbol = reader.byte(), [0] * alphabet, -1
        while sum(parts) < 2**precision:
            symbol += 1 + reader.varint()
            parts[symbol] = 1 + reader.varint()
        tables.append((precision, parts))
        number = len(tables)
    return read_ans(reader, [(count, tables[number - 1])])


def read_ans(reader: Bytes, parts: list[tuple[int, Table]]) -> list[int]:
    words = reader.numbers(reader.varint(), 4)
    state = 0
    while words and state < 2**32:
        state = state << 32 | words.pop()
    symbols = []
    for count, (precision, frequencies) in parts:
        alphabet = len(frequencies)
        bounds, below = [], 0
        for symbol, frequency in enumerate(frequencies):
            bounds.append(below * (2**24 - alphabet) // 2**precision + symbol)
            below += frequency
        bounds.append(2**24)
        for _ in range(count):
            low = state & (2**24 - 1)
            symbol = max(i for i in range(alphabet) if bounds[i] <= low)
            state = (state >> 24) * (bounds[symbol + 1] - bounds[symbol]) + low - bounds[symbol]
            if state < 2**32 and words:
                state = state << 32 | words.pop()
            symbols.append(symbol)
    assert not words
    assert not state
    return symbols


def bit_fields(reader: Bytes, width: int, count: int) -> list[int]:
    raw = reader.take(-(-width * count // 8))
    bits = f"{int.from_bytes(raw, 'big'):0{8 * len(raw)}b}" if raw else ""
    return [int(bits[i * width : (i + 1) * width], 2) if width else 0 for i in range(count)]
