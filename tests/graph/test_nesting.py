"""Nested models come back from a flat one, also after surgery."""

from __future__ import annotations

import numpy as np
import pytest
import tf_keras

from compress.graph.channels.groups import Channels
from compress.graph.channels.surgery import remove_channels
from compress.graph.nesting import nest
from compress.graph.rewrite import NewLayer, flatten, rewrite

layers = tf_keras.layers


def conv(x, channels: int, name: str):
    return layers.Conv2D(channels, 3, padding="same", bias_initializer="normal", name=name)(x)


def nested() -> tf_keras.Model:
    """A backbone with a head of its own in it, two outputs of it, and a layer outside that has the same name."""
    inside = tf_keras.Input((6, 6, 4))
    head = tf_keras.Sequential([tf_keras.Input((6, 6, 8)), layers.Conv2D(8, 1, name="mix"), layers.ReLU()], name="head")
    low = conv(inside, 8, "conv")
    backbone = tf_keras.Model(inside, [low, head(conv(low, 8, "deep"))], name="backbone")
    image = tf_keras.Input((6, 6, 3))
    low, high = backbone(conv(image, 4, "conv"))
    x = layers.Concatenate()([layers.GlobalAveragePooling2D()(low), layers.GlobalMaxPooling2D()(high)])
    return tf_keras.Model(image, layers.Dense(3, name="logits")(x), name="whole")


def assert_equal(one: tf_keras.Model, other: tf_keras.Model) -> None:
    x = np.random.default_rng(0).normal(size=(2, *one.input_shape[1:])).astype(np.float32)
    np.testing.assert_allclose(other(x), one(x), atol=1e-6)


def test_a_nested_model_comes_back():
    original = nested()
    flat, nests = flatten(original)
    assert set(nests) == {"backbone", "backbone/head"}
    back = nest(flat, nests)
    assert [layer.name for layer in back.layers if not isinstance(layer, layers.InputLayer)] == [
        layer.name for layer in original.layers if not isinstance(layer, layers.InputLayer)
    ]
    assert back.get_layer("backbone").get_layer("head").get_layer("mix").get_config()["filters"] == 8
    assert_equal(original, back)
    assert back.count_params() == original.count_params()
    again, names = flatten(back)
    assert names == nests
    assert {layer.name for layer in again.layers if layer.weights} == {la.name for la in flat.layers if la.weights}


def test_it_comes_back_without_the_channels_and_with_the_layers_that_surgery_has_made():
    flat, nests = flatten(nested())
    channels = Channels(flat)
    stay = np.ones(channels.count, bool)
    (group,) = [group for group in channels.groups if "backbone_conv" in group.writers]
    stay[group.units[:3]] = False
    cut = remove_channels(channels, stay)
    middle = layers.Conv2D(8, 1, name="deep_between")
    cut = rewrite(
        cut, {"deep": [NewLayer(layers.Conv2D.from_config(cut.get_layer("deep").get_config())), NewLayer(middle)]}
    )
    back = nest(cut, nests)
    assert back.get_layer("backbone").get_layer("backbone_conv").output_shape[-1] == 5
    assert "deep_between" in {layer.name for layer in back.get_layer("backbone").layers}
    assert_equal(cut, back)


def called_twice():
    inside = tf_keras.Input((6, 6, 4))
    twice = tf_keras.Model(inside, conv(inside, 4, "shared"), name="twice")
    image = tf_keras.Input((6, 6, 4))
    return tf_keras.Model(image, layers.Flatten()(twice(layers.ReLU()(twice(image)))))


def shares_a_layer():
    same = layers.Conv2D(4, 3, padding="same", name="same")
    inside = tf_keras.Input((6, 6, 4))
    inner = tf_keras.Model(inside, same(inside), name="inner")
    image = tf_keras.Input((6, 6, 4))
    return tf_keras.Model(image, same(layers.ReLU()(inner(image))))


@pytest.mark.parametrize("build", [called_twice, shares_a_layer])
def test_what_cannot_be_a_model_again_computes_the_same(build):
    flat, nests = flatten(build())
    back = nest(flat, nests)
    assert not any(isinstance(layer, tf_keras.Model) for layer in back.layers)
    assert_equal(flat, back)


def test_a_model_without_nests_is_copied():
    flat, nests = flatten(tf_keras.Sequential([tf_keras.Input((4,)), layers.Dense(3, name="dense")], name="plain"))
    assert nests == {}
    assert_equal(flat, nest(flat, nests))


def test_a_nest_whose_layers_are_gone_is_not_missed():
    flat, nests = flatten(nested())
    assert_equal(flat, nest(flat, {**nests, "ghost": frozenset({"nobody"})}))
