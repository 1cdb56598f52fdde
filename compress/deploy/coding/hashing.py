"""Hashed sharing: which bucket and which sign each place of an array has, computed from the place alone.

Source: HashedNets (Chen et al., arXiv 1504.04788). The mixing of bits is MurmurHash3's finaliser (Appleby).
"""

from __future__ import annotations

import numpy as np

from compress.candidate import Hash

KEYS = 256
"""Keys that there are: so few that the one of an array can be found."""
_PLACES, _KEYS, _SIGNS = np.uint32(0x9E3779B1), 0x85EBCA77, np.uint32(0xC2B2AE3D)
_FIRST, _SECOND = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
_SAMPLE = 1 << 15
"""Values among which equal ones are looked for."""
_PART = 1 << 16
"""Places that are hashed at a time: they stay in the processor's cache."""
_TRIPLES = 64
_FEWEST_PAIRS = 12
_TOP_BIT = 0x80000000


def buckets_and_signs(hashing: Hash, count: int, outputs: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return the bucket uint32 [count] of each place, and whether its value is negated, bool [count].

    Args:
        hashing: the hash; a place is one of the kernel as Keras has it, row after row.
        count: places.
        outputs: of the kernel, if its last axis comes first in the array; else 1.
    """
    buckets, signs = np.empty(count, np.uint32), np.empty(count, bool)
    key = np.uint32(hashing.key * _KEYS & 0xFFFFFFFF)
    for first in range(0, count, _PART):
        part = slice(first, min(first + _PART, count))
        places = np.arange(part.start, part.stop, dtype=np.uint32)
        if outputs > 1:
            inner = np.uint32(count // outputs)
            places = places % inner * np.uint32(outputs) + places // inner
        mixed = _mixed(places * _PLACES + key)
        np.remainder(mixed, np.uint32(hashing.buckets), out=buckets[part])
        np.greater_equal(_mixed(mixed + _SIGNS), _TOP_BIT, out=signs[part])
    return buckets, signs


def negated(values: np.ndarray) -> np.ndarray:
    """Return the bits uint [n] of the negated numbers: whole ones of one byte, or floats; zero stays zero."""
    if values.itemsize == 1:
        return -values
    return np.where(values == 0, values, values ^ values.dtype.type(1 << 8 * values.itemsize - 1))


def book_of(values: np.ndarray, hashing: Hash, outputs: int = 1) -> np.ndarray | None:
    """Return the bucket's numbers uint [buckets] of which all values uint [n] other than zero are made; None if not.

    A bucket that no such value falls into has a zero.
    """
    buckets, signs = buckets_and_signs(hashing, len(values), outputs)
    alive = values != 0
    signed = np.where(signs, negated(values), values)
    book = np.zeros(hashing.buckets, values.dtype)
    book[buckets[alive]] = signed[alive]
    kept = book[buckets]
    return book if np.array_equal(np.where(signs, negated(kept), kept)[alive], values[alive]) else None


def find_hash(values: np.ndarray) -> Hash | None:
    """Return the hash by which float32 values (their bits, uint32 [n]) seem to be shared; None if there is none.

    Places with values of equal size are mostly of one bucket: the differences of their mixed bits are multiples of the
    number of buckets if the key is right, and of nothing if it is wrong.
    """
    sample = np.flatnonzero(values)
    sample = sample[:: max(1, len(sample) // _SAMPLE)].astype(np.uint32)
    sizes = values[sample] & np.uint32(_TOP_BIT - 1)
    order = np.argsort(sizes, kind="stable")
    equal = np.flatnonzero(np.diff(sizes[order]) == 0)
    if len(equal) < _FEWEST_PAIRS:
        return None
    pairs = np.stack([sample[order[equal]], sample[order[equal + 1]]])
    # Drawn several times where there are few.
    drawn = pairs[:, np.random.default_rng(0).integers(len(equal), size=(3, _TRIPLES))]
    divisors = np.gcd.reduce(_differences(drawn, np.arange(KEYS).reshape(-1, 1, 1)), axis=1)
    found, times = np.unique(divisors | np.arange(KEYS)[:, None] << 32, return_counts=True)
    best = int(np.argmax(times * np.log2(np.maximum(found % (1 << 32), 1))))
    key, divisor = divmod(int(found[best]), 1 << 32)
    # By chance a multiple comes once in so many times.
    share = float(np.mean(_differences(pairs, np.array(key)) % max(divisor, 1) == 0))
    return Hash(key, divisor) if divisor > 1 and share > (1 + 1 / divisor) / 2 else None


def _differences(pairs: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return what the mixed bits of the places uint32 [2, ...] differ by, under each key."""
    first, second = (_mixed(places * _PLACES + keys.astype(np.uint32) * np.uint32(_KEYS)) for places in pairs)
    return first.astype(np.int64) - second


def _mixed(bits: np.ndarray) -> np.ndarray:
    """Return the bits uint32 [...], each changed by each."""
    bits = (bits ^ bits >> np.uint32(16)) * _FIRST
    bits = (bits ^ bits >> np.uint32(13)) * _SECOND
    return np.asarray(bits ^ bits >> np.uint32(16))
