"""Flow of the solution procedure (FSP): how features go together with those of an earlier layer.

Source: Yim et al., "A Gift from Knowledge Distillation" (CVPR 2017, equations 1 and 2). The matrices have the sizes of
the channels, so that student and teacher must have the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import tensorflow as tf

from compress.strategies.distillation.loss import LayerLoss, compares_maps
from compress.strategies.distillation.pairing import Pair
from compress.strategies.distillation.pooling import max_pool


class Flow(LayerLoss):
    """The sum over pairs of layers of ``|G_student - G_teacher|^2``, the mean over the batch.

    ``G`` is the mean over the places of the products of the earlier layer's channels with the later's. The layers go
    from the first to the last of each stage (maps of one size), as in the paper; where each stage has a single one,
    from each to the next, the larger maps max-pooled.
    """

    name = "flow"
    least: ClassVar[int] = 2

    def misfit(self, pair: Pair) -> str | None:
        """Maps with the same number of channels."""
        ours, theirs = pair.student_shape, pair.teacher_shape
        if len(ours) == len(theirs) == 3 and None in (*ours, *theirs):
            return "it needs maps whose size is fixed"
        return compares_maps(pair) or (None if ours[-1] == theirs[-1] else "it needs the same number of channels")

    def value(self, student: Sequence[tf.Tensor], teacher: Sequence[tf.Tensor], samples: int) -> tf.Tensor:
        """Return the squared distance of the matrices."""
        ways = _ways([tuple(features.shape[1:3]) for features in student])
        total = tf.constant(0.0)
        for first, last in ways:
            ours, theirs = (_flow(features[first], features[last]) for features in (student, teacher))
            total += tf.reduce_mean(tf.reduce_sum((ours - theirs) ** 2, [1, 2]))
        return total


def _ways(sizes: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
    """Return which layer, and which later one, belong together, for layers that give maps of these sizes."""
    stages: dict[tuple[int, ...], list[int]] = {}
    for number, size in enumerate(sizes):
        stages.setdefault(size, []).append(number)
    within = [(numbers[0], numbers[-1]) for numbers in stages.values() if len(numbers) > 1]
    return within or [(number - 1, number) for number in range(1, len(sizes))]


def _flow(first: tf.Tensor, last: tf.Tensor) -> tf.Tensor:
    size = tuple(min(one, other) for one, other in zip(first.shape[1:3], last.shape[1:3], strict=True))
    first, last = (
        features if tuple(features.shape[1:3]) == size else max_pool(features, (size[0], size[1]))
        for features in (first, last)
    )
    return tf.einsum("bhwi,bhwj->bij", first, last) / float(size[0] * size[1])
