"""Quantizers of weights: values and gradients against NumPy, from the formulas of the papers."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.graph.kernels import kernels
from compress.strategies.quantization.binary_connect import SignQuantizer
from compress.strategies.quantization.binary_filters import ScaledSignQuantizer
from compress.strategies.quantization.dorefa import DoReFa, SquashedQuantizer
from compress.strategies.quantization.power_of_two import PowerOfTwoQuantizer
from compress.strategies.quantization.quantizers import StepQuantizer, UniformQuantizer
from compress.strategies.quantization.ternary import TernaryQuantizer
from compress.strategies.quantization.trained_ternary import TrainedTernaryQuantizer

SHAPE = (3, 3, 4, 5)
seeds = given(seed=st.integers(0, 10_000))
few = settings(deadline=None, max_examples=15)


def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A kernel, and the gradient that comes back from the network."""
    rng = np.random.default_rng(seed)
    return rng.normal(0, 0.3, SHAPE).astype(np.float32), rng.normal(size=SHAPE).astype(np.float32)


def run(quantizer, kernel: np.ndarray, upstream: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """What the quantizer gives, and the gradients of the kernel and of its own variables."""
    latent = tf.Variable(kernel)
    with tf.GradientTape() as tape:
        quantized = quantizer(latent.value())
    gradients = tape.gradient(quantized, [latent, *quantizer.variables], output_gradients=tf.constant(upstream))
    return quantized.numpy(), [np.asarray(g) for g in gradients]


@seeds
@few
def test_uniform(seed):
    kernel, upstream = draw(seed)
    value, (gradient,) = run(UniformQuantizer(4, (-1,), 4), kernel, upstream)
    steps = np.abs(kernel).max((0, 1, 2)) / 7
    np.testing.assert_allclose(value, np.rint(kernel / steps) * steps, atol=1e-6)
    np.testing.assert_array_equal(gradient, upstream)


@seeds
@few
def test_learned_steps(seed):
    kernel, upstream = draw(seed)
    steps = np.random.default_rng(seed).uniform(0.02, 0.2, (1, 1, 1, 5)).astype(np.float32)
    value, (gradient, of_steps) = run(StepQuantizer(4, steps, kernel.size, trained=True), kernel, upstream)
    relative = kernel / steps
    inside = np.abs(relative) < 7
    np.testing.assert_allclose(value, np.clip(np.rint(relative), -7, 7) * steps, atol=1e-6)
    np.testing.assert_allclose(gradient, upstream * inside, atol=1e-6)
    # Equation 3, and the scale of section 2.2: the weights of one output, times the outermost level.
    slope = np.where(inside, np.rint(relative) - relative, np.sign(relative) * 7)
    wanted = (upstream * slope).sum((0, 1, 2), keepdims=True) / np.sqrt(kernel.size / 5 * 7)
    np.testing.assert_allclose(of_steps, wanted, rtol=1e-3, atol=1e-4)


def test_given_steps_are_not_trained():
    quantizer = StepQuantizer(4, np.full((1, 1, 1, 5), 0.1), 180, trained=False)
    assert quantizer.variables == []


@seeds
@few
def test_sign(seed):
    kernel, upstream = draw(seed)
    value, (gradient,) = run(SignQuantizer(0.25), kernel, upstream)
    np.testing.assert_allclose(value, np.where(kernel >= 0, 0.25, -0.25))
    np.testing.assert_array_equal(gradient, upstream)


@seeds
@few
def test_scaled_sign(seed):
    kernel, upstream = draw(seed)
    value, (gradient,) = run(ScaledSignQuantizer((0, 1, 2)), kernel, upstream)
    scale, sign = np.abs(kernel).mean((0, 1, 2)), np.where(kernel >= 0, 1.0, -1.0)
    np.testing.assert_allclose(value, sign * scale, atol=1e-6)
    through_scale = (upstream * sign).sum((0, 1, 2)) * np.sign(kernel) / 36
    np.testing.assert_allclose(gradient, upstream * scale * (np.abs(kernel) <= 1) + through_scale, atol=1e-4)


@seeds
@few
def test_ternary(seed):
    kernel, upstream = draw(seed)
    value, (gradient,) = run(TernaryQuantizer(0.7), kernel, upstream)
    above = np.abs(kernel) > 0.7 * np.abs(kernel).mean()
    np.testing.assert_allclose(value, np.sign(kernel) * above * np.abs(kernel)[above].mean(), atol=1e-6)
    np.testing.assert_array_equal(gradient, upstream)


@seeds
@few
def test_trained_ternary(seed):
    kernel, upstream = draw(seed)
    quantizer = TrainedTernaryQuantizer(kernel, 0.2)
    value, (gradient, of_sizes) = run(quantizer, kernel, upstream)
    limit = 0.2 * np.abs(kernel).max()
    above, below = kernel > limit, kernel < -limit
    sizes = [kernel[above].mean(), -kernel[below].mean()]
    np.testing.assert_allclose(value, above * sizes[0] - below * sizes[1], atol=1e-6)
    wanted = np.array([upstream[above].sum(), -upstream[below].sum()]) / np.sqrt(kernel.size)
    np.testing.assert_allclose(of_sizes, wanted, rtol=1e-3, atol=1e-3)
    factor = np.where(above, sizes[0], np.where(below, sizes[1], 1))
    np.testing.assert_allclose(gradient, upstream * factor, atol=1e-5)


@seeds
@few
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_squashed(bits, seed):
    kernel, upstream = draw(seed)
    size = float(np.abs(kernel).max())
    value, (gradient,) = run(SquashedQuantizer(bits, size), kernel, upstream)
    squashed = np.tanh(kernel / size)
    share = squashed / (2 * np.abs(squashed).max()) + 0.5
    most = 2**bits - 1
    np.testing.assert_allclose(value, (2 * np.rint(share * most) / most - 1) * size, atol=1e-5)
    # Where the weight is not the largest one: d tanh / dw over the largest.
    inner = np.abs(squashed) < np.abs(squashed).max() * 0.999
    np.testing.assert_allclose(
        gradient[inner], (upstream * (1 - squashed**2) / np.abs(squashed).max())[inner], rtol=1e-3, atol=1e-5
    )


@seeds
@few
@pytest.mark.parametrize("bits", [2, 3, 5])
def test_powers_of_two(bits, seed):
    kernel, upstream = draw(seed)
    value, (gradient,) = run(PowerOfTwoQuantizer(bits, float(np.abs(kernel).max())), kernel, upstream)
    np.testing.assert_array_equal(gradient, upstream)
    sizes = np.unique(np.abs(value[value != 0]))
    np.testing.assert_array_equal(np.log2(sizes), np.rint(np.log2(sizes)))
    assert len(sizes) <= 2 ** (bits - 2)
    # The largest power is the one below four thirds of the largest weight (equation 2).
    largest = 4 * np.abs(kernel).max() / 3
    assert largest / 2 < sizes.max() <= largest
    powers = sizes.max() / 2.0 ** np.arange(2 ** (bits - 2))
    every = np.concatenate([-powers, [0], powers])
    nearest = np.abs(kernel[..., None] - every).min(-1)
    np.testing.assert_allclose(np.abs(kernel - value), nearest, atol=1e-6)


QUANTIZERS = {
    "sign": lambda kernel: SignQuantizer(0.2),
    "scaled sign": lambda kernel: ScaledSignQuantizer((-4, -3, -2)),
    "ternary": lambda kernel: TernaryQuantizer(0.7),
    "trained ternary": lambda kernel: TrainedTernaryQuantizer(kernel, 0.05),
    "squashed": lambda kernel: SquashedQuantizer(3, float(np.abs(kernel).max())),
    "power of two": lambda kernel: PowerOfTwoQuantizer(4, float(np.abs(kernel).max())),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_levels_that_it_tells_are_those_that_it_gives(name):
    kernel, _ = draw(1)
    quantizer = QUANTIZERS[name](kernel)
    value = quantizer(tf.constant(kernel)).numpy()
    levels, scales = quantizer.levels(value)
    assert np.all(np.diff(levels) > 0)
    relative = value / scales
    assert np.abs(relative[..., None] - levels).min(-1).max() < 1e-5
    assert len(np.unique(np.round(relative, 5))) > 1


def test_one_bit_of_dorefa_is_the_sign_times_the_mean_size():
    layer = tf_keras.layers.Conv2D(4, 3, name="conv")
    model = tf_keras.Sequential([tf_keras.layers.Input((8, 8, 3)), layer])
    (kernel,) = kernels(model)
    value, _ = run(DoReFa(bits=1).quantizer(kernel), kernel.value, np.ones_like(kernel.value))
    np.testing.assert_allclose(value, np.sign(kernel.value) * np.abs(kernel.value).mean(), rtol=1e-5)
