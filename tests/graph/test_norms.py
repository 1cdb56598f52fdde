"""Normalisations as convolutions: the same outputs, and only where the converter merges nothing."""

from __future__ import annotations

import numpy as np
import pytest
import tf_keras

from compress.graph.norms import with_norms_as_convolutions
from tests.graph.zoo import randomised

layers = tf_keras.layers
NORMS = {
    "batch norm": lambda: layers.BatchNormalization(name="norm"),
    "without scale and centre": lambda: layers.BatchNormalization(scale=False, center=False, name="norm"),
    "fixed": lambda: layers.Normalization(mean=[1.0, 2.0, -3.0], variance=[4.0, 1e-20, 9.0], name="norm"),
    "inverted": lambda: layers.Normalization(mean=[1.0, 2.0, -3.0], variance=[4.0, 5.0, 9.0], invert=True, name="norm"),
    "one for all": lambda: layers.Normalization(axis=None, mean=1.5, variance=4.0, name="norm"),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(3,), (5, 3), (4, 5, 3)])
def test_the_outputs_are_those_of_the_norm(norm, shape):
    value = tf_keras.Input(shape)
    layer = NORMS[norm]()
    # A call of its own mode, as in transfer learning, and a second call.
    first = layer(value, training=False) if "batch" in norm else layer(value)
    model = randomised(tf_keras.Model(value, layer(layers.ReLU()(first))))
    changed = with_norms_as_convolutions(model)
    assert isinstance(changed.get_layer("norm"), layers.DepthwiseConv2D)
    x = np.random.default_rng(0).normal(size=(6, *shape)).astype(np.float32)
    wanted = model.predict(x, verbose=0)
    np.testing.assert_allclose(changed.predict(x, verbose=0), wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


RESCALED = {
    "each": ([0.5, 2.0, -1.0], [1.0, -2.0, 3.0]),
    "one product": (0.5, [1.0, -2.0, 3.0]),
    "one sum": ([0.5, 2.0, -1.0], [4.0]),
}


@pytest.mark.parametrize("numbers", RESCALED)
def test_the_outputs_are_those_of_a_rescaling_of_channels(numbers):
    image = tf_keras.Input((4, 5, 3))
    model = tf_keras.Model(image, layers.Rescaling(*RESCALED[numbers], name="norm")(image))
    changed = with_norms_as_convolutions(model)
    assert isinstance(changed.get_layer("norm"), layers.DepthwiseConv2D)
    x = np.random.default_rng(0).normal(size=(6, 4, 5, 3)).astype(np.float32)
    np.testing.assert_allclose(changed.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "scale", "offset"),
    [
        ((4, 5, 3), 0.5, 1.0),
        ((4, 5, None), 0.5, 1.0),
        ((4, 5, 3), [1.0, 2.0, 3.0], 0.0),
        ((5, 3), [1.0, 2.0, 3.0], 1.0),
        ((4, 5, 1), [2.0], [1.0]),
    ],
)
def test_rescaling_that_is_quick_as_it_is_is_left(shape, scale, offset):
    value = tf_keras.Input(shape)
    model = tf_keras.Model(value, layers.Rescaling(scale, offset)(value))
    assert with_norms_as_convolutions(model) is model


@pytest.mark.parametrize("norm", [lambda: layers.Rescaling([0.1, 0.2, 0.3], [1.0, 2.0, 3.0]), NORMS["fixed"]])
def test_a_norm_of_integers_is_left(norm):
    image = tf_keras.Input((4, 5, 3), dtype="uint8")
    model = tf_keras.Model(image, norm()(image))
    assert with_norms_as_convolutions(model) is model


def test_norms_that_the_converter_merges_and_other_axes_are_left():
    image = tf_keras.Input((6, 6, 3))
    x = layers.BatchNormalization(name="merged")(layers.Dropout(0.5)(layers.Conv2DTranspose(4, 3)(image)))
    x = layers.BatchNormalization(axis=1, name="rows")(layers.ReLU()(x))
    x = layers.BatchNormalization(axis=[3, 2], name="both")(layers.ReLU()(x))
    model = tf_keras.Model(image, x)
    assert with_norms_as_convolutions(model) is model


def test_a_norm_behind_a_layer_that_others_read_is_replaced():
    image = tf_keras.Input((6, 6, 3))
    x = layers.Conv2D(4, 1)(image)
    model = tf_keras.Model(image, layers.Concatenate()([x, layers.BatchNormalization(name="norm")(x)]))
    assert isinstance(with_norms_as_convolutions(model).get_layer("norm"), layers.DepthwiseConv2D)
