"""Arrays into bytes and back: bit by bit the same, whatever they hold, by whichever coder."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compress.deploy.coding import huffman
from compress.deploy.coding.draft import Tables
from compress.deploy.coding.frequencies import Frequencies
from compress.deploy.coding.positions import POSITIONS
from compress.deploy.coding.symbols import (
    CODERS,
    Ans,
    Deflate,
    FixedWidth,
    Huffman,
    SymbolCoder,
    draft_symbols,
    read_symbols,
)
from compress.deploy.coding.tensors import FORMS, GridLevels, Shape, draft_array, read_array
from compress.deploy.coding.wire import DamagedError, Reader, pack_bits, unpack_bits, varint
from compress.deploy.packing import CODER_CHOICES

DTYPES = [*["?", "b", "B", "h", "H", "i", "I", "l", "L"], "e", "f", "d", "F"]


def bits_of(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.name, array.shape, array.tobytes()


def there_and_back(array: np.ndarray, coder: str = "ans") -> np.ndarray:
    draft = draft_array(array, Tables(), CODER_CHOICES[coder])
    content = draft.write()
    reader = Reader(content)
    back, tables = read_array(reader, array.dtype, array.shape, Tables())
    reader.finish()
    for read, written in zip(tables.known, draft.tables.known, strict=True):
        np.testing.assert_array_equal(read.parts, written.parts)
    return back


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Any bits at all, or what networks have: few values, many zeros, multiples of a step."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=12))
    count = math.prod(shape)
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    kind = draw(st.sampled_from(["bits", "few", "sparse", "constant", "zeros", "grid", "vectors"]))
    anything = np.frombuffer(rng.bytes(count * dtype.itemsize), dtype).reshape(shape).copy()
    if dtype.kind == "b":
        anything = rng.integers(0, 2, shape).astype(bool)
    if kind == "few" and count:
        anything = rng.choice(anything.reshape(-1)[:5], shape)
    elif kind == "sparse":
        anything[rng.random(shape) < draw(st.floats(0.5, 1))] = 0
    elif kind == "vectors" and count:
        anything = rng.choice(anything.reshape(-1, shape[-1] if shape else 1)[:3], count // (shape or (1,))[-1])
        anything = anything.reshape(shape)
    elif kind == "constant" and count:
        anything[...] = anything.reshape(-1)[0]
    elif kind == "zeros":
        anything[...] = 0
    elif kind == "grid":
        with np.errstate(all="ignore"):
            anything = (rng.integers(-8, 8, shape) * rng.normal(size=shape[-1:])).astype(dtype).reshape(shape)
    return anything


@settings(deadline=None, max_examples=60)
@given(arrays(), st.sampled_from(sorted(CODER_CHOICES)))
def test_every_array_comes_back_bit_by_bit(array: np.ndarray, coder: str) -> None:
    assert bits_of(there_and_back(array, coder)) == bits_of(array)


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(max_dims=3, max_side=8),
        elements=st.sampled_from([0.0, -0.0, 1e-45, -1e-40, math.inf, -math.inf, math.nan, 1.0, 3.4e38]),
    )
)
def test_odd_floats_survive(array: np.ndarray) -> None:
    assert bits_of(there_and_back(array)) == bits_of(array)


def test_the_payload_of_a_nan_survives() -> None:
    array = np.array([0x7FC00001, 0x7F800001, 0xFFC12345, 0], np.uint32).view(np.float32)
    assert bits_of(there_and_back(array)) == bits_of(array)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: type(form).__name__)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_each_form_alone(form: object, data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 30), st.integers(1, 6)))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    steps = rng.uniform(0.5, 2, shape[1]).astype(np.float32)
    array = rng.integers(-3, 4, shape).astype(np.float32) * steps
    array[rng.random(shape) < 0.7] = 0
    values = array.reshape(-1).view(np.uint32)
    draft = form.draft(values, Shape.of(array.shape, array.dtype), Tables(), CODERS)  # type: ignore[attr-defined]
    if draft is None:
        return
    content = draft.write()
    assert len(content) == pytest.approx(draft.size, rel=0.1, abs=12)
    reader = Reader(content)
    shaped = Shape.of(array.shape, array.dtype)
    back, _ = form.decode(reader, np.dtype(np.uint32), shaped, Tables())  # type: ignore[attr-defined]
    reader.finish()
    np.testing.assert_array_equal(back, values)


@pytest.mark.parametrize("lowest", [-127, -64, -4, -3])
@pytest.mark.parametrize("coder", sorted(CODER_CHOICES))
def test_a_grid_with_negative_zeros(lowest: int, coder: str) -> None:
    """Whether or not the lowest level of its bits is in use, which else stands for the negative zero."""
    rng = np.random.default_rng(0)
    array = rng.integers(lowest, -lowest, (400, 6)).astype(np.float32) * np.float32(0.37)
    array[0] = 0.37
    array[rng.random(array.shape) < 0.1] = -0.0
    draft = draft_array(array, Tables(), CODER_CHOICES[coder])
    assert draft.write()[0] == next(form.code for form in FORMS if isinstance(form, GridLevels))
    assert bits_of(there_and_back(array, coder)) == bits_of(array)


@pytest.mark.parametrize("way", POSITIONS, ids=lambda way: type(way).__name__)
@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_each_way_to_write_positions(way: object, rows: int, columns: int, share: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random((rows, columns)) < share
    mask[-1, -1] = True
    places = np.flatnonzero(mask)
    for draft, stored in way.drafts(places, rows, columns, Tables(), CODERS):  # type: ignore[attr-defined]
        assert set(places) <= set(stored), "fillers only add entries"
        back, _ = way.decode(Reader(draft.write()), rows, columns, Tables())  # type: ignore[attr-defined]
        np.testing.assert_array_equal(back, stored)


@pytest.mark.parametrize(
    ("coder", "alphabets"),
    [(FixedWidth(), (2, 300)), (Huffman(), (257, 300)), (Deflate(), (2, 256)), (Ans(), (2, 300))],
    ids=lambda value: "" if isinstance(value, tuple) else type(value).__name__,
)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_each_coder(coder: SymbolCoder, alphabets: tuple[int, int], data: st.DataObject) -> None:
    alphabet = data.draw(st.integers(*alphabets))
    symbols = data.draw(hnp.arrays(np.int64, st.integers(1, 1500), elements=st.integers(0, alphabet - 1)))
    counts = np.bincount(symbols, minlength=alphabet)
    draft = coder.draft(symbols, counts, Tables())
    assert draft is not None
    reader = Reader(draft.write())
    back, _ = coder.decode(reader, alphabet, len(symbols), Tables())
    reader.finish()
    np.testing.assert_array_equal(back, symbols)


@settings(deadline=None, max_examples=60)
@given(
    groups=st.integers(1, 30),
    columns=st.integers(1, 9),
    length=st.integers(2, 32),
    known=st.integers(1, 12),
    down=st.booleans(),
    dtype=st.sampled_from(["b", "e", "f", "d"]),
)
def test_vectors_that_repeat_are_found(
    groups: int, columns: int, length: int, known: int, down: bool, dtype: str
) -> None:
    rng = np.random.default_rng(groups)
    book = rng.integers(-100, 100, (known, length)).astype(dtype)
    chosen = book[rng.integers(0, known, (groups, columns))]
    array = chosen.transpose(0, 2, 1) if down else chosen
    array = np.ascontiguousarray(array).reshape(groups * length, columns)
    assert bits_of(there_and_back(array)) == bits_of(array)
    size = draft_array(array, Tables(), CODER_CHOICES["ans"]).size
    # Where few repeat, to say so may take more than it saves.
    assert size <= array.nbytes + 4
    if groups * columns >= 4 * known:
        # The vectors themselves, as many bits for each as their number needs, and a few bytes to say so.
        assert size <= book.nbytes + -(-groups * columns * (known - 1).bit_length() // 8) + 12


@pytest.mark.parametrize(
    "content",
    [
        bytes([5, 0, 1]),
        bytes([5, 1, 1]),
        bytes([5, 33, 1]),
        bytes([5, 128 | 5, 1]),
        bytes([5, 4, 0]),
        bytes([5, 4, 4]),
        bytes([5, 4, 1, 4]),
        bytes([5, 4, 2, 2, 1]) + bytes(4) + bytes([0]),
    ],
    ids=["0", "1", "33", "unfit", "none", "too many", "a form that cannot stand there", "a short stream"],
)
def test_vectors_that_cannot_be_are_refused(content: bytes) -> None:
    with pytest.raises(DamagedError):
        read_array(Reader(content), np.dtype(np.float32), (4, 3), Tables())


def test_streams_take_hardly_more_than_their_entropy() -> None:
    rng = np.random.default_rng(0)
    shares = 0.5 ** np.arange(1, 33)
    symbols = rng.choice(32, 100_000, p=shares / shares.sum())
    counts = np.bincount(symbols, minlength=32)
    used = counts[counts > 0] / counts.sum()
    entropy = -(used * np.log2(used)).sum() * len(symbols) / 8
    large = np.pad(counts, (0, 300 - 32))
    for coder, known, most in ((Ans(), counts, 1.005), (Deflate(), counts, 1.02), (Huffman(), large, 1.02)):
        draft = coder.draft(symbols, known, Tables())
        assert draft is not None
        assert entropy <= len(draft.write()) <= most * entropy + (40 if known is counts else 180)


@pytest.mark.parametrize("coder", ["huffman", "ans", "smallest"])
def test_bytes_that_no_code_makes_fewer_are_written_as_they_are(coder: str) -> None:
    symbols = np.random.default_rng(0).integers(0, 255, 20_000)
    content = draft_symbols(symbols, 256, Tables(), CODER_CHOICES[coder]).write()
    assert content == bytes([FixedWidth.code]) + symbols.astype(np.uint8).tobytes()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 30), st.integers(0, 30), st.binary(max_size=3))
def test_a_deflate_stream_of_another_length_is_refused(written: int, asked: int, behind: bytes) -> None:
    draft = Deflate().draft(np.zeros(written, np.int64), np.array([written, 0]), Tables())
    assert draft is not None
    content = draft.write()[1:] + behind
    reader = Reader(varint(len(content)) + content)
    if written == asked and not behind:
        assert not Deflate().decode(reader, 2, asked, Tables())[0].any()
    else:
        with pytest.raises(DamagedError):
            Deflate().decode(reader, 2, asked, Tables())


def test_a_later_stream_uses_the_table_of_an_earlier_one() -> None:
    rng = np.random.default_rng(0)
    shares = 0.97 ** np.arange(200)
    symbols = rng.choice(200, 2_000, p=shares / shares.sum())
    first = draft_symbols(symbols, 200, Tables(), (FixedWidth(), Ans()))
    again = draft_symbols(symbols, 200, first.tables, (FixedWidth(), Ans()))
    assert len(again.write()) < len(first.write()) - 100
    reader = Reader(first.write() + again.write())
    tables = Tables()
    for _ in range(2):
        back, tables = read_symbols(reader, 200, len(symbols), tables)
        np.testing.assert_array_equal(back, symbols)


def test_more_values_than_a_frequency_table_holds_are_written_all_the_same() -> None:
    array = np.random.default_rng(0).permutation(np.tile(np.arange(40_000, dtype=np.uint32), 4))
    assert bits_of(there_and_back(array)) == bits_of(array)


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.int64, st.integers(2, 60), elements=st.integers(0, 10**6)))
def test_huffman_codes_are_prefix_free_and_short(counts: np.ndarray) -> None:
    counts[:2] += 1
    lengths = huffman.code_lengths(counts)
    used = lengths[lengths > 0]
    assert ((lengths > 0) == (counts > 0)).all()
    assert used.max() <= 15
    assert sum(0.5 ** int(length) for length in used) == 1, "a full binary tree"
    codes = huffman.canonical_codes(lengths)
    words = [f"{code:0{length}b}" for code, length in zip(codes, lengths, strict=True) if length]
    assert not any(a != b and b.startswith(a) for a in words for b in words)
    shares = counts[counts > 0] / counts.sum()
    entropy = -(shares * np.log2(shares)).sum()
    if used.max() < 15:
        assert entropy <= (shares * used).sum() < entropy + 1


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.int64, st.integers(2, 400), elements=st.integers(0, 10**9)))
def test_frequency_tables_are_whole(counts: np.ndarray) -> None:
    counts[0] += 1
    table = Frequencies.fitted(counts)
    assert table.parts.sum() == 2**table.precision
    assert ((table.parts > 0) == (counts > 0)).all()
    back = Frequencies.read(Reader(table.to_bytes()), len(counts))
    np.testing.assert_array_equal(back.parts, table.parts)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 32), st.integers(0, 100), st.integers(0, 9))
def test_bits_without_gaps(width: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**width, count).astype(np.uint32)
    content = pack_bits(values, width)
    assert len(content) == -(-count * width // 8)
    text = "".join(f"{value:0{width}b}" for value in values) if width else ""
    assert content == int(text.ljust(8 * len(content), "0") or "0", 2).to_bytes(len(content), "big")
    np.testing.assert_array_equal(unpack_bits(content, width, count), values)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**63 - 1))
def test_varints(value: int) -> None:
    assert Reader(varint(value)).varint() == value


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=200), st.sampled_from(DTYPES), st.integers(0, 40), st.integers(0, 9))
def test_bytes_of_nobodys_are_refused_or_read_never_a_crash(content: bytes, dtype: str, rows: int, cols: int) -> None:
    try:
        array, _ = read_array(Reader(content), np.dtype(dtype), (rows, cols), Tables())
    except DamagedError:
        return
    assert array.shape == (rows, cols)
