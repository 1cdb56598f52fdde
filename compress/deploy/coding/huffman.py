"""Canonical Huffman codes of at most 15 bits, decoded many blocks at a time.

Source: Huffman, "A Method for the Construction of Minimum-Redundancy Codes" (1952); Deep Compression
(arXiv 1510.00149, section 4).
"""

from __future__ import annotations

import heapq
from itertools import count as numbers

import numpy as np

from compress.deploy.coding.wire import DamagedError, Reader, pack_bits, unpack_bits, varint

MOST_SYMBOLS = 4096
"""Largest alphabet."""
_MOST_BITS = 15
_BLOCK = 512
"""Symbols whose place in the bits is written down, so that blocks can be decoded side by side."""


def size(counts: np.ndarray, lengths: np.ndarray) -> float:
    """Return about how many bytes :func:`encode` takes for symbols that come ``counts`` [alphabet] times."""
    bits = int((counts * lengths).sum())
    blocks = int(counts.sum()) // _BLOCK
    block_bits = int(_BLOCK * bits / counts.sum() * 1.1).bit_length()
    return (len(counts) * 4 + bits + blocks * block_bits) / 8 + 1 + len(varint(bits))


def encode(symbols: np.ndarray, lengths: np.ndarray) -> bytes:
    """Return code lengths, block lengths and codes of ``symbols`` [n], n > 0.

    ``lengths``: the bits of each symbol's code, from :func:`code_lengths`.
    """
    codes = canonical_codes(lengths)
    sizes = lengths[symbols]
    ends = np.cumsum(sizes)
    bits = np.zeros(int(ends[-1]), np.uint8)
    starts = ends - sizes
    chosen = codes[symbols]
    for place in range(int(lengths.max())):
        there = sizes > place
        bits[starts[there] + place] = chosen[there] >> (sizes[there] - 1 - place) & 1
    blocks = np.add.reduceat(sizes, np.arange(0, len(symbols), _BLOCK))
    # The last block ends where the bits do.
    width = int(blocks.max()).bit_length()
    head = varint(len(bits)) + bytes([width])
    return pack_bits(lengths, 4) + head + pack_bits(blocks[:-1], width) + np.packbits(bits).tobytes()


def decode(reader: Reader, alphabet: int, count: int) -> np.ndarray:
    """Return the ``count`` symbols uint32 [n] that :func:`encode` wrote."""
    lengths = unpack_bits(reader.take(-(-alphabet * 4 // 8)), 4, alphabet).astype(np.int64)
    total = reader.varint(count * _MOST_BITS)
    width = reader.byte()
    number = -(-count // _BLOCK)
    if width > 32:
        raise DamagedError(f"block lengths of {width} bits")
    sizes = unpack_bits(reader.take(-(-(number - 1) * width // 8)), width, number - 1).astype(np.int64)
    stored = np.frombuffer(reader.take(-(-total // 8)), np.uint8)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    if starts[-1] > total:
        raise DamagedError("blocks that are longer than the stream")
    symbol_at, length_at = _lookup(lengths)
    # Three bytes hold every code, wherever in the first one it starts.
    padded = np.concatenate([stored, np.zeros(4, np.uint8)]).astype(np.uint32)
    window = padded[:-2] << 16 | padded[1:-1] << 8 | padded[2:]
    out = np.zeros((_BLOCK, number), np.uint32)
    place = starts.copy()
    for row in range(min(_BLOCK, count)):
        code = window[np.minimum(place >> 3, len(window) - 1)] >> (24 - _MOST_BITS - (place & 7)) & (2**_MOST_BITS - 1)
        out[row] = symbol_at[code]
        place += length_at[code]
    return out.T.reshape(-1)[:count]


def code_lengths(counts: np.ndarray) -> np.ndarray:
    """Return the bits of each symbol's code int64 [alphabet], at most 15; 0 where the count is."""
    lengths = np.zeros(len(counts), np.int64)
    used = np.flatnonzero(counts)
    if len(used) == 1:
        lengths[used] = 1
        return lengths
    weights = counts[used]
    while True:
        depths = _depths(weights)
        if depths.max() <= _MOST_BITS:
            lengths[used] = depths
            return lengths
        # Evener counts give a flatter tree.
        weights = (weights + 1) // 2


def _depths(weights: np.ndarray) -> np.ndarray:
    order = numbers()
    heap: list[tuple[int, int, list[int]]] = [(int(w), next(order), [i]) for i, w in enumerate(weights)]
    heapq.heapify(heap)
    depths = np.zeros(len(weights), np.int64)
    while len(heap) > 1:
        first, second = heapq.heappop(heap), heapq.heappop(heap)
        members = first[2] + second[2]
        depths[members] += 1
        heapq.heappush(heap, (first[0] + second[0], next(order), members))
    return depths


def canonical_codes(lengths: np.ndarray) -> np.ndarray:
    """Return the codes int64 [alphabet]: counted upwards by length, then by symbol."""
    order = np.lexsort((np.arange(len(lengths)), lengths))
    order = order[lengths[order] > 0]
    spans = 2 ** (_MOST_BITS - lengths[order])
    codes = np.zeros(len(lengths), np.int64)
    codes[order] = (np.cumsum(spans) - spans) >> (_MOST_BITS - lengths[order])
    return codes


def _lookup(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each 15 bits that may come next, the symbol that they begin with and its length."""
    order = np.lexsort((np.arange(len(lengths)), lengths))
    order = order[lengths[order] > 0]
    spans = 2 ** (_MOST_BITS - lengths[order])
    if not len(order) or spans.sum() > 2**_MOST_BITS:
        raise DamagedError("code lengths that no code has")
    symbols = np.zeros(2**_MOST_BITS, np.uint32)
    sizes = np.ones(2**_MOST_BITS, np.int64)
    filled = int(spans.sum())
    symbols[:filled] = np.repeat(order, spans)
    sizes[:filled] = np.repeat(lengths[order], spans)
    return symbols, sizes
