"""Transferred filters: which number of a larger or another filter each weight of a filter is.

A *meta filter* holds numbers; each transformation of a group makes one filter of them, by choosing and moving alone.

Sources: translation: Zhai, Cheng, Lu, Zhang, Doubly Convolutional Neural Networks (arXiv 1610.09716); rotation:
Dieleman, De Fauw, Kavukcuoglu, Exploiting Cyclic Symmetry (arXiv 1602.02660), Cohen and Welling (arXiv 1602.07576);
circulant: Ding et al., CirCNN (arXiv 1708.08917), for convolutions.
"""

from __future__ import annotations

import math
from typing import get_args, get_type_hints

import numpy as np

from compress.candidate import Transfer
from compress.words import counted

TRANSFORMS = get_args(get_type_hints(Transfer)["transform"])
"""The kinds of transformations, by their number in a packed file."""


def obstacle(transfer: Transfer) -> str | None:
    """Say why the transformations do not fit filters of this shape; None if they do."""
    height, width, channels = transfer.shape
    size = transfer.size
    if transfer.transform == "translation" and height * width == 1:
        return "filters of 1 x 1 have nothing in common with shifted ones"
    if transfer.transform == "rotation" and (height != width or height == 1):
        return f"filters of {height} x {width} cannot be turned by 90 degrees into others"
    if transfer.transform == "rotation" and size not in (2, 4, 8):
        return f"{size} turns, where there are 2, 4 or 8"
    if transfer.transform == "circulant" and channels % size:
        return f"{counted(channels, 'channel is', 'channels are')} no multiple of the circle of {size}"
    return None


def places(transfer: Transfer) -> np.ndarray:
    """Return which number of its meta filter each weight of a filter is, int [transformations, weights of a filter].

    ``translation``: ``size`` x ``size`` patches of a meta filter that is so much larger (less one). ``rotation``: turns
    by 90 degrees (``size`` 2: by 180), of its mirror image, too (``size`` 8). ``circulant``: in each circle of ``size``
    channels the meta filter is turned by 0, 1, ... channels.
    """
    height, width, channels = transfer.shape
    size = transfer.size
    if transfer.transform == "translation":
        down, across, row, column, channel = np.ogrid[:size, :size, :height, :width, :channels]
        found = ((row + down) * (width + size - 1) + column + across) * channels + channel
        return found.reshape(size * size, -1)
    whole = np.arange(height * width * channels)
    if transfer.transform == "rotation":
        filters = whole.reshape(height, width, channels)
        turned = [np.rot90(filters, quarter) for quarter in (range(4) if size > 2 else (0, 2))]
        mirrored = [view[:, ::-1] for view in turned] if size == 8 else []
        return np.stack([view.reshape(-1) for view in turned + mirrored])
    circles = whole.reshape(-1, size)
    return np.stack([np.roll(circles, turn, axis=1).reshape(-1) for turn in range(size)])


def transformations(transfer: Transfer) -> int:
    """Return how many filters follow from a meta filter."""
    return transfer.size**2 if transfer.transform == "translation" else transfer.size


def numbers_of(transfer: Transfer) -> int:
    """Return how many numbers a meta filter holds."""
    height, width, channels = transfer.shape
    more = transfer.size - 1 if transfer.transform == "translation" else 0
    return (height + more) * (width + more) * channels


def metas_of(transfer: Transfer) -> int:
    """Return the number of meta filters, as far as the slots say."""
    return max(transfer.slots) // transformations(transfer) + 1


def can_be(transfer: Transfer, metas: int, count: int) -> bool:
    """Say whether a packed file may hold ``count`` weights as ``metas`` meta filters.

    They have no more numbers than the weights, so that a few bytes do not ask a reader for much memory.
    """
    weights = math.prod(transfer.shape)
    many = transformations(transfer) * weights > count or metas * numbers_of(transfer) > count
    return not many and obstacle(transfer) is None


def labels_of(transfer: Transfer) -> np.ndarray:
    """Return which of all numbers each weight of the kernel is, int [height, width, channels, filters]."""
    moved = places(transfer)
    meta, transformation = np.divmod(np.asarray(transfer.slots, np.int64), len(moved))
    return (meta * numbers_of(transfer) + moved[transformation].T).reshape(*transfer.shape, -1)
