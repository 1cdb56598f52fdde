"""Kernels of transferred filters in the packed file: the numbers of the meta filters alone, bit by bit the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.candidate import Transfer
from compress.deploy.coding.draft import Tables
from compress.deploy.coding.tensors import Raw, Transferred, draft_array, read_array
from compress.deploy.coding.transfers import labels_of, numbers_of, transformations
from compress.deploy.coding.wire import DamagedError, Reader, varint
from compress.deploy.packed import Packed, read_packed, write_packed
from compress.deploy.packing import CODER_CHOICES
from tests.deploy.independent_reader import read_file

SHAPES = st.one_of(
    st.tuples(st.just("translation"), st.integers(2, 3), st.tuples(st.integers(1, 3), *[st.integers(2, 3)] * 2)),
    st.tuples(st.just("rotation"), st.sampled_from([2, 4, 8]), st.sampled_from([(2, 2, 3), (3, 3, 2), (4, 4, 1)])),
    st.tuples(st.just("circulant"), st.sampled_from([2, 3]), st.sampled_from([(1, 2, 6), (3, 3, 6)])),
)


@st.composite
def kernels(draw: st.DrawFn) -> tuple[Transfer, np.ndarray]:
    """A kernel of transferred filters, as Keras has it or with the filters first, of any type."""
    transform, size, shape = draw(SHAPES)
    transfer = Transfer(transform, size, shape)
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    group = transformations(transfer)
    metas = draw(st.integers(1, 3))
    filters = draw(st.integers(group, group * metas)) if metas * numbers_of(transfer) <= group * math.prod(shape) else 0
    filters = filters or max(group, -(-metas * numbers_of(transfer) // math.prod(shape)))
    slots = rng.integers(0, metas * group, filters)
    transfer = Transfer(transform, size, shape, tuple(map(int, slots)))
    dtype = draw(st.sampled_from([np.float32, np.float16, np.int8]))
    numbers = (20 * rng.normal(size=metas * numbers_of(transfer))).astype(dtype)
    kernel = numbers[labels_of(transfer)]
    if draw(st.booleans()):
        kernel = np.ascontiguousarray(np.moveaxis(kernel, -1, 0))
    return transfer, kernel


@given(made=kernels(), coder=st.sampled_from(sorted(CODER_CHOICES)))
@settings(deadline=None, max_examples=60)
def test_a_kernel_comes_back_and_another_program_reads_it(made: tuple[Transfer, np.ndarray], coder: str) -> None:
    transfer, kernel = made
    # Beside it one that it does not fit: raw numbers are the only other form here.
    other = np.random.default_rng(0).normal(size=kernel.shape).astype(kernel.dtype)
    forms = (Raw(), Transferred((transfer,)))
    content = write_packed(Packed("keras", {"kernel": kernel, "other": other}), CODER_CHOICES[coder], forms)
    arrays = read_packed(content, "model.cmp").arrays
    for name, array in {"kernel": kernel, "other": other}.items():
        assert arrays[name].tobytes() == array.tobytes()
        assert read_file(content)[2][name][2] == array.tobytes()


@pytest.mark.parametrize(
    ("transform", "size", "left"), [("translation", 2, 16 / 36), ("rotation", 8, 1 / 8), ("circulant", 4, 1 / 4)]
)
def test_it_holds_the_free_numbers_alone(transform: str, size: int, left: float) -> None:
    transfer = Transfer(transform, size, (3, 3, 32))
    rng = np.random.default_rng(0)
    transfer = Transfer(transform, size, (3, 3, 32), tuple(map(int, rng.permutation(64))))
    metas = 64 // transformations(transfer)
    kernel = rng.normal(size=metas * numbers_of(transfer)).astype(np.float32)[labels_of(transfer)]
    draft = draft_array(kernel, Tables(), CODER_CHOICES["ans"], (Raw(), Transferred((transfer,))))
    assert len(draft.write()) <= left * kernel.nbytes + 64 + 16


@pytest.mark.parametrize(
    "head",
    [
        bytes([3]) + b"".join(map(varint, (2, 3, 3, 4, 1))),
        bytes([0]) + b"".join(map(varint, (1, 3, 3, 4, 1))),
        bytes([0]) + b"".join(map(varint, (2, 3, 3, 5, 1))),
        bytes([0]) + b"".join(map(varint, (2, 3, 0, 4, 1))),
        bytes([0]) + b"".join(map(varint, (2, 3, 3, 4, 0))),
        bytes([0]) + b"".join(map(varint, (2, 3, 3, 4, 5))),
        bytes([0]) + b"".join(map(varint, (9, 3, 3, 4, 1))),
        bytes([1]) + b"".join(map(varint, (3, 3, 3, 4, 1))),
        bytes([1]) + b"".join(map(varint, (4, 1, 9, 4, 1))),
        bytes([2]) + b"".join(map(varint, (3, 3, 3, 4, 1))),
    ],
    ids=[
        *("kind", "one shift", "channels", "no width", "no meta filter", "too many meta filters", "too many shifts"),
        *("three turns", "not square", "no multiple"),
    ],
)
def test_heads_that_cannot_be_are_refused(head: bytes) -> None:
    with pytest.raises(DamagedError):
        read_array(Reader(bytes([Transferred.code]) + head + bytes(200)), np.dtype(np.float32), (3, 3, 4, 8), Tables())
