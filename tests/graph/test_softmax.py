"""Logits of a network that gives probabilities, and whether one does."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.graph.softmax import ending, gives_probabilities, logits_of

layers = tf_keras.layers


@given(st.lists(st.lists(st.floats(-7, 7), min_size=3, max_size=3), min_size=1, max_size=5))
@settings(deadline=None)
def test_logits_of_probabilities_are_the_logits_up_to_a_constant(rows):
    logits = np.array(rows, np.float32)
    np.testing.assert_array_equal(logits_of(tf.constant(logits), False), logits)
    back = np.asarray(logits_of(tf.nn.softmax(logits), True))
    difference = back - logits
    np.testing.assert_allclose(difference, difference[:, :1] * np.ones(3), atol=1e-2)


def test_logits_of_a_probability_of_zero_are_finite():
    assert np.isfinite(logits_of(tf.constant([[0.0, 1.0]]), True)).all()


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (lambda x: layers.Dense(3)(x), False),
        (lambda x: layers.Dense(3, activation="relu")(x), False),
        (lambda x: layers.Dense(3)(layers.Softmax()(x)), False),
        (lambda x: layers.Dense(3, activation="softmax")(x), True),
        (lambda x: layers.Activation("softmax")(layers.Dense(3)(x)), True),
        (lambda x: layers.Softmax()(layers.Dense(3)(x)), True),
        (lambda x: tf.nn.softmax(layers.Dense(3)(x)), True),
        (lambda x: layers.Dense(3, activation=tf.nn.softmax)(x), True),
    ],
    ids=["logits", "relu", "softmax-inside", "dense", "activation", "layer", "operation", "function"],
)
def test_whether_a_model_gives_probabilities(head, expected):
    values = tf_keras.Input((4,))
    model = tf_keras.Model(values, head(values))
    assert gives_probabilities(model) == expected
    if expected:
        np.testing.assert_allclose(np.asarray(model(np.ones((1, 4)))).sum(), 1, atol=1e-5)


@pytest.mark.parametrize("name", ["sigmoid", "hard_sigmoid", "tanh", "relu", "softmax", "linear"])
def test_a_networks_ending_is_told_by_name(name):
    image = tf_keras.Input((4,))
    assert ending(tf_keras.Model(image, layers.Dense(3, activation=name)(image))) == name
    assert ending(tf_keras.Model(image, layers.Activation(name)(layers.Dense(3)(image)))) == name
