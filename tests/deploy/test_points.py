"""Where an integer file quantizes what a model computes, and which tensors share a scale."""

from __future__ import annotations

import numpy as np
import pytest
import tf_keras

from compress.candidate import Calibration, Candidate, Storage
from compress.data.source import Augmentation, Data, Split
from compress.deploy.points import calibrated_points
from compress.deploy.tflite import export
from compress.graph.rewrite import named_calls
from compress.metrics.tflite_file import TFLiteFile

layers = tf_keras.layers
MINMAX = Calibration(8, "minmax")


def conv(value, name, activation=None):
    return layers.Conv2D(4, 1, name=name, activation=activation, kernel_initializer="random_normal")(value)


def dense_block(value):
    a = conv(value, "a")
    b = conv(a, "b")
    c1 = layers.Concatenate(name="c1")([a, b])
    return layers.Concatenate(name="c2")([c1, conv(c1, "c", "relu")])


def read_by_two(value):
    a = conv(value, "a")
    b = conv(a, "b")
    c1, c2 = layers.Concatenate(name="c1")([a, b]), layers.Concatenate(name="c2")([a, conv(b, "c")])
    return layers.Add(name="sum")([conv(c1, "d"), conv(c2, "e")])


def pooled(value):
    a = conv(value, "a")
    parts = layers.MaxPooling2D(2, name="p")(a), layers.AveragePooling2D(2, name="q")(conv(a, "b"))
    return layers.UpSampling2D(2, name="u")(layers.Concatenate(name="c1")(parts))


def largest(value):
    return layers.Maximum(name="m")([conv(value, "a"), conv(value, "b")])


def called_twice(value):
    twice = layers.Conv2D(4, 1, name="twice", activation="relu", kernel_initializer="random_normal")
    pool = layers.MaxPooling2D(2, 1, padding="same", name="pool")
    return pool(twice(pool(twice(conv(value, "a")))))


def normed(value):
    a = layers.BatchNormalization(name="n", gamma_initializer="random_normal")(conv(value, "a", "relu"))
    rows = layers.BatchNormalization(name="rows", beta_initializer="ones")(layers.Reshape((64, 4), name="r")(a))
    return layers.Reshape((8, 8, 4), name="back")(rows)


@pytest.mark.parametrize("body", [dense_block, read_by_two, pooled, largest, called_twice, normed])
def test_each_layer_has_the_scale_that_it_has_in_the_file(body, tmp_path):
    tf_keras.utils.set_random_seed(0)
    image = layers.Input((8, 8, 3), name="image")
    # The last layer's tensor gets another name when it is quantized.
    model = tf_keras.Model(image, conv(body(image), "last"))
    rng = np.random.default_rng(0)
    split = Split(rng.normal(size=(16, 8, 8, 3)).astype(np.float32), np.arange(16) % 4)
    data = Data("random", split, split, split, 4, Augmentation(), "")
    points, ranges = calibrated_points(Candidate(model), data, MINMAX)
    artifact = export(Candidate(model, storage=Storage("int8", MINMAX, (), ranges)), data, tmp_path / "model.tflite")
    scales = {tensor.name: tensor.scales for tensor in TFLiteFile.read(artifact.path).tensors}
    compared = set()
    for layer, (name, *_) in points.tensors.items():
        if name in scales and layer not in ("image", "last"):
            low, high = ranges[points.tied.get(layer, layer)]
            np.testing.assert_allclose(scales[name], (high - low) / 255, rtol=1e-3, err_msg=layer)
            compared.add(layer)
    assert compared >= {name for name, _ in named_calls(model)} - {"image", "last"}


def test_what_says_which_words_to_look_up_is_not_rounded():
    words = tf_keras.Input((12,))
    x = layers.Embedding(1000, 4, name="embedding")(words)
    model = tf_keras.Model(words, layers.Dense(3, name="dense")(layers.GlobalAveragePooling1D(name="mean")(x)))
    part = Split(np.random.default_rng(0).integers(0, 1000, (64, 12)).astype(np.float32), np.arange(64) % 3)
    data = Data("words", part, part, part, 3, Augmentation(), "identity")
    _, ranges = calibrated_points(Candidate(model), data, MINMAX)
    assert {"embedding", "mean", "dense"} & ranges.keys()
    assert model.inputs[0].name not in ranges
