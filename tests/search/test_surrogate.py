"""What surrogates expect, on outcomes whose rule is known."""

from __future__ import annotations

import numpy as np
import pytest

from compress.search.surrogate import WEIGHTS, Ended, Open, Surrogate


def explained(outcome: np.ndarray, expected: np.ndarray) -> float:
    return float(1 - np.mean((outcome - expected) ** 2) / np.var(outcome))


def mean_and_deviation(surrogate: Surrogate, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    outcomes = surrogate.expect(features)
    mean = outcomes @ WEIGHTS
    return mean, np.sqrt((outcomes - mean[:, None]) ** 2 @ WEIGHTS)


@pytest.mark.parametrize("seed", range(4))
def test_few_outcomes_of_many_columns_are_enough_for_a_simple_rule(seed):
    rng = np.random.default_rng(seed)
    # Two numbers, and three choices of four values as columns, of which one matters.
    numbers, choices = rng.random((212, 2)), rng.integers(4, size=(212, 3))
    features = np.concatenate([numbers, *np.eye(4)[choices.T]], axis=1)
    outcome = 90 * np.tanh(3 * numbers[:, 0]) - 10 * (choices[:, 0] == 3)
    expected, _ = mean_and_deviation(Surrogate(features[:12], outcome[:12]), features[12:])
    assert explained(outcome[12:], expected) > 0.6


def test_it_is_sure_where_it_was_told_and_in_doubt_far_away():
    features = np.linspace(0, 0.5, 6)[:, None]
    surrogate = Surrogate(features, np.sin(4 * features[:, 0]))
    expected, deviation = mean_and_deviation(surrogate, np.array([[0.3], [1.0]]))
    assert expected[0] == pytest.approx(np.sin(1.2), abs=0.01)
    assert deviation[1] > 5 * deviation[0]


def test_what_measuring_adds_is_not_taken_for_doubt():
    rng = np.random.default_rng(0)
    features = np.tile(np.linspace(0, 1, 5), 40)[:, None]
    outcome = features[:, 0] + 0.2 * rng.standard_normal(200)
    expected, deviation = mean_and_deviation(Surrogate(features, outcome), features[:5])
    np.testing.assert_allclose(expected, features[:5, 0], atol=0.1)
    assert deviation.max() < 0.1


def test_qualities_stay_near_what_was_seen_and_doubt_is_small_at_their_ends():
    features = np.linspace(0, 1, 12)[:, None]
    outcome = 90 / (1 + np.exp(-20 * (features[:, 0] - 0.5)))
    surrogate = Surrogate(features, outcome, Ended)
    between = np.array([[0.5], [0.04], [0.96]])
    outcomes = surrogate.expect(between)
    assert outcomes.min() >= outcome.min() - 2
    assert outcomes.max() <= outcome.max() + 2
    expected, deviation = mean_and_deviation(surrogate, between)
    np.testing.assert_allclose(expected, 90 / (1 + np.exp(-20 * (between[:, 0] - 0.5))), atol=2)
    assert deviation[0] > 3 * deviation[1:].max()


@pytest.mark.parametrize("scale", [Open, Ended])
@pytest.mark.parametrize("outcome", [np.zeros(3), np.full(3, 1e9)])
def test_outcomes_that_are_all_the_same_are_expected_again(outcome, scale):
    expected, deviation = mean_and_deviation(Surrogate(np.eye(3), outcome, scale), np.array([[0.5, 0.5, 0.0]]))
    assert expected[0] == pytest.approx(outcome[0])
    assert np.isfinite(deviation).all()
