"""Distillation: the loss term against Hinton's formula in NumPy, its gradient, its two ways to run the teacher."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.candidate import Candidate
from compress.data.source import Augmentation, Data, Split, make_data
from compress.errors import CompressError
from compress.strategies.distillation.distill import Distill
from compress.strategies.distillation.losses.soft_targets import SoftTargets
from compress.strategies.distillation.teacher import Teacher
from compress.strategies.distillation.terms import LogitsTerm
from compress.strategies.strategy import Context
from compress.training import Recovery
from compress.training_step import Batch

layers = tf_keras.layers
COUNT = 24


def data(**augmentation) -> Data:
    x = np.random.default_rng(0).integers(0, 17, size=(COUNT, 4, 4, 1)).astype(np.uint8)
    part = Split(x, np.arange(COUNT) % 5)
    return make_data("random", part, part, validation=part, augmentation=Augmentation(**augmentation))


def network(*, softmax: bool = False, seed: int = 0) -> tf_keras.Model:
    tf_keras.utils.set_random_seed(seed)
    image = tf_keras.Input((4, 4, 1), name="image")
    activation = "softmax" if softmax else None
    return tf_keras.Model(image, layers.Dense(5, activation=activation, name="scores")(layers.Flatten()(image / 8.0)))


def logits_in_numpy(model: tf_keras.Model, x: np.ndarray) -> np.ndarray:
    kernel, bias = (np.asarray(w, np.float64) for w in model.get_layer("scores").get_weights())
    return x.reshape(len(x), -1).astype(np.float64) / 8 @ kernel + bias


def softened(logits: np.ndarray, temperature: float) -> np.ndarray:
    powers = np.exp(logits / temperature - (logits / temperature).max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def formula(teacher: np.ndarray, student: np.ndarray, temperature: float, weight: float) -> float:
    """weight * T^2 * the mean of KL(teacher_T || student_T)."""
    p, q = softened(teacher, temperature), softened(student, temperature)
    return weight * temperature**2 * float((p * np.log(p / q)).sum(axis=1).mean())


def batch(x: np.ndarray, logits: np.ndarray | tf.Tensor, indices: np.ndarray) -> Batch:
    return Batch(
        tf.constant(x[indices].astype(np.float32)),
        tf.zeros(len(indices), tf.int64),
        tf.cast(logits, tf.float32),
        tf.constant(indices),
    )


def soft_term(teachers: list[tf_keras.Model], temperature: float, weight: float) -> LogitsTerm:
    return LogitsTerm(SoftTargets(weight=weight), [Teacher(model) for model in teachers], temperature)


@pytest.mark.parametrize("prepared", [False, True], ids=["live", "cached"])
def test_several_teachers_are_the_mean_of_their_probabilities(prepared):
    source, teachers = data(), [network(seed=1), network(seed=2, softmax=True), network(seed=3)]
    indices = np.arange(7)
    student = np.random.default_rng(0).normal(0, 3, (7, 5))
    term = soft_term(teachers, 2.0, 1.0)
    if prepared:
        term.prepare(source, 8, same_images=True)
    value = float(term(batch(source.train.x, student, indices)))
    p = np.mean([softened(logits_in_numpy(model, source.train.x[indices]), 2.0) for model in teachers], axis=0)
    q = softened(student, 2.0)
    assert value == pytest.approx(4.0 * float((p * np.log(p / q)).sum(axis=1).mean()), rel=1e-3)


@pytest.mark.parametrize("softmax", [False, True], ids=["logits", "softmax"])
@pytest.mark.parametrize("prepared", [False, True], ids=["live", "cached"])
@given(seed=st.integers(0, 1000), temperature=st.floats(1.0, 10.0), weight=st.floats(0.1, 1.0))
@settings(deadline=None, max_examples=6)
def test_the_term_is_the_formula(softmax, prepared, seed, temperature, weight):
    source, teacher = data(), network(softmax=softmax)
    rng = np.random.default_rng(seed)
    indices = rng.permutation(COUNT)[: rng.integers(1, 12)]
    student = rng.normal(0, 3, (len(indices), 5))
    term = soft_term([teacher], temperature, weight)
    if prepared:
        term.prepare(source, 8, same_images=True)
    value = float(term(batch(source.train.x, student, indices)))
    expected = formula(logits_in_numpy(teacher, source.train.x[indices]), student, temperature, weight)
    assert value == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert value >= -1e-6


def test_a_teacher_is_run_once_where_images_stay_the_same_and_anew_where_they_change():
    source, teacher = data(), network()
    indices = np.arange(6)
    elsewhere = Batch(tf.zeros((6, 4, 4, 1)), tf.zeros(6, tf.int64), tf.zeros((6, 5)), tf.constant(indices))
    logits, at_zero = logits_in_numpy(teacher, source.train.x[:6]), logits_in_numpy(teacher, np.zeros((6, 4, 4, 1)))
    term = soft_term([teacher], 4.0, 0.9)
    term.prepare(source, 8, same_images=True)
    assert float(term(elsewhere)) == pytest.approx(formula(logits, np.zeros((6, 5)), 4.0, 0.9), rel=1e-3)
    term.prepare(source, 8, same_images=False)
    assert float(term(elsewhere)) == pytest.approx(formula(at_zero, np.zeros((6, 5)), 4.0, 0.9), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("softmax", [False, True], ids=["logits", "softmax"])
def test_a_student_that_equals_its_teacher_learns_nothing_and_another_does(softmax):
    source, teacher = data(), network(softmax=softmax)
    # Scores are the same under any shift, sample by sample.
    logits = tf.constant(logits_in_numpy(teacher, source.train.x) + np.arange(COUNT)[:, None], tf.float32)
    term = soft_term([teacher], 4.0, 1.0)
    for shift, equal in ((0.0, True), (tf.one_hot(0, 5), False)):
        student = logits + shift
        with tf.GradientTape() as tape:
            tape.watch(student)
            value = term(batch(source.train.x, student, np.arange(COUNT)))
        gradient = np.abs(np.asarray(tape.gradient(value, student))).max()
        assert (float(value) < 1e-5) == equal
        assert (gradient < 1e-5) == equal


ENDINGS = {
    "dense": lambda x: layers.Dense(3, activation="softmax", kernel_initializer="identity")(x),
    "activation": lambda x: layers.Activation("softmax")(x),
    "layer": lambda x: layers.Softmax()(x),
    "operation": lambda x: tf.nn.softmax(x),
}


@pytest.mark.parametrize("temperature", [4.0, 20.0])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_teacher_that_ends_in_a_softmax_says_as_much_as_its_logits(ending, temperature):
    values = tf_keras.Input((3,))
    teacher = tf_keras.Model(values, ENDINGS[ending](values))
    x = np.array([[0.0, -10.0, -30.0], [0.0, -20.0, -200.0]], np.float32)
    student = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(student)
        value = soft_term([teacher], temperature, 1.0)(batch(x, student, np.arange(2)))
    assert float(value) == pytest.approx(0, abs=1e-4)
    np.testing.assert_allclose(tape.gradient(value, student), 0, atol=1e-5)
    # The model given still ends in its softmax.
    np.testing.assert_allclose(np.asarray(teacher(x)).sum(1), 1, atol=1e-5)


def test_the_gradient_is_the_difference_of_the_softened_probabilities():
    """Hinton et al., equation 2: dC/dz = (q - p) / T, here times weight * T^2 and averaged over the batch."""
    source, teacher = data(), network()
    student = tf.constant(np.random.default_rng(1).normal(size=(COUNT, 5)), tf.float32)
    term = soft_term([teacher], 3.0, 0.5)
    with tf.GradientTape() as tape:
        tape.watch(student)
        value = term(batch(source.train.x, student, np.arange(COUNT)))
    p = softened(logits_in_numpy(teacher, source.train.x), 3.0)
    q = softened(np.asarray(student, np.float64), 3.0)
    np.testing.assert_allclose(tape.gradient(value, student), 0.5 * 3.0 * (q - p) / COUNT, atol=1e-5)


def context(teacher: tf_keras.Model, recovery: Recovery) -> Context:
    return Context(stage="distill", data=data(), reference=teacher, recovery=recovery, seed=1)


def test_distillation_leaves_a_student_that_equals_its_teacher():
    teacher = network()
    recovery = Recovery(epochs=5, learning_rate=0.5, batch_size=8, weight_decay=0.0)
    result = Distill(soft_weight=1.0).apply(Candidate(teacher), context(teacher, recovery))
    np.testing.assert_allclose(result.model.get_layer("scores").kernel, teacher.get_layer("scores").kernel, atol=1e-4)


@pytest.mark.parametrize("softmax", [False, True], ids=["logits", "softmax"])
def test_distillation_brings_a_student_to_its_teacher_without_the_labels(softmax):
    teacher, student = network(softmax=softmax), network(seed=1)
    recovery = Recovery(epochs=80, learning_rate=0.5, batch_size=8, weight_decay=0.0)
    result = Distill(soft_weight=1.0, temperature=2.0).apply(Candidate(student), context(teacher, recovery))
    x = data().train.x
    target = softened(logits_in_numpy(teacher, x), 1.0)
    before, after = (softened(logits_in_numpy(model, x), 1.0) for model in (student, result.model))
    assert np.abs(after - target).max() < 0.2 * np.abs(before - target).max()


def test_recovery_by_distillation_uses_the_reference_model():
    teacher, student = network(), network(seed=1)
    recovery = Recovery(
        method="distill", soft_weight=1.0, temperature=2.0, epochs=80, learning_rate=0.5, batch_size=8, weight_decay=0.0
    )
    trained = context(teacher, recovery).recover(Candidate(student)).model
    x = data().train.x
    target = softened(logits_in_numpy(teacher, x), 1.0)
    assert np.abs(softened(logits_in_numpy(trained, x), 1.0) - target).max() < 0.1


@pytest.mark.parametrize("recovery", [Recovery(method="none"), Recovery(epochs=0)])
def test_a_stage_that_only_trains_is_refused_without_training(recovery):
    teacher = network()
    with pytest.raises(CompressError, match=r"strategy\.distill\.recovery"):
        Distill().apply(Candidate(teacher), context(teacher, recovery))
