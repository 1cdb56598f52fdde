"""Equalisation and bias correction: what they promise, on small networks."""

from __future__ import annotations

import numpy as np
import pytest
import tf_keras

from compress.strategies.quantization.bias_correction import correct_biases
from compress.strategies.quantization.equalisation import equalise

layers = tf_keras.layers


def network(activation: str = "relu") -> tf_keras.Model:
    """A stem, a depthwise and a pointwise convolution, pooling, Dense; channels of very different size."""
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, activation=activation, name="stem")(image)
    x = layers.ReLU()(layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x))
    x = layers.Conv2D(5, 1, name="pointwise")(x)
    x = layers.GlobalAveragePooling2D()(layers.ReLU()(x))
    model = tf_keras.Model(image, layers.Dense(4, name="dense")(x))
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape))
    kernel = model.get_layer("stem").kernel
    kernel.assign(np.asarray(kernel) * np.geomspace(0.01, 10, 6))
    return model


def largest(model: tf_keras.Model, name: str, axis: int) -> np.ndarray:
    kernel = np.abs(np.asarray(model.get_layer(name).weights[0]))
    return kernel.max(tuple(a for a in range(kernel.ndim) if a != axis % kernel.ndim))


def test_outputs_stay_and_ranges_meet():
    model = network()
    x = np.random.default_rng(1).normal(size=(20, 8, 8, 3)).astype(np.float32)
    before = [weight.numpy() for weight in model.weights]
    result = equalise(model)
    np.testing.assert_allclose(result(x), model(x), rtol=1e-3, atol=1e-3)
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight, value)
    for (first, out), (second, into) in (
        (("stem", -1), ("depthwise", -2)),
        (("depthwise", -2), ("pointwise", -2)),
        (("pointwise", -1), ("dense", -2)),
    ):
        np.testing.assert_allclose(largest(result, first, out), largest(result, second, into), rtol=0.02)


@pytest.mark.parametrize("activation", ["relu6", "tanh"])
def test_what_does_not_scale_is_left_alone(activation):
    model = network(activation)
    result = equalise(model)
    np.testing.assert_array_equal(result.get_layer("stem").kernel, model.get_layer("stem").kernel)


def test_bound_layers_are_left_alone():
    model = network()
    result = equalise(model, ("depthwise",))
    for name in ("stem", "depthwise"):
        for a, b in zip(result.get_layer(name).weights, model.get_layer(name).weights, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_branch_is_no_pair():
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, padding="same", name="stem")(image)
    y = layers.Conv2D(6, 3, padding="same", name="side")(x)
    model = tf_keras.Model(image, layers.Conv2D(2, 1, name="last")(layers.Add()([x, y])))
    result = equalise(model)
    for a, b in zip(result.weights, model.weights, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bits", [3, 8])
def test_rounded_weights_give_the_same_means_with_corrected_biases(bits):
    model = network()
    x = np.random.default_rng(1).normal(1, 1, size=(300, 8, 8, 3)).astype(np.float32)
    names = ("stem/kernel", "depthwise/depthwise_kernel", "pointwise/kernel", "dense/kernel")
    corrected = correct_biases(model, x, names, bits)
    for name in ("stem", "depthwise", "pointwise", "dense"):
        layer = model.get_layer(name)
        kernel, bias = (np.asarray(w) for w in layer.weights)
        axes = (0, 1) if name == "depthwise" else tuple(range(kernel.ndim - 1))
        steps = np.abs(kernel).max(axes, keepdims=True) / (2 ** (bits - 1) - 1)
        # The float network up to the layer; then the layer with rounded weights, before and after the correction.
        given = tf_keras.Model(model.inputs, layer.input)(x)
        linear = layer.__class__.from_config({**layer.get_config(), "activation": "linear", "name": "alone"})
        linear.build(given.shape)
        means = {}
        for what, weights in {
            "float": (kernel, bias),
            "rounded": (np.rint(kernel / steps) * steps, bias),
            "corrected": (np.rint(kernel / steps) * steps, np.asarray(corrected.get_layer(name).bias)),
        }.items():
            linear.set_weights(weights)
            output = np.asarray(linear(given))
            means[what] = output.reshape(-1, output.shape[-1]).mean(0)
        off = np.abs(means["rounded"] - means["float"]).max()
        assert np.abs(means["corrected"] - means["float"]).max() <= max(1e-3 * off, 1e-3)
        np.testing.assert_array_equal(corrected.get_layer(name).weights[0], kernel)
