"""Closed-form repair against NumPy: moments, ridge, elimination."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.strategies.least_squares import Moments, assign_matrix, eliminate, is_linear, matrix_of, moments, solve

layers = tf_keras.layers
RNG = np.random.default_rng(0)


def built(layer: tf_keras.layers.Layer, shape: tuple[int, ...]) -> tf_keras.layers.Layer:
    layer.build((None, *shape))
    for weight in layer.weights:
        weight.assign(RNG.normal(size=weight.shape))
    return layer


LAYERS = {
    "dense": (layers.Dense(3), (5,)),
    "dense over time": (layers.Dense(3), (4, 5)),
    "conv": (layers.Conv2D(3, 3, padding="same"), (6, 7, 2)),
    "strided": (layers.Conv2D(3, (3, 2), strides=2), (8, 8, 2)),
    "dilated without bias": (layers.Conv2D(3, 3, dilation_rate=2, use_bias=False), (8, 8, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_layers_own_output_gives_its_own_weights_back(name):
    layer, shape = LAYERS[name]
    built(layer, shape)
    assert is_linear(layer)
    x = RNG.normal(size=(60, *shape)).astype(np.float32)
    known = moments(layer, x, np.asarray(layer(x)))
    before = matrix_of(layer)
    found = solve(known, np.zeros_like(before), 1e-9)
    np.testing.assert_allclose(found, before, atol=1e-3)
    assign_matrix(layer, found)
    np.testing.assert_allclose(matrix_of(layer), found, atol=1e-6)


def test_what_is_not_linear():
    assert not is_linear(built(layers.DepthwiseConv2D(3), (6, 6, 2)))
    assert not is_linear(built(layers.Conv2D(4, 3, groups=2), (6, 6, 2)))
    assert not is_linear(built(layers.Conv2DTranspose(4, 3), (6, 6, 2)))
    assert not is_linear(layers.ReLU())


def test_weighted_ridge_by_numpy():
    layer = built(layers.Dense(2), (4,))
    x, targets = RNG.normal(size=(50, 4)).astype(np.float32), RNG.normal(size=(50, 2)).astype(np.float32)
    weights = RNG.uniform(0.1, 2, 50).astype(np.float32)
    before = RNG.normal(size=(5, 2))
    with_one = np.c_[x, np.ones(50)].astype(np.float64)
    gram = with_one.T @ (weights[:, None] * with_one) / 50
    ridge = 0.1 * np.mean(np.diag(gram)[:-1]) * np.diag([1, 1, 1, 1, 1e-3])
    wanted = np.linalg.solve(gram + ridge, with_one.T @ (weights[:, None] * targets) / 50 + ridge @ before)
    np.testing.assert_allclose(solve(moments(layer, x, targets, weights), before, 0.1), wanted, atol=1e-4)


def test_inputs_that_are_gone_have_no_weights_and_the_others_make_up_for_it():
    layer = built(layers.Dense(1), (3,))
    x = RNG.normal(size=(400, 3)).astype(np.float32)
    x[:, 2] = x[:, 0] + x[:, 1]
    targets = x[:, 2:] * 2
    left = np.array([True, True, False])
    found = solve(moments(layer, x, targets), np.zeros((4, 1)), 1e-9, left)
    np.testing.assert_allclose(found.ravel(), [2, 2, 0, 0], atol=1e-2)


@given(st.integers(0, 10_000), st.integers(3, 5), st.integers(1, 3))
@settings(deadline=None, max_examples=25)
def test_elimination_takes_what_costs_least_and_knows_the_cost(seed, units, width):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(80, units * width)) @ rng.normal(size=(units * width,) * 2)
    x = np.c_[x, np.ones(80)]
    targets = rng.normal(size=(80, 2))
    known = Moments(x.T @ x / 80, x.T @ targets / 80)
    rows = np.arange(units * width).reshape(units, width)
    order, errors = eliminate(known, rows, ridge=1e-10)
    assert sorted(order) == list(range(units))
    assert (np.diff(errors) >= -1e-9).all()

    def error(left: tuple[int, ...]) -> float:
        use = np.append(rows[list(left)].ravel(), units * width).astype(int)
        solution = np.linalg.lstsq(x[:, use], targets, rcond=None)[0]
        return float(((x[:, use] @ solution - targets) ** 2).sum() / 80)

    whole = error(tuple(range(units)))
    first = min(error(tuple(left)) for left in itertools.combinations(range(units), units - 1))
    assert errors[0] == pytest.approx(first - whole, rel=1e-3, abs=1e-6)
    for gone in range(1, units + 1):
        left = tuple(sorted(set(range(units)) - set(order[:gone])))
        assert errors[gone - 1] == pytest.approx(error(left) - whole, rel=1e-3, abs=1e-6)


def test_the_metric_decides_which_output_matters():
    x = np.eye(2)
    known = Moments(np.diag([1.0, 1.0, 1.0]), np.r_[np.diag([1.0, 1.5]), np.zeros((1, 2))])
    del x
    rows = np.array([[0], [1]])
    assert eliminate(known, rows)[0][0] == 0
    assert eliminate(known, rows, np.diag([10.0, 0.1]))[0][0] == 1


def test_large_maps_are_sampled():
    layer = built(layers.Conv2D(1, 1), (300, 300, 1))
    x = tf.random.stateless_normal((80, 300, 300, 1), (0, 1)).numpy()
    known = moments(layer, x, x)
    assert known.inputs[0, 0] == pytest.approx(1.0, abs=0.02)
