"""The Pareto front, against its definition."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from compress.tracking.pareto import non_dominated

# Few values, so that equal ones are frequent.
VALUE = st.sampled_from([0.0, 1.0, 2.0, 3.0, math.nan, math.inf]) | st.floats(-5, 5)
POINTS = st.lists(st.tuples(VALUE, VALUE), max_size=25)


def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """At least as good in both objectives (more gain, less cost), and better in one."""
    return one[0] >= other[0] and one[1] <= other[1] and one != other


def front(points: list[tuple[float, float]]) -> list[bool]:
    valid = [not (math.isnan(gain) or math.isnan(cost)) for gain, cost in points]
    return [
        ok and not any(valid[i] and dominates(points[i], point) for i in range(len(points)))
        for point, ok in zip(points, valid, strict=True)
    ]


def mask(points: list[tuple[float, float]]) -> list[bool]:
    gains, costs = np.array([p[0] for p in points]), np.array([p[1] for p in points])
    return non_dominated(gains, costs).tolist()


@given(POINTS)
def test_the_front_is_what_no_other_point_dominates(points):
    assert mask(points) == front(points)


@given(POINTS.filter(lambda points: any(not math.isnan(g + c) for g, c in points)))
def test_there_is_always_someone_on_the_front(points):
    assert any(mask(points))


@given(POINTS, st.randoms())
def test_the_order_of_the_points_does_not_matter(points, random):
    order = list(range(len(points)))
    random.shuffle(order)
    whole = mask(points)
    assert mask([points[i] for i in order]) == [whole[i] for i in order]


def test_an_example_by_hand():
    #            best     equal to it  cheapest  dominated  dear     not measured
    points = [(92, 10), (92, 10), (88, 2), (88, 3), (93, 50), (99, math.nan)]
    assert mask(points) == [True, True, True, False, True, False]
