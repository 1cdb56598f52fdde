"""Maps made smaller: each pixel counts once in an average, and none is lost to a maximum."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.strategies.distillation.pooling import average_pool, max_pool

SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))


def drawn(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(size).normal(size=(2, *size, 3)).astype(np.float32)


@given(old=SIZES, new=SIZES)
@settings(deadline=None, max_examples=25)
def test_averages_are_those_of_the_areas(old, new):
    new = (min(old[0], new[0]), min(old[1], new[1]))
    maps = drawn(old)[..., 0]
    # In pixels so fine that each belongs to one old and to one new pixel.
    fine = maps.repeat(new[0], 1).repeat(new[1], 2)
    expected = fine.reshape(2, new[0], old[0], new[1], old[1]).mean((2, 4))
    np.testing.assert_allclose(average_pool(tf.constant(maps), new), expected, atol=1e-5)


@given(old=SIZES, new=SIZES)
@settings(deadline=None, max_examples=25)
def test_maxima_have_the_size_and_miss_nothing(old, new):
    new = (min(old[0], new[0]), min(old[1], new[1]))
    maps = drawn(old)
    found = np.asarray(max_pool(tf.constant(maps), new))
    assert found.shape == (2, *new, 3)
    np.testing.assert_array_equal(found.max((1, 2)), maps.max((1, 2)))


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_a_whole_factor_takes_blocks(factor):
    maps = drawn((4 * factor, 2 * factor))
    blocks = maps.reshape(2, 4, factor, 2, factor, 3)
    np.testing.assert_array_equal(max_pool(tf.constant(maps), (4, 2)), blocks.max((2, 4)))
