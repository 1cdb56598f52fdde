"""Copying, flattening and rewriting models, and folding batch norms."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from compress.errors import CompressError
from compress.graph.fold import fold_batch_norm, fold_layer_norm
from compress.graph.kernels import kernels
from compress.graph.rewrite import NewLayer, copy_model, rewrite
from compress.strategies.least_squares import is_linear

layers = tf_keras.layers


@pytest.mark.parametrize("cut", [lambda x: x[..., :2], lambda x: x[:, ..., 1:, :], lambda x: x[..., tf.newaxis, 1]])
def test_an_ellipsis_is_written_out_so_that_the_copy_can_be_saved(cut, tmp_path):
    image = tf_keras.Input((4, 5, 3))
    model = tf_keras.Model(image, layers.Flatten()(cut(image)))
    rewrite(model).save(tmp_path / "copy.keras")
    x = np.random.default_rng(0).normal(size=(2, 4, 5, 3)).astype(np.float32)
    copy = tf_keras.models.load_model(tmp_path / "copy.keras")
    np.testing.assert_array_equal(copy(x), model(x))


def random_weights(model: tf_keras.Model) -> tf_keras.Model:
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.2, 1.0, w.shape).astype(np.float32) for w in model.get_weights()])
    return model


def outputs(model: tf_keras.Model, seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    inputs = [rng.normal(size=(3, *t.shape[1:])).astype(np.float32) for t in model.inputs]
    result = model(inputs if len(inputs) > 1 else inputs[0], training=False)
    return [np.asarray(t) for t in tf.nest.flatten(result)]


def assert_same(a: tf_keras.Model, b: tf_keras.Model) -> None:
    for x, y in zip(outputs(a), outputs(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def residual() -> tf_keras.Model:
    image = tf_keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(4, 3, padding="same", use_bias=False, name="conv1")(image)
    x = layers.BatchNormalization(name="norm1")(x)
    x = layers.ReLU(name="relu1")(x)
    y = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=1, name="depthwise")(x)
    y = layers.BatchNormalization(name="norm2", scale=False)(y)
    y = layers.Add(name="add")([x, tf.pad(y[:, ::1], [[0, 0], [0, 0], [0, 0], [0, 0]])])
    y = layers.GlobalAveragePooling2D(name="pool")(y)
    y = layers.Dense(5, name="dense", use_bias=False)(y)
    y = layers.BatchNormalization(name="norm3", center=False)(y)
    return random_weights(tf_keras.Model(image, y, name="residual"))


def nested() -> tf_keras.Model:
    inner_image = tf_keras.Input((8, 8, 3))
    inner = tf_keras.Model(inner_image, layers.Conv2D(4, 3, name="same_name")(inner_image), name="backbone")
    head = tf_keras.Sequential([tf_keras.Input((6, 6, 4)), layers.Flatten(), layers.Dense(3, name="d")], name="head")
    image = tf_keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(3, 1, name="same_name")(head(inner(image))[:, None, None, :])
    return random_weights(tf_keras.Model(image, x))


def shared() -> tf_keras.Model:
    image = tf_keras.Input((8, 8, 3))
    convolution = layers.Conv2D(3, 3, padding="same", name="twice")
    return random_weights(tf_keras.Model(image, convolution(convolution(image))))


def several() -> tf_keras.Model:
    one, two = tf_keras.Input((4,)), tf_keras.Input((4,))
    x = layers.Concatenate()([one, two, one])
    return random_weights(
        tf_keras.Model([one, two], [layers.Dense(2, name="left")(x), layers.Dense(3, name="right")(x)])
    )


@pytest.mark.parametrize("build", [residual, nested, shared, several])
def test_a_copy_gives_the_same_outputs_and_shares_nothing(build):
    model = build()
    copy = copy_model(model)
    assert_same(model, copy)
    assert not {id(w) for w in model.weights} & {id(w) for w in copy.weights}
    assert not any(isinstance(layer, tf_keras.Model) for layer in copy.layers)
    before = outputs(model)
    copy.set_weights([w * 0 for w in copy.get_weights()])
    np.testing.assert_array_equal(before[0], outputs(model)[0])


def test_outer_names_are_kept_when_a_nested_model_uses_them_too():
    names = [layer.name for layer in copy_model(nested()).layers]
    assert "same_name" in names
    assert "backbone_same_name" in names


def test_a_shared_layer_stays_shared():
    assert [layer.name for layer in copy_model(shared()).layers].count("twice") == 1
    assert len(copy_model(shared()).weights) == 2


def test_a_chain_takes_a_layers_place():
    model = residual()
    kernel = np.asarray(model.get_layer("dense").kernel)
    left, values, right = np.linalg.svd(kernel, full_matrices=False)
    chain = [
        NewLayer(layers.Dense(len(values), use_bias=False, name="dense_reduce"), ((left * values).astype(np.float32),)),
        NewLayer(layers.Dense(5, use_bias=False, name="dense"), (right.astype(np.float32),)),
    ]
    assert_same(model, rewrite(model, {"dense": chain}))


def test_an_empty_chain_removes_a_layer():
    copy = rewrite(residual(), {"relu1": []})
    assert "relu1" not in [layer.name for layer in copy.layers]


def test_unknown_names_and_models_without_a_graph_are_refused():
    with pytest.raises(CompressError, match="no_such_layer"):
        rewrite(residual(), {"no_such_layer": []})

    class Subclassed(tf_keras.Model):
        def call(self, inputs):
            return inputs

    with pytest.raises(CompressError, match="Subclassed"):
        copy_model(Subclassed())
    with pytest.raises(CompressError, match="input shape"):
        copy_model(tf_keras.Sequential([layers.Dense(2)]))


def test_folding_keeps_the_outputs_and_removes_the_norms():
    model = residual()
    folded = fold_batch_norm(model)
    assert_same(model, folded)
    assert not [layer for layer in folded.layers if isinstance(layer, layers.BatchNormalization)]


def test_folding_only_what_is_asked_for():
    folded = fold_batch_norm(residual(), frozenset({"conv1"}))
    assert [layer.name for layer in folded.layers if isinstance(layer, layers.BatchNormalization)] == ["norm2", "norm3"]
    assert_same(residual(), folded)


def test_a_norm_that_is_not_right_after_a_linear_layer_stays():
    image = tf_keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, activation="relu", name="with_activation")(image)
    x = layers.BatchNormalization()(x)
    y = layers.Conv2D(4, 3, name="read_twice")(x)
    x = layers.Concatenate()([layers.BatchNormalization()(y), y])
    model = random_weights(tf_keras.Model(image, x))
    folded = fold_batch_norm(model)
    assert_same(model, folded)
    assert sum(isinstance(layer, layers.BatchNormalization) for layer in folded.layers) == 2


def test_multiply_adds_of_kernels():
    by_name = {kernel.name: kernel.macs for kernel in kernels(residual())}
    assert by_name == {"conv1/kernel": 8 * 8 * 27 * 4, "depthwise/depthwise_kernel": 8 * 8 * 9 * 4, "dense/kernel": 20}
    assert [kernel.macs for kernel in kernels(shared())] == [2 * 64 * 81]


def hand_written_attention() -> tf_keras.Model:
    image = tf_keras.Input((6, 4))
    query, key, value = (layers.Dense(4, name=name)(image) for name in ("query", "key", "value"))
    weights = tf.nn.softmax(tf.einsum("bqd,bkd->bqk", query, key))
    return random_weights(tf_keras.Model(image, layers.Dense(2)(tf.einsum("bqk,bkd->bqd", weights, value))))


def test_multiply_adds_beside_calls_whose_first_argument_is_no_tensor():
    model = hand_written_attention()
    assert {kernel.macs for kernel in kernels(model)} == {6 * 16, 6 * 8}
    assert_same(model, rewrite(model))
    assert {kernel.macs for kernel in kernels(rewrite(model))} == {6 * 16, 6 * 8}


def test_multiply_adds_of_a_transposed_convolution_shared_by_two_sizes():
    layer = layers.Conv2DTranspose(3, 2, name="up")
    small, large = tf_keras.Input((4, 5, 2)), tf_keras.Input((6, 7, 2))
    (kernel,) = kernels(tf_keras.Model([small, large], [layer(small), layer(large)]))
    assert kernel.macs == (4 * 5 + 6 * 7) * 2 * 2 * 2 * 3


def test_einstein_sums_can_be_saved_and_loaded_in_the_copy(tmp_path):
    model = hand_written_attention()
    rewrite(model).save(tmp_path / "model.keras")
    assert_same(model, tf_keras.models.load_model(tmp_path / "model.keras"))


def test_an_einstein_sum_of_another_form_stays():
    image = tf_keras.Input((4, 4))
    model = tf_keras.Model(image, [tf.einsum("bii->b", image), tf.einsum("...d,...d->...", image, image)])
    x = np.random.default_rng(0).normal(size=(2, 4, 4)).astype(np.float32)
    trace, norms = rewrite(model)(x)
    np.testing.assert_allclose(trace, x.trace(axis1=1, axis2=2), rtol=1e-5)
    np.testing.assert_allclose(norms, (x**2).sum(-1), rtol=1e-5)


def test_a_layer_norm_is_folded_into_all_dense_layers_that_read_it():
    image = tf_keras.Input((5, 4))
    normed = layers.LayerNormalization(name="norm")(image)
    both = layers.Dense(3, use_bias=False, name="left")(normed), layers.Dense(3, "relu", name="right")(normed)
    model = random_weights(tf_keras.Model(image, layers.Add()(both)))
    folded = fold_layer_norm(model)
    assert folded.get_layer("norm").weights == []
    x = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32)
    np.testing.assert_allclose(folded.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-4, atol=1e-5)
    assert fold_layer_norm(model, {"left"}) is model
    other = tf_keras.Model(image, layers.Add()([layers.Dense(4)(x := layers.LayerNormalization()(image)), x]))
    assert fold_layer_norm(other) is other


class StandardisedConvolution(layers.Conv2D):
    """Does something of its own with its kernel."""

    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, kernel - tf.reduce_mean(kernel, [0, 1, 2], keepdims=True))


@pytest.mark.parametrize(
    ("convolution", "norm"),
    [
        (StandardisedConvolution, layers.BatchNormalization()),
        (layers.Conv2D, layers.BatchNormalization(axis=[3, 2])),
    ],
    ids=["own convolution", "two axes"],
)
def test_what_only_looks_like_a_pair_is_not_folded(convolution, norm):
    image = tf_keras.Input((5, 5, 3))
    conv = convolution(4, 3, name="conv")
    model = random_weights(tf_keras.Model(image, layers.Flatten()(norm(conv(image)))))
    folded = fold_batch_norm(model)
    assert norm.name in {layer.name for layer in folded.layers}
    x = np.random.default_rng(1).normal(size=(2, 5, 5, 3)).astype(np.float32)
    np.testing.assert_allclose(folded(x), model(x), rtol=1e-5, atol=1e-5)
    assert is_linear(model.get_layer("conv")) == (convolution is layers.Conv2D)


def test_a_network_may_be_deeper_than_python_recurses():
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    try:
        image = x = tf_keras.Input((2,))
        for index in range(600):
            x = tf_keras.layers.ReLU(name=f"relu{index}")(x)
        model = tf_keras.Model(image, x)
        two = {
            layer.name: [NewLayer(tf_keras.layers.ReLU(name=f"{layer.name}_{half}")) for half in "ab"]
            for layer in model.layers[1:]
        }
        assert len(rewrite(model, two).layers) == 1201
    finally:
        sys.setrecursionlimit(before)
