"""What surrogates expect, on outcomes whose rule is known."""

from __future__ import annotations

import numpy as np
import pytest

from compress.search.surrogate import Surrogate


def explained(outcome: np.ndarray, expected: np.ndarray) -> float:
    return float(1 - np.mean((outcome - expected) ** 2) / np.var(outcome))


@pytest.mark.parametrize("seed", range(4))
def test_few_outcomes_of_many_columns_are_enough_for_a_simple_rule(seed):
    rng = np.random.default_rng(seed)
    # Two numbers, and three choices of four values as columns, of which one matters.
    numbers, choices = rng.random((212, 2)), rng.integers(4, size=(212, 3))
    features = np.concatenate([numbers, *np.eye(4)[choices.T]], axis=1)
    outcome = 90 * np.tanh(3 * numbers[:, 0]) - 10 * (choices[:, 0] == 3)
    expected, _ = Surrogate(features[:12], outcome[:12]).expect(features[12:])
    assert explained(outcome[12:], expected) > 0.6


def test_it_is_sure_where_it_was_told_and_in_doubt_far_away():
    features = np.linspace(0, 0.5, 6)[:, None]
    expected, deviation = Surrogate(features, np.sin(4 * features[:, 0])).expect(np.array([[0.3], [1.0]]))
    assert expected[0] == pytest.approx(np.sin(1.2), abs=0.01)
    assert deviation[1] > 5 * deviation[0]


def test_what_measuring_adds_is_not_taken_for_doubt():
    rng = np.random.default_rng(0)
    features = np.tile(np.linspace(0, 1, 5), 40)[:, None]
    outcome = features[:, 0] + 0.2 * rng.standard_normal(200)
    expected, deviation = Surrogate(features, outcome).expect(features[:5])
    np.testing.assert_allclose(expected, features[:5, 0], atol=0.1)
    assert deviation.max() < 0.1


@pytest.mark.parametrize("outcome", [np.zeros(3), np.full(3, 1e9)])
def test_outcomes_that_are_all_the_same_are_expected_again(outcome):
    expected, deviation = Surrogate(np.eye(3), outcome).expect(np.array([[0.5, 0.5, 0.0]]))
    assert expected[0] == pytest.approx(outcome[0])
    assert np.isfinite(deviation).all()
