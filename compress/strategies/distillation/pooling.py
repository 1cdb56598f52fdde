"""Maps of one size made smaller, so that they can be compared with those of another."""

from __future__ import annotations

import numpy as np
import tensorflow as tf


def average_pool(maps: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """Return maps [b, h, w] averaged to a smaller size; each new pixel is the mean of the area that it covers."""
    rows, columns = (_areas(int(old), new) for old, new in zip(maps.shape[1:], size, strict=True))
    return tf.einsum("ih,bhw,jw->bij", tf.constant(rows), maps, tf.constant(columns))


def max_pool(maps: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """Return the largest values of maps [b, h, w, c] in windows that give a smaller size."""
    old = [int(length) for length in maps.shape[1:3]]
    strides = [length // new for length, new in zip(old, size, strict=True)]
    windows = [length - (new - 1) * stride for length, new, stride in zip(old, size, strides, strict=True)]
    return tf.nn.max_pool2d(maps, windows, strides, "VALID")


def _areas(old: int, new: int) -> np.ndarray:
    """Return [new, old]: which share of each new place every old one is."""
    edges = np.arange(new + 1) * old / new
    places = np.arange(old)
    overlap = np.minimum(edges[1:, None], places + 1) - np.maximum(edges[:-1, None], places)
    return (np.maximum(overlap, 0.0) * new / old).astype(np.float32)
