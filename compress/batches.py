"""What a training reads: batches that are a function of the seed and the step; augmented, and mixed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from compress.data.source import Augmentation, Split
from compress.data.untuned import untuned


@dataclass(frozen=True)
class Part:
    """The rows ``own`` [n] of a batch of ``whole`` samples. Random numbers are drawn for all, so that each has its own.

    Row ``whole`` - 1 - i is there if row i is, in the order that has them change places when the part is reversed.
    """

    whole: int
    own: tf.Tensor

    def of(self, draws: tf.Tensor, axis: int = 0) -> tf.Tensor:
        """Return the part's own of the numbers drawn for the batch."""
        return tf.gather(draws, self.own, axis=axis)


def training_batches(
    split: Split,
    batch_size: int,
    steps: int,
    seed: int,
    augmentation: Augmentation,
    start: int = 0,
    parts: np.ndarray | None = None,
) -> tf.data.Dataset:
    """Return ``steps`` batches ``(inputs float32 [b, ...], labels [b], indices [b])``, shuffled anew each epoch.

    Batches are full: one may hold the end of an epoch and the start of the next. (A batch of a few samples would
    spoil the statistics of batch norms.) A function of the seed alone: samples are gathered a batch at a time, and
    random numbers are stateless. ``start``: the first so many batches are left out. ``parts`` [n, rows]; of each
    batch only these are there, one part after the other.
    """
    x, y = tf.constant(split.x), tf.constant(split.y)
    count = len(split)

    def indices_of(epoch: tf.Tensor) -> tf.data.Dataset:
        order = tf.random.experimental.stateless_shuffle(
            tf.range(count, dtype=tf.int64), seed=tf.stack([tf.constant(seed, tf.int64), epoch])
        )
        return tf.data.Dataset.from_tensor_slices(order)

    def load(step: tf.Tensor, indices: tf.Tensor, part: Part | None = None) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        images = tf.cast(tf.gather(x, indices), tf.float32)
        if augmentation:
            images = augment(images, augmentation, tf.stack([tf.constant(seed, tf.int64), step + 1]), part)
        return images, tf.gather(y, indices), indices

    epochs = int(np.ceil(steps * batch_size / count))
    indices = tf.data.Dataset.range(epochs).flat_map(indices_of)
    batches = indices.batch(batch_size, drop_remainder=True).take(steps).enumerate().skip(start)
    if parts is not None:
        rows = tf.data.Dataset.from_tensor_slices(parts)
        each = batches.flat_map(lambda step, indices: rows.map(lambda own: (step, tf.gather(indices, own), own)))
        loaded = each.map(
            lambda step, indices, own: load(step, indices, Part(batch_size, own)),
            num_parallel_calls=2,
            deterministic=True,
        )
    else:
        loaded = batches.map(load, num_parallel_calls=2, deterministic=True)
    return untuned(loaded.prefetch(4))


def augment(images: tf.Tensor, augmentation: Augmentation, seed: tf.Tensor, part: Part | None = None) -> tf.Tensor:
    """Shift [b, h, w, c] or [b, h, w] images with zero padding and mirror half of them, each by its own draw.

    ``part``: of the batch, if these are not all of its images.
    """
    if images.shape.rank == 3:
        return augment(images[..., None], augmentation, seed, part)[..., 0]
    count = tf.shape(images)[0] if part is None else part.whole
    if augmentation.shift:
        shape = tf.shape(images)
        pad = augmentation.shift
        padded = tf.pad(images, [[0, 0], [pad, pad], [pad, pad], [0, 0]])
        offsets = tf.random.stateless_uniform([2, count, 1], seed, 0, 2 * pad + 1, tf.int32)
        if part is not None:
            offsets = part.of(offsets, axis=1)
        rows = offsets[0] + tf.range(shape[1])[None]
        columns = offsets[1] + tf.range(shape[2])[None]
        images = tf.gather(padded, rows, axis=1, batch_dims=1)
        images = tf.gather(images, columns, axis=2, batch_dims=1)
    if augmentation.mirror:
        coins = tf.random.stateless_uniform([count, 1, 1, 1], seed + 1) < 0.5
        if part is not None:
            coins = part.of(coins)
        images = tf.where(coins, images[:, :, ::-1], images)
    return images


def mix(samples: tf.Tensor, share: float, seed: tf.Tensor, part: Part | None = None) -> tuple[tf.Tensor, tf.Tensor]:
    """Mix the first ``share`` of the samples [b, ...] with their partners, the same samples in reverse order.

    Source: mixup (Zhang et al., arXiv 1710.09412) with evenly drawn ratios.

    ``part``: of the batch, if these are not all of its samples.

    Returns:
        The samples, and the part [b] of each that is its own; 1 where nothing was mixed.
    """
    count = tf.shape(samples)[0] if part is None else part.whole
    drawn = tf.random.stateless_uniform([count], seed)
    ratio = tf.where(tf.range(count) < tf.cast(tf.math.ceil(share * tf.cast(count, tf.float32)), tf.int32), drawn, 1.0)
    if part is not None:
        ratio = part.of(ratio)
    own = tf.reshape(ratio, [-1, *[1] * (samples.shape.rank - 1)])
    return own * samples + (1.0 - own) * samples[::-1], ratio
