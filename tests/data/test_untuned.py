"""Datasets whose reader may stop without waiting for the tuner."""

from __future__ import annotations

import time

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.batches import training_batches
from compress.data.source import Augmentation, Split
from compress.data.untuned import in_batches, untuned


@given(count=st.integers(1, 20), size=st.integers(1, 25))
@settings(deadline=None, max_examples=20)
def test_batches_are_the_samples_in_their_order(count, size):
    samples = np.arange(3 * count, dtype=np.uint8).reshape(count, 3)
    batches = [np.asarray(batch) for batch in in_batches(samples, size)]
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    np.testing.assert_array_equal(np.concatenate(batches), samples)


@pytest.mark.parametrize(
    ("kind", "expected"), [("uint8", "uint8"), ("int64", "int64"), ("float64", "float32"), ("float16", "float32")]
)
def test_numbers_are_of_the_kind_that_keras_makes_of_arrays(kind, expected):
    assert in_batches(np.ones((4, 2), kind), 2).element_spec.dtype == expected


def test_a_training_is_read_without_the_tuner():
    part = Split(np.zeros((20, 3), np.uint8), np.zeros(20, np.int64))
    for parts in (None, np.arange(4)[None]):
        batches = training_batches(part, 4, 5, 0, Augmentation(), parts=parts)
        assert batches.options().autotune.enabled is False


def test_whoever_stops_reading_goes_on_at_once():
    """After a second and a half of reading, the tuner would sleep for another one."""
    endless = tf.data.Dataset.range(10**9).map(lambda number: number + 1, num_parallel_calls=2).prefetch(4)
    reader = iter(untuned(endless))
    started = time.perf_counter()
    while time.perf_counter() - started < 1.5:
        next(reader)
        time.sleep(0.01)
    stopped = time.perf_counter()
    del reader
    assert time.perf_counter() - stopped < 0.5
