"""What a training reads: batches that are a function of the seed and the step; augmented, and mixed."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from compress.data.source import Augmentation, Split


def training_batches(
    split: Split, batch_size: int, steps: int, seed: int, augmentation: Augmentation, start: int = 0
) -> tf.data.Dataset:
    """Return ``steps`` batches ``(inputs float32 [b, ...], labels [b], indices [b])``, shuffled anew each epoch.

    Batches are full: one may hold the end of an epoch and the start of the next. (A batch of a few samples would
    spoil the statistics of batch norms.) A function of the seed alone: samples are gathered a batch at a time, and
    random numbers are stateless. ``start``: the first so many batches are left out.
    """
    x, y = tf.constant(split.x), tf.constant(split.y)
    count = len(split)

    def indices_of(epoch: tf.Tensor) -> tf.data.Dataset:
        order = tf.random.experimental.stateless_shuffle(
            tf.range(count, dtype=tf.int64), seed=tf.stack([tf.constant(seed, tf.int64), epoch])
        )
        return tf.data.Dataset.from_tensor_slices(order)

    def load(step: tf.Tensor, indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        images = tf.cast(tf.gather(x, indices), tf.float32)
        if augmentation:
            images = augment(images, augmentation, tf.stack([tf.constant(seed, tf.int64), step + 1]))
        return images, tf.gather(y, indices), indices

    epochs = int(np.ceil(steps * batch_size / count))
    indices = tf.data.Dataset.range(epochs).flat_map(indices_of)
    batches = indices.batch(batch_size, drop_remainder=True).take(steps).enumerate().skip(start)
    return batches.map(load, num_parallel_calls=2, deterministic=True).prefetch(4)


def augment(images: tf.Tensor, augmentation: Augmentation, seed: tf.Tensor) -> tf.Tensor:
    """Shift [b, h, w, c] or [b, h, w] images with zero padding and mirror half of them, each by its own draw."""
    if images.shape.rank == 3:
        return augment(images[..., None], augmentation, seed)[..., 0]
    if augmentation.shift:
        shape = tf.shape(images)
        pad = augmentation.shift
        padded = tf.pad(images, [[0, 0], [pad, pad], [pad, pad], [0, 0]])
        offsets = tf.random.stateless_uniform([2, shape[0], 1], seed, 0, 2 * pad + 1, tf.int32)
        rows = offsets[0] + tf.range(shape[1])[None]
        columns = offsets[1] + tf.range(shape[2])[None]
        images = tf.gather(padded, rows, axis=1, batch_dims=1)
        images = tf.gather(images, columns, axis=2, batch_dims=1)
    if augmentation.mirror:
        coins = tf.random.stateless_uniform([tf.shape(images)[0], 1, 1, 1], seed + 1) < 0.5
        images = tf.where(coins, images[:, :, ::-1], images)
    return images


def mix(samples: tf.Tensor, share: float, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Mix the first ``share`` of the samples [b, ...] with their partners, the same samples in reverse order.

    Source: mixup (Zhang et al., arXiv 1710.09412) with evenly drawn ratios.

    Returns:
        The samples, and the part [b] of each that is its own; 1 where nothing was mixed.
    """
    count = tf.shape(samples)[0]
    drawn = tf.random.stateless_uniform([count], seed)
    ratio = tf.where(tf.range(count) < tf.cast(tf.math.ceil(share * tf.cast(count, tf.float32)), tf.int32), drawn, 1.0)
    own = tf.reshape(ratio, [-1, *[1] * (samples.shape.rank - 1)])
    return own * samples + (1.0 - own) * samples[::-1], ratio
