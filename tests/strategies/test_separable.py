"""Depthwise-separable replacement: exact where the kernel is separable, optimal where it is not."""

from __future__ import annotations

import numpy as np
import pytest
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.candidate import Candidate
from compress.data.source import Split, make_data
from compress.errors import CompressError
from compress.graph.selection import Rule, Selection
from compress.metrics.counts import count_macs
from compress.strategies.compact.forms.separable import separable_approximation
from compress.strategies.compact.replace import Compact
from compress.strategies.strategy import Context
from compress.training import Recovery

layers = tf_keras.layers


def compacted(model: tf_keras.Model, before: Candidate | None = None, selection: Selection | None = None, **fields):
    x = np.zeros((8, *model.input_shape[1:]), np.float32)
    part = Split(x, np.arange(8) % 2)
    context = Context(
        "compact",
        make_data("zeros", part, part),
        model,
        Recovery(method="none"),
        0,
        selection=selection or Selection(),
    )
    return Compact(**fields).apply(before or Candidate(model), context)


def composed(depthwise: np.ndarray, pointwise: np.ndarray) -> np.ndarray:
    """The ordinary kernel that a depthwise and a pointwise one amount to, by Keras' definition of the two."""
    height, width, channels, multiplier = depthwise.shape
    kernel = np.zeros((height, width, channels, pointwise.shape[-1]))
    for channel in range(channels):
        for index in range(multiplier):
            weights = pointwise[0, 0, channel * multiplier + index].astype(np.float64)
            kernel[:, :, channel] += depthwise[:, :, channel, index].astype(np.float64)[..., None] * weights
    return kernel


def random_kernel(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


KERNELS = st.builds(
    random_kernel,
    st.integers(0, 1000),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 6)),
)


@given(kernel=KERNELS, multiplier=st.integers(1, 4))
@settings(deadline=None)
def test_the_error_is_the_energy_of_each_channels_tail(kernel, multiplier):
    depthwise, pointwise, error = separable_approximation(kernel, multiplier)
    tails = [
        (
            np.linalg.svd(kernel[:, :, c].reshape(-1, kernel.shape[-1]).astype(np.float64), compute_uv=False)[
                multiplier:
            ]
            ** 2
        )
        for c in range(kernel.shape[2])
    ]
    energy = float((kernel.astype(np.float64) ** 2).sum())
    assert error == pytest.approx(sum(float(tail.sum()) for tail in tails) / energy, abs=1e-6)
    lost = float(((kernel - composed(depthwise, pointwise)) ** 2).sum())
    assert lost / energy == pytest.approx(error, abs=1e-5)


@given(kernel=KERNELS)
@settings(deadline=None)
def test_as_many_filters_as_positions_are_exact(kernel):
    depthwise, pointwise, error = separable_approximation(kernel, kernel.shape[0] * kernel.shape[1])
    assert error == 0
    np.testing.assert_allclose(composed(depthwise, pointwise), kernel, atol=1e-5)


def test_a_kernel_of_zeros_stays_one():
    depthwise, pointwise, error = separable_approximation(np.zeros((3, 3, 2, 4), np.float32), 1)
    assert error == 0
    assert not composed(depthwise, pointwise).any()


@pytest.mark.parametrize(
    "how",
    [
        {"padding": padding, **how}
        for padding in ("same", "valid")
        for how in ({}, {"strides": 2}, {"dilation_rate": 2}, {"dilation_rate": (1, 2)}, {"use_bias": False})
    ],
    ids=str,
)
@pytest.mark.parametrize("multiplier", [1, 2])
def test_a_separable_convolution_is_reproduced(multiplier, how):
    image = tf_keras.Input((10, 9, 4), name="image")
    layer = layers.Conv2D(12, (3, 2), activation="relu", name="conv", **how)
    model = tf_keras.Model(image, layers.GlobalMaxPooling2D()(layer(image)))
    parts = random_kernel(0, (3, 2, 4, multiplier)), random_kernel(1, (1, 1, 4 * multiplier, 12))
    bias = [] if how.get("use_bias") is False else [random_kernel(2, (12,))]
    layer.set_weights([composed(*parts), *bias])
    result = compacted(model, depth_multiplier=multiplier)
    assert isinstance(result.model.get_layer("conv_depthwise"), layers.DepthwiseConv2D)
    assert result.model.get_layer("conv").kernel_size == (1, 1)
    x = random_kernel(3, (3, 10, 9, 4))
    expected = np.asarray(model(x))
    np.testing.assert_allclose(result.model(x), expected, atol=1e-4 * np.abs(expected).max())
    assert result.guarantees[0].check(result.model) == []
    assert count_macs(result.model) < count_macs(model)


def network() -> tf_keras.Model:
    image = tf_keras.Input((8, 8, 8), name="image")
    x = layers.Conv2D(16, 3, padding="same", name="one")(image)
    x = layers.Conv2D(16, 3, padding="same", name="two")(x)
    x = layers.Conv2D(16, 1, name="pointwise")(x)
    model = tf_keras.Model(image, layers.Dense(3, name="dense")(layers.GlobalAveragePooling2D()(x)))
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=w.shape).astype(np.float32) for w in model.get_weights()])
    model.get_layer("two").kernel.assign(composed(random_kernel(0, (3, 3, 16, 1)), random_kernel(1, (1, 1, 16, 16))))
    return model


def test_every_layer_that_pays_is_replaced_and_the_others_are_named():
    model = network()
    result = compacted(model)
    assert result.guarantees[0].layers == {"one", "one_depthwise", "two", "two_depthwise"}
    assert [item.layer for item in result.skipped] == ["pointwise"]
    assert count_macs(result.model) == 64 * (9 * 8 + 8 * 16 + 9 * 16 + 16 * 16 + 16 * 16) + 16 * 3


def test_a_budget_takes_the_least_damaging_layer_first():
    model = network()
    result = compacted(model, macs=0.9)
    assert result.guarantees[0].layers == {"two", "two_depthwise"}
    assert count_macs(result.model) <= 0.9 * count_macs(model)
    assert "one" in {item.layer for item in result.skipped}


def test_a_budget_out_of_reach_is_refused_with_the_limit():
    model = network()
    reachable = count_macs(compacted(model).model) / count_macs(model)
    with pytest.raises(CompressError) as caught:
        compacted(model, macs=0.05)
    assert caught.value.where == "strategy.compact.macs"
    assert f"{reachable:.3f}" in caught.value.expected


def test_a_second_stage_leaves_what_is_separable_alone():
    model = network()
    once = compacted(model)
    twice = compacted(model, once)
    assert [layer.name for layer in twice.model.layers] == [layer.name for layer in once.model.layers]
    assert len(twice.guarantees) == 1


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: layers.Conv2D(16, 3, groups=2, name="layer"), "grouped"),
        (lambda: layers.Conv2D(16, 3, strides=(2, 1), name="layer"), "strides"),
        (lambda: layers.Conv2DTranspose(16, 3, name="layer"), "ordinary"),
        (lambda: layers.Conv2D(1, 3, name="layer"), "cheaper"),
        (lambda: layers.Conv2D(16, 1, name="layer"), "cheaper"),
    ],
)
def test_what_cannot_be_replaced_is_refused_with_the_reason(layer, reason):
    image = tf_keras.Input((8, 8, 8))
    model = tf_keras.Model(image, layer()(image))
    selection = Selection(only=(Rule(name="layer"),))
    assert Compact().targets(model, selection) == frozenset()
    with pytest.raises(CompressError, match=reason):
        compacted(model, selection=selection)
