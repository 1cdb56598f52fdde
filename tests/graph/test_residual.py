"""Residual blocks: found where a shortcut passes its input on, taken out without a trace."""

from __future__ import annotations

import numpy as np
import pytest
import tf_keras

from compress.graph.channels.surgery import oracle_difference
from compress.graph.residual import residual_blocks, without_blocks, without_branches
from compress.graph.rewrite import rewrite

layers = tf_keras.layers


def conv(x, channels: int, name: str):
    return layers.Conv2D(channels, 3, padding="same", name=name, bias_initializer="normal")(x)


def network(body) -> tf_keras.Model:
    image = tf_keras.Input((6, 6, 4))
    outputs = body(image)
    return rewrite(tf_keras.Model(image, outputs))


def two_blocks(image):
    x = conv(image, 8, "stem")
    y = conv(layers.ReLU(name="between")(conv(x, 4, "a1")), 8, "a2")
    x = layers.Add(name="a")([x, y])
    x = x + conv(layers.ReLU()(x), 8, "b1")
    return layers.Dense(3)(layers.GlobalAveragePooling2D()(x))


def test_blocks_are_found_and_taken_out():
    model = network(two_blocks)
    first, second = residual_blocks(model)
    assert (first.add, first.shortcut, first.layers) == ("a", 0, ("a1", "between", "a2"))
    assert second.layers[-1] == "b1"
    for gone in ((first,), (second,), (first, second)):
        smaller = without_blocks(model, gone)
        lost = {name for block in gone for name in (*block.layers, block.add)}
        assert {layer.name for layer in model.layers} - {layer.name for layer in smaller.layers} == lost
        x = [np.random.default_rng(0).normal(size=(2, 6, 6, 4)).astype(np.float32)]
        assert oracle_difference(without_branches(model, gone), smaller, x) < 1e-6
        assert oracle_difference(model, smaller, x) > 1e-3


def projection(x):
    return layers.Add()([conv(x, 4, "one"), conv(x, 4, "other")])


def read_elsewhere(x):
    y = conv(x, 4, "branch")
    return layers.Concatenate()([layers.Add()([x, y]), y])


def shared(x):
    same = layers.Conv2D(4, 3, padding="same", name="same")
    return layers.Add()([layers.Add()([x, same(x)]), same(x)])


def other_source(x):
    return layers.Add()([layers.ReLU()(x), conv(x, 4, "around")])


def broadcast(x):
    return layers.Add()([x, layers.GlobalAveragePooling2D(keepdims=True)(x)])


def twice(x):
    return layers.Add()([x, x])


@pytest.mark.parametrize("body", [projection, read_elsewhere, shared, other_source, broadcast, twice])
def test_what_is_no_block_is_left_alone(body):
    assert residual_blocks(network(body)) == ()


def test_a_branch_that_is_an_output_stays():
    image = tf_keras.Input((6, 6, 4))
    y = conv(image, 4, "branch")
    assert residual_blocks(rewrite(tf_keras.Model(image, [layers.Add()([image, y]), y]))) == ()
