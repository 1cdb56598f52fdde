"""Parameters and multiply-adds of Keras models, against counts made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.graph.macs import uncounted
from compress.metrics.counts import count_macs, count_nonzero_params, count_params

layers = tf_keras.layers


def chain(shape: tuple[int, ...], *parts: tf_keras.layers.Layer) -> tf_keras.Model:
    image = tf_keras.Input(shape)
    x = image
    for part in parts:
        x = part(x)
    return tf_keras.Model(image, x)


def positions(size: int, window: int, stride: int, padding: str) -> int:
    """How often a window fits: the definition in TensorFlow's documentation of ``tf.nn.convolution``."""
    return math.ceil(size / stride) if padding == "same" else len(range(0, size - window + 1, stride))


@given(
    height=st.integers(5, 11),
    width=st.integers(5, 11),
    channels=st.integers(1, 4),
    filters=st.integers(1, 5),
    window=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    padding=st.sampled_from(["same", "valid"]),
    multiplier=st.integers(1, 3),
)
@settings(deadline=None, max_examples=20)
def test_multiply_adds_of_convolutions(height, width, channels, filters, window, stride, padding, multiplier):
    places = positions(height, window[0], stride, padding) * positions(width, window[1], stride, padding)
    common = {"strides": stride, "padding": padding}
    ordinary = chain((height, width, channels), layers.Conv2D(filters, window, **common))
    depthwise = chain((height, width, channels), layers.DepthwiseConv2D(window, depth_multiplier=multiplier, **common))
    area = window[0] * window[1]
    assert count_macs(ordinary) == places * area * channels * filters
    assert count_macs(depthwise) == places * area * channels * multiplier


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        # Every one of the 4 x 5 input pixels is multiplied by the whole 3 x 3 x 2 x 6 kernel.
        (lambda: chain((4, 5, 2), layers.Conv2DTranspose(6, 3, strides=2, padding="same")), 4 * 5 * 9 * 2 * 6),
        (lambda: chain((7, 6), layers.Dense(5)), 7 * 6 * 5),
        (lambda: chain((6,), layers.Dense(5)), 6 * 5),
        (lambda: chain((8, 8, 4), layers.Conv2D(6, 3, groups=2)), 6 * 6 * 9 * 2 * 6),
        (lambda: chain((8, 4), layers.Conv1D(6, 3)), 6 * 3 * 4 * 6),
        (
            lambda: chain((8, 8, 4), layers.SeparableConv2D(6, 3, depth_multiplier=2)),
            6 * 6 * (9 * 4 * 2 + 4 * 2 * 6),
        ),
        (lambda: chain((8, 8, 3), layers.BatchNormalization(), layers.ReLU(), layers.MaxPooling2D()), 0),
    ],
    ids=["transposed", "dense-3d", "dense", "grouped", "conv1d", "separable", "nothing"],
)
def test_multiply_adds_by_hand(model, expected):
    assert count_macs(model()) == expected


def test_a_layer_that_is_called_twice_works_twice_and_is_stored_once():
    image = tf_keras.Input((8, 8, 3))
    twice = layers.Conv2D(3, 3, padding="same")
    model = tf_keras.Model(image, twice(twice(image)))
    assert count_macs(model) == 2 * 64 * 81
    assert count_params(model) == 81 + 3


def test_parameters_are_the_trainable_ones():
    model = chain((8, 8, 3), layers.Conv2D(4, 3, use_bias=False), layers.BatchNormalization(), layers.Dense(2))
    # Kernel; gamma and beta, but not the moving mean and variance; kernel and bias.
    assert count_params(model) == 9 * 3 * 4 + 2 * 4 + (4 * 2 + 2)


def test_only_exact_zeros_do_not_count():
    model = chain((3,), layers.Dense(4))
    kernel = np.array([[0, 1, -1, 1e-30], [0, 0, 2, 3], [-0.0, 1, 1, 1]], np.float32)
    model.set_weights([kernel, np.array([0, 0, 5, 0], np.float32)])
    assert count_nonzero_params(model) == 8 + 1
    assert count_params(model) == 16


def test_frozen_layers_count():
    model = tf_keras.Sequential([tf_keras.Input((4,)), tf_keras.layers.Dense(3), tf_keras.layers.BatchNormalization()])
    before = count_params(model)
    model.trainable = False
    assert count_params(model) == before == 4 * 3 + 3 + 2 * 3


def test_recurrent_layers_multiply_at_every_step():
    sequence = layers.LSTM(5, return_sequences=True), layers.GRU(3)
    # Four and three gates; inputs of 4 and 5 numbers, 7 steps.
    assert count_macs(chain((7, 4), *sequence)) == 7 * 4 * (4 * 5 + 5 * 5) + 7 * 3 * (5 * 3 + 3 * 3)
    assert count_macs(chain((7, 4), layers.Bidirectional(layers.SimpleRNN(5)))) == 2 * 7 * (4 * 5 + 5 * 5)


def test_a_layer_at_every_step_counts_at_each():
    assert count_macs(chain((7, 4), layers.TimeDistributed(layers.Dense(3)))) == 7 * 4 * 3
    convolution = layers.TimeDistributed(layers.Conv2D(3, 3, padding="same"))
    assert count_macs(chain((2, 6, 6, 4), convolution)) == 2 * 36 * 9 * 4 * 3
    cell = layers.ConvLSTM2D(3, 3, padding="same")
    assert count_macs(chain((2, 6, 6, 4), cell)) == 2 * 36 * 9 * 4 * (4 * 3 + 3 * 3)


def test_attention_multiplies_by_its_four_kernels():
    query, value = tf_keras.Input((5, 6)), tf_keras.Input((9, 4))
    model = tf_keras.Model([query, value], layers.MultiHeadAttention(2, 3, value_dim=7)(query, value))
    assert count_macs(model) == 5 * 6 * 2 * 3 + 9 * 4 * 2 * 3 + 9 * 4 * 2 * 7 + 5 * 2 * 7 * 6


def test_a_transposed_volume_counts_its_inputs():
    assert count_macs(chain((3, 3, 3, 2), layers.Conv3DTranspose(4, 3, strides=2))) == 27 * 27 * 2 * 4


def test_what_is_not_counted_is_told():
    class Mine(layers.Layer):
        def build(self, shape):
            self.matrix = self.add_weight("matrix", (shape[-1], 3))

        def call(self, inputs):
            return inputs @ self.matrix

    assert uncounted(chain((4,), layers.Dense(5), Mine(name="mine"))) == ["mine"]
    assert uncounted(chain((4,), layers.Embedding(9, 3), layers.LSTM(2), layers.PReLU(), layers.Dense(5))) == []
