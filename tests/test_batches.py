"""What the training loop reads: batches in an order that the seed decides, augmented and mixed."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.batches import augment, mix, training_batches
from compress.data.source import Augmentation, Split

PLAIN = Augmentation()


def split(count: int, shape: tuple[int, ...] = (3,), classes: int = 3) -> Split:
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (count, *shape)).astype(np.uint8), rng.integers(0, classes, count))


def batches(part: Split, size: int, steps: int, seed: int = 0, augmentation: Augmentation = PLAIN) -> list:
    return [tuple(np.asarray(t) for t in b) for b in training_batches(part, size, steps, seed, augmentation)]


@given(count=st.integers(1, 40), size=st.integers(1, 15), seed=st.integers(0, 2**28))
@settings(deadline=None, max_examples=15)
def test_every_epoch_covers_every_sample_once(count, size, seed):
    part = split(count)
    steps = -(-2 * count // size)
    seen = batches(part, size, steps, seed)
    assert [len(labels) for _, labels, _ in seen] == [size] * steps
    order = np.concatenate([indices for *_, indices in seen])
    for epoch in (order[:count], order[count : 2 * count]):
        assert sorted(epoch) == list(range(count))
    for inputs, labels, indices in seen:
        assert inputs.dtype == np.float32
        np.testing.assert_array_equal(inputs, part.x[indices])
        np.testing.assert_array_equal(labels, part.y[indices])


def test_the_order_is_a_function_of_the_seed_and_new_in_each_epoch():
    part = split(50)
    first, again, other = (np.concatenate([b[2] for b in batches(part, 8, 14, seed)]) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first[:50] != first[50:100]).any()
    assert (first[:50] != np.arange(50)).any()


def test_fewer_steps_than_an_epoch_are_the_first_ones():
    part = split(50)
    for short, long in zip(batches(part, 8, 3), batches(part, 8, 7), strict=False):
        np.testing.assert_array_equal(short[2], long[2])
    assert len(batches(part, 8, 3)) == 3


def test_augmentation_is_a_function_of_the_seed_and_differs_from_epoch_to_epoch():
    part, moved = split(16, (6, 6, 1)), Augmentation(shift=2, mirror=True)
    first, again = (batches(part, 16, 2, 3, moved) for _ in range(2))
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one[0], two[0])
    by_sample = [inputs[np.argsort(indices)] for inputs, _, indices in first]
    assert (by_sample[0] != by_sample[1]).any()
    assert (by_sample[0] != part.x).any()


def seed_tensor(seed: int) -> tf.Tensor:
    return tf.constant([seed, 1], tf.int64)


def shifted(image: np.ndarray, down: int, right: int, most: int) -> np.ndarray:
    padded = np.pad(image, [(most, most), (most, most), (0, 0)])
    return padded[most + down :, most + right :][: image.shape[0], : image.shape[1]]


# One to nine: no zeros, so that padding is told from pixels; not square, so that the axes are told apart.
IMAGES = np.random.default_rng(0).integers(1, 10, (64, 5, 7, 2)).astype(np.float32)


def test_images_without_a_channel_axis_are_augmented_like_those_with_one():
    grey, moved = IMAGES[..., :1], Augmentation(shift=2, mirror=True)
    expected = np.asarray(augment(tf.constant(grey), moved, seed_tensor(1)))
    np.testing.assert_array_equal(augment(tf.constant(grey[..., 0]), moved, seed_tensor(1)), expected[..., 0])


def test_no_augmentation_changes_nothing():
    assert not PLAIN
    np.testing.assert_array_equal(augment(tf.constant(IMAGES), PLAIN, seed_tensor(0)), IMAGES)


@pytest.mark.parametrize("most", [1, 3])
def test_shifts_are_shifts_with_zero_padding_in_all_directions(most):
    result = np.asarray(augment(tf.constant(IMAGES), Augmentation(shift=most), seed_tensor(1)))
    assert result.shape == IMAGES.shape
    places = range(-most, most + 1)
    found = []
    for image, changed in zip(IMAGES, result, strict=True):
        fits = [(d, r) for d in places for r in places if np.array_equal(changed, shifted(image, d, r, most))]
        assert len(fits) == 1
        found += fits
    assert {down for down, _ in found} == {right for _, right in found} == set(places)
    assert len(set(found)) > (2 * most + 1), "rows and columns are drawn apart"


def test_about_half_of_the_images_are_mirrored():
    result = np.asarray(augment(tf.constant(IMAGES), Augmentation(mirror=True), seed_tensor(2)))
    mirrored = (result == IMAGES[:, :, ::-1]).all(axis=(1, 2, 3))
    same = (result == IMAGES).all(axis=(1, 2, 3))
    assert (mirrored ^ same).all()
    # 64 fair coins give fewer than 16 heads, or more than 48, once in 30,000 times.
    assert 16 <= mirrored.sum() <= 48


def test_shift_and_mirror_together():
    result = np.asarray(augment(tf.constant(IMAGES), Augmentation(shift=1, mirror=True), seed_tensor(3)))
    kinds = set()
    for image, changed in zip(IMAGES, result, strict=True):
        options = {(d, r): shifted(image, d, r, 1) for d in (-1, 0, 1) for r in (-1, 0, 1)}
        fits = [m for o in options.values() for m, v in ((False, o), (True, o[:, ::-1])) if np.array_equal(changed, v)]
        assert fits
        kinds |= set(fits)
    assert kinds == {False, True}


@given(count=st.integers(1, 9), share=st.just(0.0) | st.floats(1e-3, 1), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_the_first_samples_are_mixed_with_the_last_ones(count, share, seed):
    samples = np.random.default_rng(seed).normal(size=(count, 2, 3)).astype(np.float32)
    mixed, ratio = (t.numpy() for t in mix(tf.constant(samples), share, tf.constant([seed, 0])))
    touched = np.arange(count) < np.ceil(np.float32(share) * np.float32(count))
    assert np.all((ratio >= 0) & (ratio <= 1))
    assert np.all(ratio[~touched] == 1)
    assert not np.any(ratio[touched] == 1)
    partners = np.flip(samples, axis=0)
    np.testing.assert_allclose(mixed, partners + ratio[:, None, None] * (samples - partners), atol=1e-5)
