"""Pareto fronts and hypervolumes, against their definitions; seeds of one configuration are one point."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import CompressError
from compress.tracking.pareto import (
    DEFAULT_OBJECTIVES,
    FinishedRun,
    Scale,
    estimate,
    hypervolume,
    make_points,
    make_scale,
    matrix,
    non_dominated,
    on_fronts,
    read_fronts,
    require_reported,
)
from compress.tracking.recorder import metrics_of
from tests.conftest import REPOSITORY
from tests.tracking.runs import NUMBERS

# Few values, so that equal ones are frequent.
VALUE = st.sampled_from([0.0, 1.0, 2.0, 3.0, math.nan, math.inf]) | st.floats(-5, 5)
SIGNS = (True, False, False)


def points_of(count: int, value=VALUE):
    return st.lists(st.tuples(*[value] * count), max_size=25)


POINTS = st.sampled_from([2, 3]).flatmap(points_of)


def dominates(one: tuple, other: tuple) -> bool:
    """At least as good in every objective, and better in one. The first is a gain, the others are costs."""
    return one[0] >= other[0] and all(a <= b for a, b in zip(one[1:], other[1:], strict=True)) and one != other


def front(points: list[tuple]) -> list[bool]:
    valid = [not any(map(math.isnan, point)) for point in points]
    return [
        ok and not any(valid[i] and dominates(points[i], point) for i in range(len(points)))
        for point, ok in zip(points, valid, strict=True)
    ]


def mask(points: list[tuple]) -> list[bool]:
    count = len(points[0]) if points else 2
    return non_dominated(np.array(points, float), SIGNS[:count]).tolist()


@given(POINTS)
def test_the_front_is_what_no_other_point_dominates(points):
    assert mask(points) == front(points)


@given(POINTS.filter(lambda points: any(not math.isnan(sum(point)) for point in points)))
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


def run_of(name: str, *, seed: str = "0", overrides: tuple[str, ...] = (), settings=None, **metrics) -> FinishedRun:
    settings = {"seed": seed, "tracking.experiment": f"of {name}"} | (settings or {"a": name})
    return FinishedRun(name, "prune", seed, overrides, settings, metrics)


@given(st.lists(st.tuples(*[st.integers(0, 6)] * 3), max_size=6))
def test_a_hypervolume_is_the_number_of_cells_that_are_dominated(points):
    """On whole numbers: gain from 0 in cells of 1, costs up to 5."""
    (joint,) = read_fronts(["accuracy", "tflite_bytes", "latency_p50"], "")
    scale = Scale(
        {"accuracy": 0, "tflite_bytes": 5, "latency_p50": 5}, {"accuracy": 2, "tflite_bytes": 5, "latency_p50": 1}
    )
    cells = itertools.product(range(6), range(5), range(5))
    # A cell is named by its corner nearest to the origin: a gain reaches it from one above.
    covered = sum(any(g >= a + 1 and b >= c and d >= e for g, c, e in points) for a, b, d in cells)
    found = hypervolume(np.array(points, float), joint, scale)
    assert found == pytest.approx(covered / (2 * 5 * 1), abs=1e-9)


def test_the_baseline_is_what_hypervolumes_are_counted_from():
    (front_of,) = read_fronts(["accuracy", "tflite_bytes"], "")
    base = {"baseline.accuracy": 90.0, "baseline.tflite_bytes": 1000.0}
    runs = [
        run_of("a", accuracy=90.0, tflite_bytes=500.0, **base),
        run_of("b", accuracy=45.0, tflite_bytes=100.0, **base),
        run_of("larger than the baseline", accuracy=99.0, tflite_bytes=1001.0, **base),
    ]
    scale = make_scale(front_of, runs, {})
    assert scale == Scale({"accuracy": 0.0, "tflite_bytes": 1000.0}, {"accuracy": 90.0, "tflite_bytes": 1000.0})
    # 1 x 0.5 of a, and 0.5 x 0.4 more of b.
    assert hypervolume(matrix(make_points(runs), front_of.objectives), front_of, scale) == pytest.approx(0.7)
    given_scale = make_scale(front_of, runs, {"accuracy": 45.0})
    assert hypervolume(matrix(make_points(runs), front_of.objectives), front_of, given_scale) == pytest.approx(0.25)


def test_a_metric_without_a_baseline_is_counted_from_the_worst_run():
    (front_of,) = read_fronts(["speedup", "energy:min"], "")
    runs = [run_of("a", speedup=2.0, energy=4.0), run_of("b", speedup=1.0, energy=1.0), run_of("c", speedup=math.inf)]
    scale = make_scale(front_of, runs, {})
    assert (scale.reference, scale.unit) == ({"speedup": 1.0, "energy": 4.0}, {"speedup": 2.0, "energy": 4.0})


def test_seeds_of_one_configuration_are_one_point():
    settings = {"strategy.prune.sparsity": "0.5"}
    accuracies = (90.0, 92.0, 94.0)
    runs = [
        run_of(f"s{i}", seed=str(i), settings=settings, overrides=(f"seed={i}", "model=x"), accuracy=value)
        for i, value in enumerate(accuracies)
    ]
    runs.append(
        run_of(
            "other",
            settings={"strategy.prune.sparsity": "0.8"},
            overrides=("seed=0", "model=x", "strategy.prune.sparsity=0.8"),
            accuracy=80.0,
        )
    )
    first, second = make_points(runs)
    assert first.runs == {"s0": "0", "s1": "1", "s2": "2"}
    assert first.label == "prune"
    assert second.label == "prune prune.sparsity=0.8"
    assert first.values["accuracy"].mean == pytest.approx(92.0)
    # Student's t of two degrees of freedom is 4.3027 at 97.5 %; the deviation is 2.
    assert first.values["accuracy"].half_width == pytest.approx(4.302653 * 2 / math.sqrt(3), rel=1e-6)
    assert second.values["accuracy"].half_width is None


@pytest.mark.parametrize(("value", "text"), [([12345.6], "12,346"), ([12.3456], "12.35"), ([0.123456], "0.1235")])
def test_numbers_for_people(value, text):
    assert estimate(value).text == text
    assert estimate([]).text == "-"


def test_means_over_seeds_are_compared_not_single_runs():
    """One lucky seed does not put a configuration on the front."""
    fronts = read_fronts(["accuracy", "tflite_bytes"], "")
    unsteady = {"settings": {"a": "1"}, "tflite_bytes": 10.0}
    steady = {"settings": {"a": "2"}, "tflite_bytes": 10.0}
    runs = [
        run_of("u0", seed="0", accuracy=99.0, **unsteady),
        run_of("u1", seed="1", accuracy=51.0, **unsteady),
        run_of("s0", seed="0", accuracy=90.0, **steady),
        run_of("s1", seed="1", accuracy=91.0, **steady),
    ]
    assert [bool(point.fronts) for point in on_fronts(make_points(runs), fronts)] == [False, True]


def test_one_list_is_one_front_and_lists_of_lists_are_a_front_each():
    (joint,) = read_fronts(["accuracy", "packed_bytes", "latency_p50"], "")
    assert (joint.name, joint.maximise) == ("packed_bytes.latency_p50", [True, False, False])
    assert [front.name for front in read_fronts(DEFAULT_OBJECTIVES, "")] == ["tflite_bytes", "latency_p50"]
    (told,) = read_fronts(["ratio.macs", "prune.speedup", "energy:min", "throughput:max"], "")
    assert told.maximise == [True, True, False, True]


@pytest.mark.parametrize(
    ("objectives", "part"),
    [
        ([], "two or more"),
        (["accuracy"], "two or more"),
        (["accuracy", "accuracy"], "two or more"),
        (["accuracy", ["macs", "accuracy"]], "a list of such lists"),
        (["accuracy", "macs:up"], "macs:up"),
        (["accuracy", ""], "an empty name"),
        ([["accuracy", "macs"], ["macs", "accuracy"]], "differ"),
    ],
    ids=str,
)
def test_objectives_that_make_no_front(objectives, part):
    with pytest.raises(CompressError) as caught:
        read_fronts(objectives, "tracking.objectives")
    assert caught.value.where == "tracking.objectives"
    assert part in str(caught.value)


def test_an_objective_that_no_run_reports_names_the_nearest():
    runs = [run_of("a", accuracy=1.0, packed_bytes=2.0)]
    with pytest.raises(CompressError) as caught:
        require_reported(read_fronts(["accuracy", "paked_bytes"], ""), runs, "tracking.objectives")
    assert "paked_bytes" in str(caught.value)
    assert "packed_bytes" in str(caught.value)
    require_reported(read_fronts(["accuracy", "packed_bytes"], ""), runs, "")


@pytest.mark.parametrize(
    "file", ["docs/runs.md", "compress/pareto.py", "compress/tracking/pareto.py", "conf/hydra/sweeper/search.yaml"]
)
def test_metrics_named_as_examples_are_reported(file):
    said = re.findall(r'values\["(\w+)"\]', (REPOSITORY / "compress/boards/aarch64.py").read_text())
    reported = metrics_of(replace(NUMBERS, on_board=dict.fromkeys(said, 0.0)))
    named = re.findall(r"(\w+):(?:min|max)\b", (REPOSITORY / file).read_text())
    assert named
    assert set(named) <= set(reported)
