"""Masks from scores: exact counts, patterns, rankings, against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import tf_keras
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compress.graph.kernels import kernels
from compress.strategies.pruning.masks import Axes, Blocks, KeptOfEach, Masking, Pattern

layers = tf_keras.layers
MATRIX = Axes(-2, (-1,))
DEPTHWISE = Axes(-2, (-2, -1), sums=False)
ELEMENTS = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 10, width=32)


def scores_of(shape):
    return hnp.arrays(np.float32, shape, elements=ELEMENTS)


def distinct(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    values = np.random.default_rng(seed).permutation(sum(int(np.prod(s)) for s in shapes)).astype(float)
    parts = np.split(values, np.cumsum([int(np.prod(s)) for s in shapes])[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


@given(seed=st.integers(0, 10_000), share=st.floats(0, 1))
def test_global_is_one_sort_over_all_but_for_the_best_of_each_output(seed, share):
    shapes = [(4, 5), (3, 2, 3), (3, 3, 2, 2)]
    scores = distinct(seed, *shapes)
    axes = [MATRIX, MATRIX, DEPTHWISE]
    masks = Masking(axes, Pattern(), "global", [1.0] * 3).masks(scores, share)
    total = sum(s.size for s in scores)
    gone = sum(int((~m).sum()) for m in masks)
    assert gone == min(round(share * total), total - 3)
    best = []
    for score, axis in zip(scores, axes, strict=True):
        over = tuple(range(score.ndim - (2 if axis is DEPTHWISE else 1)))
        best.append(score == score.max(axis=over, keepdims=True))
    free = np.sort(np.concatenate([s[~b] for s, b in zip(scores, best, strict=True)]))
    if gone <= free.size:
        wanted = free[:gone]
        dropped = np.concatenate([s[~m] for s, m in zip(scores, masks, strict=True)])
        np.testing.assert_array_equal(np.sort(dropped), wanted)
        assert all((m | ~b).all() for m, b in zip(masks, best, strict=True)), "every output keeps its best"
    else:
        rest = np.sort(np.concatenate([s[s < s.max()] for s in scores]))
        dropped = np.concatenate([s[~m] for s, m in zip(scores, masks, strict=True)])
        np.testing.assert_array_equal(np.sort(dropped), rest[:gone])


@given(seed=st.integers(0, 10_000), share=st.floats(0.01, 0.9))
def test_global_with_costs_stops_where_the_budget_is_reached(seed, share):
    scores = distinct(seed, (6, 4), (3, 7))
    costs = [5.0, 1.0]
    masks = Masking([MATRIX] * 2, Pattern(), "global", costs).masks(scores, share)
    spent = sum(cost * (~mask).sum() for cost, mask in zip(costs, masks, strict=True))
    whole = sum(cost * score.size for cost, score in zip(costs, scores, strict=True))
    assert share * whole - 1e-6 <= spent < share * whole + 5 or all(m.sum() == 1 for m in masks)


@given(
    scores=scores_of((3, 8, 5)),
    axis=st.sampled_from([MATRIX, Axes(-1, (-2,))]),
    ranking=st.sampled_from(["layer", "global"]),
)
def test_two_of_four_holds_in_every_group(scores, axis, ranking):
    scores = scores if axis is MATRIX else np.swapaxes(scores, -1, -2)
    two_of_four = KeptOfEach(2, 4)
    assert two_of_four.sparsity == 0.5
    (mask,) = Masking([axis], two_of_four, ranking, [1.0]).masks([scores], 0.5)
    along = mask if axis is MATRIX else np.swapaxes(mask, -1, -2)
    plain = scores if axis is MATRIX else np.swapaxes(scores, -1, -2)
    groups, values = along.reshape(3, 2, 4, 5), plain.reshape(3, 2, 4, 5)
    assert (groups.sum(2) == 2).all()
    assert (np.where(groups, values, np.inf).min(2) >= np.where(groups, -np.inf, values).max(2)).all()


@given(seed=st.integers(0, 10_000), share=st.floats(0, 0.5))
def test_on_the_way_to_a_pattern_only_what_it_does_not_keep_goes(seed, share):
    (scores,) = distinct(seed, (8, 6))
    masking = Masking([MATRIX], KeptOfEach(1, 4), "layer", [1.0])
    (part,), (whole,) = masking.masks([scores], share), masking.masks([scores], 0.75)
    assert (~part).sum() == round(share * 48)
    assert not (whole & ~part).any()
    assert (whole.reshape(2, 4, 6).sum(1) == 1).all()


@given(scores=scores_of((2, 8, 6)), share=st.floats(0, 1), size=st.sampled_from([(4, 1), (2, 3), (1, 6), (8, 2)]))
def test_blocks_go_as_a_whole_lowest_sum_first(scores, share, size):
    (mask,) = Masking([MATRIX], Blocks(*size), "layer", [1.0]).masks([scores], share)
    shape = (2, 8 // size[0], size[0], 6 // size[1], size[1])
    blocks, sums = mask.reshape(shape), scores.astype(float).reshape(shape).sum((2, 4))
    kept = blocks.any((2, 4))
    np.testing.assert_array_equal(kept, blocks.all((2, 4)))
    assert (~kept).sum() == min(round(share * kept.size), kept.size - 1)
    assert sums[~kept].max(initial=-np.inf) <= sums[kept].min() + 1e-9


def test_what_is_gone_goes_first_and_alone_does_not_doom_its_block():
    scores = np.full((4, 2), 1.0)
    scores[0] = -np.inf
    (mask,) = Masking([MATRIX], Pattern(), "global", [1.0]).masks([scores], 0.25)
    np.testing.assert_array_equal(mask, scores > 0)
    scores[2:] = 0.5
    scores[2:, 1] = -np.inf
    (mask,) = Masking([MATRIX], Blocks(2, 1), "layer", [1.0]).masks([scores], 0.25)
    np.testing.assert_array_equal(mask, [[True, True], [True, True], [True, False], [True, False]])


@pytest.mark.parametrize(
    ("layer", "shape", "inputs", "outputs"),
    [
        (layers.Dense(7), (5,), 5, [7]),
        (layers.Conv2D(7, 3), (8, 8, 5), 5, [7]),
        (layers.Conv2DTranspose(7, 3), (8, 8, 5), 5, [7]),
        (layers.Conv1DTranspose(7, 3), (8, 5), 5, [7]),
        (layers.DepthwiseConv2D(3, depth_multiplier=2), (8, 8, 5), None, [5, 2]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_axes_are_those_of_the_layer(layer, shape, inputs, outputs):
    image = tf_keras.Input(shape)
    (kernel,) = kernels(tf_keras.Model(image, layer(image)))
    axes = Axes.of(kernel)
    assert [kernel.value.shape[axis] for axis in axes.outputs] == outputs
    assert axes.sums == (inputs is not None)
    if inputs is not None:
        assert kernel.value.shape[axes.inputs] == inputs
        assert KeptOfEach(1, inputs).unsuited(kernel.value.shape, axes) is None
    assert "4" in str(KeptOfEach(2, 4).unsuited(kernel.value.shape, axes))
    assert Blocks(5, 2).unsuited(kernel.value.shape, axes) is not None
