"""What is rounded folded or unfolded is the same network, on the same levels."""

from __future__ import annotations

import numpy as np
import pytest
import tf_keras

from compress.candidate import Grid
from compress.graph.fold import fold_batch_norm
from compress.graph.kernels import get_variable, get_weight
from compress.strategies.quantization.unfolding import fold_grids, folded_ranges, unfold

layers = tf_keras.layers
KERNELS = ("conv/kernel", "depth/depthwise_kernel", "dense/kernel")
BITS = 4


@pytest.fixture(scope="module")
def model() -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((6, 6, 3))
    x = layers.Conv2D(8, 3, use_bias=False, name="conv")(image)
    x = layers.ReLU()(layers.BatchNormalization(name="conv_norm")(x))
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="depth")(x)
    x = layers.ReLU()(layers.BatchNormalization(name="depth_norm")(x))
    built = tf_keras.Model(image, layers.Dense(4, name="dense")(layers.GlobalAveragePooling2D()(x)))
    rng = np.random.default_rng(0)
    for name in ("conv_norm", "depth_norm"):
        for weight in built.get_layer(name).weights:
            weight.assign(rng.uniform(0.3, 1.5, weight.shape) * rng.choice([1, -1] if "gamma" in weight.name else [1]))
    return built


def rounded(model: tf_keras.Model) -> tuple[tf_keras.Model, dict[str, Grid]]:
    """Round the folded kernels, and move the biases as a repair would."""
    result, grids = fold_batch_norm(model), {}
    for name in KERNELS:
        kernel = get_weight(result, name)
        inner = tuple(range(kernel.ndim - (2 if "depthwise" in name else 1)))
        steps = np.maximum(np.abs(kernel).max(inner, keepdims=True), 1e-9) / 7
        get_variable(result, name).assign(np.rint(kernel / steps) * steps)
        bias = result.get_layer(name.partition("/")[0]).bias
        bias.assign(bias + np.random.default_rng(1).normal(size=bias.shape) * 0.1)
        grids[name] = Grid(steps, BITS)
    return result, grids


def test_unfolded_it_computes_the_same(model):
    changed, grids = rounded(model)
    result, steps = unfold(model, changed, grids)
    x = np.random.default_rng(2).normal(size=(16, 6, 6, 3)).astype(np.float32)
    np.testing.assert_allclose(result(x), changed(x), atol=1e-4)
    assert np.abs(np.asarray(result(x)) - np.asarray(model(x))).max() > 0.05
    for name in KERNELS:
        levels = get_weight(result, name) / steps[name]
        np.testing.assert_allclose(levels, np.rint(levels), atol=1e-3)


def test_an_output_that_is_switched_off_has_steps_that_can_be_divided_by():
    image = tf_keras.Input((6, 6, 3))
    norm = layers.BatchNormalization(name="norm")
    network = tf_keras.Model(image, norm(layers.Conv2D(4, 3, name="conv")(image)))
    norm.gamma.assign([0, 1e-30, 1, 1])
    folded, grids = fold_grids(network, {"conv/kernel": np.full((1, 1, 1, 4), 1e-12)}, {"conv/kernel": BITS})
    steps = grids["conv/kernel"].steps
    assert steps.dtype == np.float32
    assert (steps > 0).all()
    assert np.isfinite(get_weight(folded, "conv/kernel") / steps).all()


def test_there_and_back(model):
    changed, grids = rounded(model)
    folded, found = fold_grids(*(unfolded := unfold(model, changed, grids)), dict.fromkeys(unfolded[1], BITS))
    for name in KERNELS:
        np.testing.assert_allclose(get_weight(folded, name), get_weight(changed, name), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found[name].steps, grids[name].steps, rtol=1e-4)


def test_an_output_that_is_switched_off_keeps_its_weights(model):
    off = tf_keras.models.clone_model(model)
    off.set_weights(model.get_weights())
    gamma = off.get_layer("conv_norm").gamma
    gamma.assign(np.where(np.arange(8) == 3, 0, gamma))
    result, steps = unfold(off, *rounded(off))
    np.testing.assert_array_equal(get_weight(result, "conv/kernel")[..., 3], get_weight(off, "conv/kernel")[..., 3])
    assert np.isfinite(steps["conv/kernel"]).all()
    assert (steps["conv/kernel"] > 0).all()


def test_ranges_go_to_the_layer_that_is_left(model):
    assert folded_ranges(model, {"conv_norm": (0.0, 1.0), "dense": (-1.0, 2.0)}) == {
        "conv": (0.0, 1.0),
        "dense": (-1.0, 2.0),
    }
