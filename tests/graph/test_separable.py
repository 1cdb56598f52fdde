"""Separable convolutions in two halves give the same outputs."""

from __future__ import annotations

import numpy as np
import pytest
import tf_keras

from compress.graph.separable import split_separable

layers = tf_keras.layers


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"depth_multiplier": 2, "use_bias": False},
        {"strides": 2, "padding": "same", "activation": "relu"},
        {"dilation_rate": 2},
    ],
)
def test_the_halves_compute_the_same(fields):
    image = layers.Input((9, 9, 3))
    value = layers.SeparableConv2D(5, 3, name="one", bias_initializer="ones", **fields)(image)
    model = tf_keras.Model(image, layers.SeparableConv2D(4, 1, name="two")(value))
    x = np.random.default_rng(0).normal(size=(2, 9, 9, 3)).astype(np.float32)
    split, halves = split_separable(model, left=["two"])
    assert halves == {"one": "one_depthwise"}
    assert [type(layer) for layer in split.layers[1:]] == [
        layers.DepthwiseConv2D,
        layers.Conv2D,
        layers.SeparableConv2D,
    ]
    np.testing.assert_allclose(split(x), model(x), atol=1e-6)


def test_a_shared_layer_has_shared_halves_and_a_taken_name_stays():
    image = layers.Input((9, 9, 3))
    shared = layers.SeparableConv2D(3, 3, padding="same", name="shared")
    value = layers.Conv2D(3, 1, name="other_depthwise")(shared(shared(image)))
    model = tf_keras.Model(image, layers.SeparableConv2D(4, 1, name="other")(value))
    split, halves = split_separable(model)
    assert halves == {"shared": "shared_depthwise"}
    x = np.random.default_rng(0).normal(size=(2, 9, 9, 3)).astype(np.float32)
    np.testing.assert_allclose(split(x), model(x), atol=1e-6)
    assert len(split.weights) == len(model.weights)
    assert split_separable(split)[0] is split
