"""The one training loop: what a step does, that it is a function of its seed."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tensorflow.python.framework.func_graph import FuncGraph

from compress.batches import mix
from compress.candidate import Guarantee
from compress.data.source import Augmentation, Data
from compress.errors import CompressError
from compress.graph.rewrite import copy_model
from compress.graph.softmax import gives_probabilities
from compress.strategies.pruning.zeros import Zeros
from compress.strategies.quantization.binary_connect import SignQuantizer
from compress.strategies.sharing.codebook import Codebook
from compress.training import Recovery, restore, train
from compress.training_step import Batch
from tests.test_batches import batches, split

layers = tf_keras.layers
PLAIN = Augmentation()


def data(count: int = 40, shape: tuple[int, ...] = (3,), augmentation: Augmentation = PLAIN) -> Data:
    # No validation or test part: the loop must not even look at them.
    return Data("random", split(count, shape), None, None, 3, augmentation, "identity")  # type: ignore[arg-type]


def linear(*, softmax: bool = False) -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    values = tf_keras.Input((3,))
    scaled = layers.Rescaling(1 / 255)(values)
    return tf_keras.Model(values, layers.Dense(3, activation="softmax" if softmax else None, name="dense")(scaled))


def convolutional() -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((6, 6, 1))
    x = layers.Conv2D(8, 3, use_bias=False, name="conv")(layers.Rescaling(1 / 255)(image))
    x = layers.Dropout(0.3)(layers.ReLU()(layers.BatchNormalization()(x)))
    return tf_keras.Model(image, layers.Dense(3, name="dense")(layers.Flatten()(x)))


def test_a_step_on_mixed_samples_is_that_of_the_mixed_labels():
    model, before = linear(), linear()
    source = data(8)
    train(model, source, Recovery(epochs=1, batch_size=8, momentum=0, weight_decay=0, mixup=1.0), seed=3)
    ((images, labels, _),) = batches(source.train, 8, 1, seed=3)
    mixed, ratio = (t.numpy() for t in mix(tf.constant(images), 1.0, tf.constant([3, 0], tf.int64)))
    kernel, bias = before.get_layer("dense").get_weights()
    scores = mixed / 255 @ kernel + bias
    softmax = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    target = ratio[:, None] * np.eye(3)[labels] + (1 - ratio[:, None]) * np.eye(3)[labels[::-1]]
    # The cosine schedule's first step has the full rate.
    np.testing.assert_allclose(
        model.get_layer("dense").get_weights()[0], kernel - 0.01 * (mixed / 255).T @ (softmax - target) / 8, atol=1e-6
    )


@pytest.mark.parametrize("augmentation", [PLAIN, Augmentation(shift=1, mirror=True)], ids=["plain", "augmented"])
def test_the_same_seed_gives_the_same_weights(augmentation):
    source = data(40, (6, 6, 1), augmentation)
    weights = []
    for seed in (4, 4, 5):
        model = convolutional()
        train(model, source, Recovery(epochs=2, batch_size=16), seed=seed)
        weights.append(model.get_weights())
    for one, two in zip(weights[0], weights[1], strict=True):
        np.testing.assert_array_equal(one, two)
    assert any((one != other).any() for one, other in zip(weights[0], weights[2], strict=True))


@pytest.mark.parametrize("softmax", [False, True], ids=["logits", "softmax"])
def test_one_step_is_that_of_momentum_gradient_descent_on_the_cross_entropy(softmax):
    source, model = data(40), linear(softmax=softmax)
    kernel, bias = (w.astype(np.float64) for w in model.get_weights())
    rate, decay, momentum = 0.3, 0.05, 0.9
    recovery = Recovery(epochs=1, batch_size=40, learning_rate=rate, weight_decay=decay, momentum=momentum)
    history = train(model, source, recovery, seed=0)
    x, y = source.train.x / 255.0, source.train.y
    logits = x @ kernel + bias
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    error = (probabilities - np.eye(3)[y]) / len(y)
    # Nesterov's first step from rest is 1 + momentum times the plain one; only kernels decay.
    step = rate * (1 + momentum)
    np.testing.assert_allclose(model.get_weights()[0], kernel - step * (x.T @ error + decay * kernel), atol=1e-5)
    np.testing.assert_allclose(model.get_weights()[1], bias - step * error.sum(axis=0), atol=1e-5)
    assert history.loss == pytest.approx(-np.log(probabilities[np.arange(len(y)), y]).mean(), rel=1e-4)


def test_latent_weights_of_a_bounded_quantizer_are_clipped_after_the_step():
    source, model = data(40), linear()
    kernel = model.get_layer("dense").kernel
    before, limit = kernel.numpy(), 0.02
    recovery = Recovery(epochs=2, batch_size=40, learning_rate=0.3, weight_decay=0.0, momentum=0.0, schedule="constant")
    train(model, source, recovery, seed=0, quantizers={"dense/kernel": SignQuantizer(limit)})
    bias, x, y = np.zeros(3), source.train.x / 255.0, source.train.y
    latent = np.clip(before, -limit, limit)
    for _ in range(2):
        scores = np.exp(x @ np.where(latent >= 0, limit, -limit) + bias)
        error = (scores / scores.sum(axis=1, keepdims=True) - np.eye(3)[y]) / len(y)
        latent, bias = np.clip(latent - 0.3 * x.T @ error, -limit, limit), bias - 0.3 * error.sum(axis=0)
    np.testing.assert_allclose(kernel, np.where(latent >= 0, limit, -limit), rtol=1e-6)
    np.testing.assert_allclose(model.get_layer("dense").bias, bias, atol=1e-5)
    assert (np.sign(kernel) != np.sign(before)).any(), "some weight has changed its sign"


@pytest.mark.parametrize("clip_norm", [0.01, 100.0, None])
def test_a_long_gradient_of_the_loss_is_shortened(clip_norm):
    source, model = data(40), linear()
    kernel, bias = (w.astype(np.float64) for w in model.get_weights())
    recovery = Recovery(
        epochs=1, batch_size=40, learning_rate=0.3, weight_decay=0.05, momentum=0.0, clip_norm=clip_norm
    )
    train(model, source, recovery, seed=0)
    x, y = source.train.x / 255.0, source.train.y
    scores = np.exp(x @ kernel + bias)
    error = (scores / scores.sum(axis=1, keepdims=True) - np.eye(3)[y]) / len(y)
    by_kernel, by_bias = x.T @ error, error.sum(axis=0)
    norm = np.sqrt(np.sum(by_kernel**2) + np.sum(by_bias**2))
    assert 0.01 < norm < 100
    shortened = 0.01 / norm if clip_norm == 0.01 else 1.0
    # Weight decay is no part of it.
    expected = kernel - 0.3 * (shortened * by_kernel + 0.05 * kernel)
    np.testing.assert_allclose(model.get_weights()[0], expected, atol=1e-6)
    np.testing.assert_allclose(model.get_weights()[1], bias - 0.3 * shortened * by_bias, atol=1e-6)


def test_a_layers_own_penalty_is_part_of_the_loss():
    values = tf_keras.Input((3,))
    penalty = tf_keras.regularizers.L2(10.0)
    model = tf_keras.Model(values, layers.Dense(3, use_bias=False, kernel_regularizer=penalty)(values * 0.0))
    model.set_weights([np.ones((3, 3), np.float32)])
    recovery = Recovery(epochs=1, batch_size=40, learning_rate=0.01, momentum=0.0, weight_decay=0.0)
    train(model, data(40), recovery, seed=0)
    # d/dw 10 w^2 = 20 at w = 1; the inputs are zero, so the cross-entropy adds nothing.
    np.testing.assert_allclose(model.get_weights()[0], 1 - 0.01 * 20, atol=1e-5)


@pytest.mark.parametrize(
    ("epochs", "steps", "images"), [(1, 4, 40), (0.5, 2, 20), (1.5, 5, 50), (0.01, 1, 10), (3, 10, 100)]
)
def test_epochs_may_be_fractions(epochs, steps, images):
    done = []

    def projection(part: tf.Tensor) -> None:
        tf.py_function(lambda value: done.append(float(value)), [part], [])

    recovery = Recovery(epochs=epochs, batch_size=10)
    history = train(linear(), data(35), recovery, seed=0, projections=[projection])
    assert history.steps == len(done) == steps
    assert history.images == pytest.approx(images, abs=1)
    np.testing.assert_allclose(done, np.arange(1, steps + 1) / steps, rtol=1e-6)


def test_a_loss_term_is_added_beside_its_share_of_the_task():
    class Push:
        task_weight = 0.0
        layers = ()
        variables = ()

        def prepare(self, source: Data, batch_size: int, *, same_images: bool) -> None:
            self.prepared = (len(source.train), batch_size, same_images)

        def __call__(self, batch: Batch) -> tf.Tensor:
            assert batch.inputs.shape[1:] == (3,)
            return -2.0 * tf.reduce_mean(tf.reduce_sum(batch.logits, axis=1))

    term, model = Push(), linear()
    before = model.get_weights()
    recovery = Recovery(epochs=1, batch_size=40, learning_rate=0.1, momentum=0.0, weight_decay=0.0)
    train(model, data(40), recovery, seed=0, terms=[term])
    assert term.prepared == (40, 40, True)
    # With no share for the task, every bias moves by rate * 2.
    np.testing.assert_allclose(model.get_weights()[1], before[1] + 0.2, atol=1e-5)


def test_a_finished_training_leaves_no_compiled_step_behind():
    def compiled() -> int:
        gc.collect()
        return sum(isinstance(thing, FuncGraph) for thing in gc.get_objects())

    recovery = Recovery(epochs=1, batch_size=40)
    train(convolutional(), data(40, (6, 6, 1)), recovery, seed=0)
    before = compiled()
    for _ in range(2):
        train(convolutional(), data(40, (6, 6, 1)), recovery, seed=0)
    assert compiled() <= before


def test_a_cosine_schedule_ends_at_rest_and_a_constant_one_does_not():
    def last_step(schedule: str) -> float:
        moves: list[np.ndarray] = []
        model = linear()
        kernel = model.get_layer("dense").kernel

        def projection(part: tf.Tensor) -> None:
            tf.py_function(lambda value: moves.append(value.numpy().copy()), [kernel.value()], [])

        recovery = Recovery(epochs=10, batch_size=10, learning_rate=0.1, schedule=schedule, momentum=0.0)
        train(model, data(40), recovery, seed=0, projections=[projection])
        sizes = np.abs(np.diff(moves, axis=0)).max(axis=(1, 2))
        return float(sizes[-1] / sizes[0])

    assert last_step("cosine") < 0.05
    assert last_step("constant") > 0.2


@pytest.mark.parametrize("epochs", [1, 40])
def test_batch_norms_forget_the_statistics_from_before_a_training(epochs):
    """However short it is: those statistics describe the activations of another network."""
    values = tf_keras.Input((3,))
    norm = layers.BatchNormalization(name="norm")
    model = tf_keras.Model(values, layers.Dense(3)(norm(layers.Rescaling(1 / 255)(values))))
    norm.moving_mean.assign([100.0, 100.0, 100.0])
    source = data(40)
    train(model, source, Recovery(epochs=epochs, batch_size=10, learning_rate=1e-6), seed=0)
    truth = (source.train.x / 255).mean(axis=0)
    # exp(-3.5) of what was there before is left, or less; 0.99 would leave 96 of 100 after four steps.
    assert np.abs(np.asarray(norm.moving_mean) - truth).max() < 100 * np.exp(-3.5) + 0.2
    assert norm.momentum == 0.99


LABELS = np.random.default_rng(0).integers(0, 3, (3, 3, 1, 8))
MASK = np.random.default_rng(1).random((3, 3, 1, 8)) < 0.6


@pytest.mark.parametrize(
    "guarantees",
    [
        (Zeros("prune", {"conv/kernel": MASK}),),
        (Codebook("share", 3, {"conv/kernel": LABELS}),),
        (Zeros("prune", {"conv/kernel": MASK}), Codebook("share", 4, {"conv/kernel": np.where(MASK, LABELS, 3)})),
        (Codebook("share", 4, {"conv/kernel": np.where(MASK, LABELS, 3)}), Zeros("prune", {"conv/kernel": MASK})),
    ],
    ids=["zeros", "codebook", "zeros-codebook", "codebook-zeros"],
)
def test_guarantees_hold_after_training(guarantees: tuple[Guarantee, ...]):
    model = convolutional()
    restore(model, guarantees)
    before = np.asarray(model.get_layer("conv").kernel)
    train(
        model, data(40, (6, 6, 1)), Recovery(epochs=2, batch_size=8, learning_rate=0.1), seed=0, guarantees=guarantees
    )
    for guarantee in guarantees:
        assert guarantee.check(model) == []
    assert np.abs(np.asarray(model.get_layer("conv").kernel) - before).max() > 1e-3


@pytest.mark.parametrize("order", ["zeros first", "codebook first"])
def test_a_cluster_that_is_partly_pruned_keeps_its_value(order):
    """As after ``share+prune+finetune``: with a rate of nearly nothing, nearly nothing may change."""
    image = tf_keras.Input((3,))
    model = tf_keras.Model(image, layers.Dense(4, use_bias=False, name="dense")(image))
    kernel = np.array([[0.5, 0.5, 0.5, 0.5], [0, 0, 0.5, 0], [-1, -1, -1, -1]], np.float32)
    model.set_weights([kernel])
    labels = np.where(kernel == -1, 1, 0)
    guarantees = [Zeros("prune", {"dense/kernel": kernel != 0}), Codebook("share", 3, {"dense/kernel": labels})]
    if order == "codebook first":
        guarantees.reverse()
    recovery = Recovery(epochs=3, batch_size=8, learning_rate=1e-9, weight_decay=0.0)
    train(model, data(40), recovery, seed=0, guarantees=guarantees)
    np.testing.assert_allclose(model.get_weights()[0], kernel, atol=1e-3)


def test_restoring_projects_once_and_touches_nothing_else():
    model = convolutional()
    before = {w.name: np.asarray(w) for w in model.weights}
    restore(model, [Zeros("prune", {"conv/kernel": MASK})])
    for weight in model.weights:
        expected = before[weight.name] * MASK if weight.name.startswith("conv/") else before[weight.name]
        np.testing.assert_array_equal(weight, expected)


@pytest.mark.parametrize("epochs", [1, 10])
def test_a_loss_that_is_no_number_stops_with_the_setting_to_change(epochs):
    source = data(40)
    model = linear()
    model.get_layer("dense").kernel.assign(np.full((3, 3), np.inf, np.float32))
    with pytest.raises(CompressError) as caught:
        train(model, source, Recovery(epochs=epochs, batch_size=10, learning_rate=0.25), seed=0)
    assert caught.value.where == "training"
    assert "nan" in caught.value.received or "inf" in caught.value.received
    assert "recovery.learning_rate=0.025" in caught.value.fix


@pytest.mark.parametrize("count", [33, 65, 257])
def test_a_rest_of_one_sample_does_not_spoil_the_statistics(count):
    """Every batch is full: one of a single sample would have no variance, and the last one counts most."""
    values = tf_keras.Input((3,))
    norm = layers.BatchNormalization(name="norm")
    model = tf_keras.Model(values, layers.Dense(3)(norm(layers.Rescaling(1 / 255)(values))))
    train(model, data(count), Recovery(epochs=1, batch_size=32, learning_rate=1e-7), seed=0)
    truth = (data(count).train.x / 255).var(axis=0)
    assert np.asarray(norm.moving_variance).min() > 0.5 * truth.min()


def test_a_rate_that_diverges_stops():
    image = tf_keras.Input((3,))
    x = layers.Dense(8)(layers.Dense(8)(image))
    with pytest.raises(CompressError, match="learning_rate"):
        train(
            tf_keras.Model(image, layers.Dense(3)(x)),
            data(40),
            Recovery(epochs=20, batch_size=10, learning_rate=1e9, schedule="constant"),
            seed=0,
        )


ENDINGS = {
    "dense": lambda x: layers.Dense(3, activation="softmax", name="scores")(x),
    "activation": lambda x: layers.Activation("softmax")(layers.Dense(3, name="scores")(x)),
    "layer": lambda x: layers.Softmax()(layers.Dense(3, name="scores")(x)),
    "operation": lambda x: tf.nn.softmax(layers.Dense(3, name="scores")(x)),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_softmax_at_the_end_changes_nothing_however_far_apart_the_logits_are(ending):
    """A class that the network gives a probability of exp(-90) has a gradient, too."""
    trained = []
    for head in (lambda x: layers.Dense(3, name="scores")(x), ENDINGS[ending]):
        values = tf_keras.Input((3,))
        model = tf_keras.Model(values, head(values))
        model.get_layer("scores").set_weights([np.diag([90.0, 60.0, 90.0]), np.array([0.0, 0.0, 80.0])])
        given = model.output_names, np.asarray(model(np.eye(3)))
        train(model, data(64), Recovery(epochs=2, batch_size=16, learning_rate=0.5), seed=0)
        trained.append(model.get_layer("scores").get_weights())
    for one, other in zip(*trained, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)
    assert gives_probabilities(model)
    assert given[0] == model.output_names
    np.testing.assert_allclose(np.asarray(model(np.eye(3))).sum(1), 1, atol=1e-5)


def test_training_changes_the_model_given_and_nothing_that_it_was_copied_from():
    model = linear()
    copy = copy_model(model)
    before = model.get_weights()
    train(copy, data(40), Recovery(epochs=1, batch_size=10), seed=0)
    for one, two in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, two)
    assert (copy.get_weights()[0] != before[0]).any()
