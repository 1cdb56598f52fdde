"""Hints: the formula, which layers are paired, one pass of the teacher for all terms."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from compress.candidate import Candidate
from compress.data.source import Augmentation, Split, make_data
from compress.errors import CompressError
from compress.graph.rewrite import copy_model
from compress.strategies.distillation.hints import Hints, hint_layers
from compress.strategies.distillation.soft_targets import SoftTargets
from compress.strategies.distillation.teacher import Teacher
from compress.strategies.strategy import Context
from compress.training import Batch, Recovery

layers = tf_keras.layers


def residual(inner: int = 6, seed: int = 0) -> tf_keras.Model:
    tf_keras.utils.set_random_seed(seed)
    image = tf_keras.Input((8, 8, 1))
    x = layers.Conv2D(4, 3, padding="same", name="stem")(layers.Rescaling(1 / 255)(image))
    for number in range(2):
        y = layers.Conv2D(inner, 3, padding="same", use_bias=False, name=f"inner{number}")(x)
        y = layers.ReLU(name=f"relu{number}")(layers.BatchNormalization(name=f"norm{number}")(y))
        x = layers.Add(name=f"sum{number}")([x, layers.Conv2D(4, 3, padding="same", name=f"outer{number}")(y)])
    return tf_keras.Model(image, layers.Dense(5, name="logits")(layers.GlobalAveragePooling2D()(x)))


def data():
    x = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1)).astype(np.uint8)
    part = Split(x, np.arange(64) % 5)
    return make_data("random", part, part, validation=part, augmentation=Augmentation(mirror=True))


def test_the_term_is_the_formula():
    teacher, student = residual(), residual(seed=1)
    term = Hints(Teacher(teacher), ("sum0", "sum1"), 0.3)
    x = np.random.default_rng(1).normal(size=(7, 8, 8, 1)).astype(np.float32)

    def inner(model: tf_keras.Model) -> list[np.ndarray]:
        return [
            np.asarray(v) for v in tf_keras.Model(model.inputs, [model.get_layer(n).output for n in term.layers])(x)
        ]

    wanted, given = inner(teacher), inner(student)
    features = {name: tf.constant(value) for name, value in zip(term.layers, given, strict=True)}
    batch = Batch(tf.constant(x), tf.zeros(7, tf.int64), tf.zeros((7, 5)), tf.range(7), features)
    expected = sum(np.mean((s - t) ** 2) / t.var((0, 1, 2)).mean() for s, t in zip(given, wanted, strict=True))
    assert float(term(batch)) == pytest.approx(0.3 * expected, rel=1e-3)


def test_sums_of_one_size_are_paired_else_the_last_layer_of_each_size():
    assert hint_layers(Teacher(residual()).model, residual(inner=3)) == ("sum0", "sum1")

    def plain(width: int) -> tf_keras.Model:
        image = tf_keras.Input((8, 8, 1))
        x = layers.ReLU(name="relu1")(layers.Conv2D(width, 3, padding="same", name="conv1")(image))
        x = layers.Conv2D(4, 3, strides=2, padding="same", name="conv2")(x)
        x = layers.ReLU(name="relu2")(x)
        return tf_keras.Model(image, layers.Dense(5, name="logits")(layers.Flatten()(x)))

    assert hint_layers(plain(6), plain(6)) == ("relu1", "relu2")
    assert hint_layers(plain(6), plain(3))[-1] == "relu2"
    assert "relu1" not in hint_layers(plain(6), plain(3))


def test_both_terms_share_one_pass_of_the_teacher():
    teacher = Teacher(residual())
    soft, hints = SoftTargets([teacher], 4.0, 0.9), Hints(teacher, ("sum0",), 1.0)
    passes = 0
    look = teacher._look

    def counting(*args, **kwargs):
        nonlocal passes
        passes += 1
        return look(*args, **kwargs)

    teacher._look = counting
    x = tf.random.stateless_normal((3, 8, 8, 1), (0, 0))
    batch = Batch(x, tf.zeros(3, tf.int64), tf.zeros((3, 5)), tf.range(3), {"sum0": tf.zeros((3, 8, 8, 4))})
    soft(batch), hints(batch)
    assert passes == 1


def context(weight: float, reference: tf_keras.Model) -> Context:
    recovery = Recovery(method="distill", epochs=8, learning_rate=0.01, batch_size=16, hint_weight=weight)
    return Context(stage="stage", data=data(), reference=reference, recovery=recovery, seed=0)


def test_with_hints_the_inner_layers_come_nearer():
    reference = residual()
    x = data().train.x.astype(np.float32)

    def distance(weight: float) -> float:
        student = copy_model(reference)
        kernel = student.get_layer("outer0").kernel
        kernel.assign(kernel.numpy() + np.random.default_rng(0).normal(0, 0.1, kernel.shape))
        after = context(weight, reference).recover(Candidate(student)).model
        one, other = (tf_keras.Model(m.inputs, m.get_layer("sum0").output)(x) for m in (after, reference))
        return float(tf.reduce_mean((one - other) ** 2))

    assert distance(1.0) < 0.7 * distance(0.0)


def test_no_layer_of_one_size_is_refused():
    image = tf_keras.Input((8, 8, 1))
    student = tf_keras.Model(image, layers.Dense(5, name="logits")(layers.Flatten()(image)))
    with pytest.raises(CompressError, match="hint_weight"):
        context(1.0, residual()).recover(Candidate(student))
