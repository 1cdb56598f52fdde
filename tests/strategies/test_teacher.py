"""A teacher's outputs: made once where images stay the same, kept on disk by content, made in the step otherwise."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from compress.cache.store import StageCache
from compress.candidate import Candidate
from compress.data.source import Augmentation, Data, Split, make_data
from compress.strategies.distillation import teacher as teacher_module
from compress.strategies.distillation.teacher import Teacher
from compress.strategies.strategy import Context
from compress.training import Recovery
from compress.training_step import Batch

layers = tf_keras.layers
COUNT = 40


def network(seed: int = 0) -> tf_keras.Model:
    tf_keras.utils.set_random_seed(seed)
    image = tf_keras.Input((4, 4, 1), name="image")
    x = layers.BatchNormalization(name="norm")(layers.Conv2D(3, 3, padding="same", name="conv")(image / 16.0))
    return tf_keras.Model(image, layers.Dense(5, name="scores")(layers.Flatten(name="flat")(layers.ReLU()(x))))


def data(seed: int = 0, **augmentation) -> Data:
    x = np.random.default_rng(seed).integers(0, 17, size=(COUNT, 4, 4, 1)).astype(np.uint8)
    part = Split(x, np.arange(COUNT) % 5)
    return make_data("random", part, part, validation=part, augmentation=Augmentation(**augmentation))


class Counting:
    """A cache that counts what was made."""

    def __init__(self, folder) -> None:
        self.cache = StageCache(folder)
        self.made = 0

    def __call__(self, digest, what, make):
        def counted():
            self.made += 1
            return make()

        return self.cache.arrays(digest, what, counted)


def outputs(model: tf_keras.Model, source: Data, keep, *shown: str, same_images: bool = True) -> dict[str, np.ndarray]:
    teacher = Teacher(model)
    teacher.keep = keep
    teacher.show(shown)
    teacher.prepare(source, 16, same_images=same_images)
    indices = tf.constant([3, 0, 11])
    x = tf.cast(tf.gather(source.train.x, indices), tf.float32)
    found = teacher(Batch(x, tf.zeros(3, tf.int64), tf.zeros((3, 5)), indices))
    return {name: np.asarray(value) for name, value in found.items()}


def test_what_is_kept_is_what_the_teacher_gives(tmp_path):
    keep = Counting(tmp_path)
    live = outputs(network(), data(), keep, "conv", "flat", same_images=False)
    assert (keep.made, set(live)) == (0, {"", "conv", "flat"})
    for made in (1, 1):
        known = outputs(network(), data(), keep, "conv", "flat")
        assert keep.made == made
        for name, value in live.items():
            np.testing.assert_allclose(known[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "source", "shown"),
    [(network(1), data(), ()), (network(), data(1), ()), (network(), data(), ("flat",))],
    ids=["weights", "images", "layers"],
)
def test_other_content_is_made_anew(model, source, shown, tmp_path):
    keep = Counting(tmp_path)
    outputs(network(), data(), keep)
    outputs(model, source, keep, *shown)
    assert keep.made == 2


def test_a_batch_norm_of_other_statistics_is_another_teacher(tmp_path):
    keep, model = Counting(tmp_path), network()
    first = outputs(model, data(), keep)[""]
    model.get_layer("norm").moving_mean.assign([1.0, 0.0, 0.0])
    assert not np.array_equal(outputs(model, data(), keep)[""], first)
    assert keep.made == 2


def test_outputs_that_would_take_too_much_are_made_in_the_step(tmp_path, monkeypatch):
    keep = Counting(tmp_path)
    monkeypatch.setattr(teacher_module, "_MOST_BYTES", COUNT * 5 * 4)
    outputs(network(), data(), keep)
    assert keep.made == 1
    outputs(network(), data(), keep, "flat")
    assert keep.made == 1


def trained(source: Data, keep, **fields) -> tf_keras.Model:
    recovery = Recovery(
        method="distill", epochs=3, learning_rate=0.02, batch_size=8, losses={"hints": 1.0, "decoupled": 0.1}, **fields
    )
    context = Context(stage="stage", data=source, reference=network(), recovery=recovery, seed=1, keep=keep)
    return context.recover(Candidate(network(2))).model


def test_training_with_kept_outputs_is_training_with_the_teacher(tmp_path, monkeypatch):
    """And a second training reads them."""
    keep = Counting(tmp_path)
    known = [trained(data(), keep) for _ in range(2)]
    assert keep.made == 1
    monkeypatch.setattr(teacher_module, "_MOST_BYTES", 0)
    live = trained(data(), keep)
    for weights in zip(*(model.get_weights() for model in (*known, live)), strict=True):
        np.testing.assert_array_equal(weights[0], weights[1])
        np.testing.assert_allclose(weights[0], weights[2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("change", ["augmentation", "mixup"])
def test_images_that_change_are_looked_at_anew(change, tmp_path):
    keep = Counting(tmp_path)
    source = data(mirror=True) if change == "augmentation" else data()
    trained(source, keep, mixup=0.5 if change == "mixup" else 0.0)
    assert keep.made == 0


def test_a_teacher_prepared_for_other_images_runs_again():
    teacher = Teacher(network())
    first, second = data(), data(1)
    x, indices = tf.zeros((2, 4, 4, 1)), tf.constant([0, 1])

    def told(source: Data, same_images: bool) -> np.ndarray:
        teacher.prepare(source, 16, same_images=same_images)
        return np.asarray(teacher(Batch(x, tf.zeros(2, tf.int64), tf.zeros((2, 5)), indices))[""])

    found = [told(first, True), told(second, True), told(first, False), told(dataclasses.replace(first), True)]
    assert not np.allclose(found[0], found[1])
    np.testing.assert_allclose(found[2], np.asarray(teacher.model(x)), rtol=1e-6)
    np.testing.assert_array_equal(found[0], found[3])
