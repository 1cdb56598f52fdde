"""What a search may set: every place in [0, 1] is a valid value, and values are drawn evenly."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.search.space import Choice, Interval

places = st.floats(0, 1)
ends = st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)).map(sorted)


@given(ends, places, st.booleans())
def test_a_number_lies_between_the_ends_and_its_place_gives_it_back(ends, place, log):
    interval = Interval(*ends, log=log)
    number = interval.at(place)
    assert ends[0] <= number <= ends[1]
    assert interval.at(interval.place(number)) == pytest.approx(number, rel=1e-6)


@given(st.integers(1, 50), st.integers(0, 50), st.integers(1, 7), places, st.booleans())
def test_whole_numbers_are_those_of_their_steps(low, more, step, place, log):
    interval = Interval(low, low + step * more, whole=True, step=step, log=log and step == 1)
    number = interval.at(place)
    assert isinstance(number, int)
    assert number in range(low, low + step * more + 1, step)
    assert interval.at(interval.place(number)) == number


@given(st.lists(st.text(min_size=1), min_size=1, max_size=9, unique=True), places)
def test_a_choice_gives_one_of_its_values_and_its_column(values, place):
    choice = Choice(tuple(values))
    value = choice.at(place)
    assert choice.at(choice.place(value)) == value
    (column,) = choice.features(np.array([place]))
    assert column.tolist() == [float(other == value) for other in values]


@pytest.mark.parametrize("values", [Interval(3, 8, whole=True), Choice(("a", "b", "c", "d", "e", "f"))])
def test_all_values_are_drawn_equally_often(values):
    counts = Counter(values.at(place) for place in np.linspace(0, 1, 6001))
    assert len(counts) == 6
    assert max(counts.values()) - min(counts.values()) <= 2


def test_a_model_sees_the_number_that_is_really_taken():
    whole = Interval(2, 4, whole=True)
    features = whole.features(np.linspace(0, 1, 100))[:, 0]
    np.testing.assert_allclose(np.unique(features), [whole.place(n) for n in (2, 3, 4)])
