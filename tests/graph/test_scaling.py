"""Narrower and shallower copies: the counts of papers, the proportions of stages, weights kept or drawn anew."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from compress.data.noise import Noise
from compress.graph.fold import fold_batch_norm
from compress.graph.rewrite import copy_model, rewrite
from compress.graph.scaling import narrower, shallower, with_fresh_weights
from compress.metrics.counts import count_params
from compress.models.mobilenet import MobileNetV1
from compress.models.resnet import cifar_resnet

from .zoo import ZOO, functional, samples

layers = tf_keras.layers


def params_of_cifar_resnet(depth: int, width: int) -> int:
    """Trainable parameters of a CIFAR ResNet with parameter-free shortcuts whose stages have w, 2w and 4w channels."""
    stages = [(width, width), (width, 2 * width), (2 * width, 4 * width)]
    convolutions = 9 * 3 * width + 2 * width
    for inputs, outputs in stages:
        sizes = [inputs] + [outputs] * ((depth - 2) // 3 - 1)
        convolutions += sum(9 * size * outputs + 2 * outputs for size in sizes)
    return convolutions + 4 * width * 10 + 10


@pytest.fixture(scope="module")
def resnet56() -> tf_keras.Model:
    return copy_model(cifar_resnet(56))


def test_the_oracle_counts_what_papers_publish():
    # He et al., arXiv 1512.03385, table 6: 0.27 and 0.85 million.
    assert params_of_cifar_resnet(20, 16) == 269_722
    assert params_of_cifar_resnet(56, 16) == 853_018


def test_a_narrower_resnet_keeps_the_proportions_of_its_stages(resnet56):
    half = narrower(resnet56, 0.5)
    assert count_params(half.model) == params_of_cifar_resnet(56, 8)
    assert {layer.filters for layer in half.model.layers if isinstance(layer, layers.Conv2D)} == {8, 16, 32}
    assert half.left_alone == (("logits", "an output of the model"),)
    assert {"stem", "stage2_block1_conv1", "stage3_block9_conv2"} <= set(half.changed)


def test_a_third_of_the_blocks_of_resnet56_is_resnet20(resnet56):
    third = shallower(resnet56, 1 / 3)
    assert count_params(third.model) == params_of_cifar_resnet(20, 16)
    blocks = [layer.name.removesuffix("_add") for layer in third.model.layers if layer.name.endswith("_add")]
    assert blocks == [
        *("stage1_block2", "stage1_block5", "stage1_block8"),
        *("stage2_block1", "stage2_block4", "stage2_block8"),
        *("stage3_block1", "stage3_block4", "stage3_block8"),
    ]
    before = {weight.name: weight for weight in resnet56.weights}
    for weight in third.model.weights:
        np.testing.assert_array_equal(weight, before[weight.name])


def test_half_of_mobilenet_is_the_one_that_its_authors_call_half():
    data = Noise(shape=(32, 32, 3), classes=10, samples=2).load()
    whole, published = (MobileNetV1(weights="random", alpha=alpha).build(data, 0) for alpha in (1.0, 0.5))
    assert count_params(narrower(copy_model(whole), 0.5).model) == count_params(published)
    # Depthwise and pointwise convolutions go as one.
    shallow = shallower(copy_model(whole), 0.5)
    gone = set(shallow.changed)
    assert {"conv_pw_11", "conv_pw_13"} <= gone
    for number in range(1, 14):
        assert (f"conv_dw_{number}" in gone) == (f"conv_pw_{number}" in gone)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_odd_network_can_be_narrowed_to_a_channel(name):
    model = copy_model(ZOO[name]())
    for share in (0.5, 0.01):
        small = narrower(model, share).model
        assert [t.shape for t in small.outputs] == [t.shape for t in model.outputs]
        # No channel axis is empty, and grouped layers have their groups left: it runs.
        for output in tf.nest.flatten(small(samples(model))):
            assert np.isfinite(output).all()
        assert all(np.prod(weight.shape) > 0 for weight in small.weights)
        assert count_params(small) <= count_params(model)


def test_the_channels_of_the_largest_weights_stay():
    def body(x):
        return layers.Dense(3, name="head")(layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3, name="conv")(x)))

    model = copy_model(functional((6, 6, 3), body)())
    kernel, bias = model.get_layer("conv").get_weights()
    kernel[..., [1, 3]] *= 10.0
    model.get_layer("conv").set_weights([kernel, bias])
    small = narrower(model, 0.5).model
    np.testing.assert_array_equal(small.get_layer("conv").kernel, kernel[..., [1, 3]])
    np.testing.assert_array_equal(small.get_layer("head").kernel, np.asarray(model.get_layer("head").kernel)[[1, 3]])


def plain(x):
    for index in range(4):
        x = layers.Conv2D(6, 3, padding="same", name=f"conv{index}")(x)
        x = layers.ReLU(name=f"relu{index}")(layers.BatchNormalization(name=f"norm{index}")(x))
    return layers.Dense(3, name="head")(layers.GlobalAveragePooling2D()(x))


def test_a_network_without_blocks_loses_layers_with_what_belongs_to_them():
    model = copy_model(functional((6, 6, 3), plain)())
    half = shallower(model, 0.5)
    # conv0 changes the number of channels: it stays, and one of the others beside it.
    assert half.changed == ("conv1", "norm1", "relu1", "conv3", "norm3", "relu3")
    kept = rewrite(model, {name: [] for name in half.changed})
    x = samples(model)
    np.testing.assert_array_equal(half.model(x), kept(x))


def test_nothing_is_dropped_where_every_layer_changes_the_shape():
    model = copy_model(ZOO["plain"]())
    assert shallower(model, 0.5).changed == ()


def test_the_original_stays_as_it_was(resnet56):
    before = [weight.copy() for weight in resnet56.get_weights()]
    fresh = with_fresh_weights(narrower(resnet56, 0.5).model, 3)
    shallower(resnet56, 0.5)
    for one, other in zip(before, resnet56.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not {id(w) for w in fresh.weights} & {id(w) for w in resnet56.weights}


def test_fresh_weights_are_drawn_by_the_seed(resnet56):
    small = narrower(resnet56, 0.25).model
    one, same, other = (with_fresh_weights(small, seed).get_weights() for seed in (1, 1, 2))
    for a, b in zip(one, same, strict=True):
        np.testing.assert_array_equal(a, b)
    kernels = [index for index, weight in enumerate(one) if weight.ndim > 1]
    for index in kernels:
        assert not np.array_equal(one[index], other[index])
        assert one[index].std() > 0
    # He's initialisation of what the narrow layer reads, not of what the wide one read.
    block = with_fresh_weights(small, 1).get_layer("stage3_block9_conv2").kernel
    assert np.std(block) == pytest.approx(np.sqrt(2 / (9 * block.shape[2])), rel=0.1)


def test_fresh_weights_leave_what_is_not_trained():
    def body(x):
        normal = layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[1.0, 4.0, 9.0], name="normal")
        adapted = layers.Normalization(name="adapted")
        adapted.adapt(np.random.default_rng(0).normal(3, 2, (50, 6, 6, 3)).astype(np.float32))
        x = layers.Conv2D(4, 3, name="frozen", trainable=False)(adapted(normal(x)))
        return layers.Dense(3, name="head", kernel_initializer="zeros")(layers.GlobalAveragePooling2D()(x))

    image = tf_keras.Input((6, 6, 3))
    model = copy_model(tf_keras.Model(image, body(image)))
    fresh = with_fresh_weights(model, 0)
    for name in ("adapted", "frozen"):
        for one, other in zip(model.get_layer(name).get_weights(), fresh.get_layer(name).get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)
    # A kernel of zeros would stay one in all outputs alike.
    assert np.std(fresh.get_layer("head").kernel) > 0


def test_a_folded_network_gets_fresh_weights_too(resnet56):
    fresh = with_fresh_weights(fold_batch_norm(resnet56), 5)
    assert np.std(fresh.get_layer("stage1_block1_conv1").kernel) == pytest.approx(np.sqrt(2 / (9 * 16)), rel=0.1)
