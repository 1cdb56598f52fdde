"""The expected hypervolume improvement, against hypervolumes of drawn outcomes."""

from __future__ import annotations

import numpy as np
import pytest
from moocore import hypervolume
from scipy.stats import norm

from compress.search.improvement import expected_improvement
from compress.search.surrogate import NODES, WEIGHTS


def front_of(count: int, objectives: int, rng: np.random.Generator) -> np.ndarray:
    """Points on a sphere around (1, 1, ...): none dominates another."""
    away = np.abs(rng.standard_normal((count, objectives)))
    return 1 - away / np.linalg.norm(away, axis=1, keepdims=True)


def raised(front: np.ndarray, reference: np.ndarray, outcome: np.ndarray) -> float:
    before = hypervolume(front, ref=reference) if len(front) else 0.0
    return float(hypervolume(np.concatenate([front, outcome[None]]), ref=reference) - before)


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [0, 1, 6])
def test_outcomes_without_doubt_raise_it_by_what_the_hypervolume_says(objectives, count):
    rng = np.random.default_rng(count)
    front, reference = front_of(count if objectives > 1 else min(count, 1), objectives, rng), np.ones(objectives)
    outcomes = rng.uniform(-0.2, 1.2, (20, objectives))
    found = expected_improvement(front, reference, outcomes[..., None], np.ones(1))
    np.testing.assert_allclose(found, [raised(front, reference, o) for o in outcomes], atol=1e-7)


@pytest.mark.parametrize("objectives", [2, 3])
def test_doubtful_outcomes_raise_it_by_the_mean_over_draws(objectives):
    rng = np.random.default_rng(0)
    front, reference = front_of(5, objectives, rng), np.ones(objectives)
    mean, deviation = rng.uniform(0, 1, (3, objectives)), rng.uniform(0.05, 0.4, (3, objectives))
    found = expected_improvement(front, reference, mean[..., None] + deviation[..., None] * NODES, WEIGHTS)
    draws = mean + deviation * rng.standard_normal((4000, 3, objectives))
    every = np.array([[raised(front, reference, outcome) for outcome in draw] for draw in draws])
    error = every.std(axis=0) / np.sqrt(len(draws))
    np.testing.assert_array_less(np.abs(found - every.mean(axis=0)), 4 * error)


def test_with_one_objective_it_is_the_known_formula():
    mean, deviation = np.array([[0.3], [0.9]]), np.array([[0.2], [0.5]])
    z = (0.5 - mean) / deviation
    expected = deviation * (z * norm.cdf(z) + norm.pdf(z))
    outcomes = mean[..., None] + deviation[..., None] * NODES
    found = expected_improvement(np.array([[0.5]]), np.array([1.0]), outcomes, WEIGHTS)
    np.testing.assert_allclose(found, expected[:, 0], rtol=0.002)


def test_a_large_front_is_thinned_and_its_ends_stay():
    rng = np.random.default_rng(1)
    front, reference = front_of(300, 3, rng), np.ones(3)
    mean = np.array([[0.5, 0.5, 0.5], [-0.5, 0.5, 0.5]])
    found = expected_improvement(front, reference, mean[..., None], np.ones(1))
    assert found[1] > found[0] >= 0
    assert found[1] == pytest.approx(raised(front, reference, mean[1]), rel=0.1)
