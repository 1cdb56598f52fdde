"""Mutual learning: the term against the paper's formula in NumPy, what it trains, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from compress.candidate import Candidate
from compress.data.source import Data, Split, Unlabelled, make_data
from compress.errors import CompressError
from compress.pipeline.refusals import refuse_without_labels
from compress.pipeline.stage import Stage
from compress.strategies.distillation.mutual import Mutual, PeerTerm
from compress.strategies.strategy import Context
from compress.training import Recovery
from compress.training_step import Batch

layers = tf_keras.layers
COUNT = 24


@pytest.fixture(scope="module")
def data() -> Data:
    x = np.random.default_rng(0).integers(0, 17, size=(COUNT, 4, 4, 1)).astype(np.uint8)
    part = Split(x, np.arange(COUNT) % 5)
    return make_data("random", part, part, validation=part)


def network(seed: int, *, norm: bool = False, softmax: bool = False) -> tf_keras.Model:
    tf_keras.utils.set_random_seed(seed)
    image = tf_keras.Input((4, 4, 1), name="image")
    x = layers.Rescaling(1 / 8, name="rescale")(image)
    if norm:
        x = layers.BatchNormalization(name="norm")(x)
    scores = layers.Dense(5, activation="softmax" if softmax else None, name="scores")(layers.Flatten()(x))
    return tf_keras.Model(image, scores, name="net")


def log_probabilities(model: tf_keras.Model, x: np.ndarray) -> np.ndarray:
    kernel, bias = (np.asarray(w, np.float64) for w in model.get_layer("scores").get_weights())
    logits = x.reshape(len(x), -1) / 8.0 @ kernel + bias
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def batch(data: Data, logits: tf.Tensor) -> Batch:
    return Batch(tf.constant(data.train.x, tf.float32), tf.constant(data.train.y), logits, tf.range(COUNT))


@pytest.mark.parametrize("peers", [1, 2])
def test_the_term_is_the_papers(peers, data):
    """Equations 4 to 8: each network's cross-entropy (the student's own is the loop's), and its mean divergence."""
    models = [network(seed, softmax=seed == 2) for seed in range(1 + peers)]
    logs = [log_probabilities(model, data.train.x) for model in models]
    weight, decay = 0.7, 0.01
    wanted = 0.0
    for place, own in enumerate(logs):
        others = [other for index, other in enumerate(logs) if index != place]
        wanted += weight * np.mean([(np.exp(p) * (p - own)).sum(1).mean() for p in others])
        if place:
            kernel = np.asarray(models[place].get_layer("scores").kernel, np.float64)
            wanted += -own[np.arange(COUNT), data.train.y].mean() + decay * (kernel**2).sum() / 2
    term = PeerTerm(models[1:], weight, decay)
    found = term(batch(data, models[0](tf.constant(data.train.x, tf.float32))))
    assert float(found) == pytest.approx(wanted, rel=1e-4)
    assert {id(v) for v in term.variables} == {id(v) for model in models[1:] for v in model.trainable_variables}


def test_what_others_say_counts_as_given(data):
    """No network changes itself so that its peer, who imitates it, has it easier."""
    student, peer = network(0), network(1)
    term = PeerTerm([peer], 1.0, 0.0)
    x = tf.constant(data.train.x, tf.float32)
    with tf.GradientTape() as tape:
        logits = student(x)
        tape.watch(logits)
        loss = term(batch(data, logits))
    (gradient,) = tape.gradient(loss, [logits])
    p, q = (np.exp(log_probabilities(model, data.train.x)) for model in (student, peer))
    # The gradient of KL(q || p) by the student's logits is p - q; that of KL(p || q), as given, is nothing.
    np.testing.assert_allclose(gradient, (p - q) / COUNT, atol=1e-5)


def test_peers_learn_with_statistics_of_their_own(data, monkeypatch):
    peers = []
    made = Mutual._peer

    def watched(self, *arguments):
        peers.append(made(self, *arguments))
        before.append([np.asarray(w) for w in peers[-1].weights])
        return peers[-1]

    before: list[list[np.ndarray]] = []
    monkeypatch.setattr(Mutual, "_peer", watched)
    reference = network(0, norm=True)
    recovery = Recovery("distill", epochs=4, batch_size=8, learning_rate=0.05)
    context = Context("mutual", data, reference, recovery, 0)
    result = Mutual(student="again", peers=("again", "again")).apply(Candidate(reference), context)
    assert len(peers) == 2
    assert not np.array_equal(before[0][-2], before[1][-2]), "peers start apart"
    for peer, old in zip(peers, before, strict=True):
        changed = [not np.array_equal(w, o) for w, o in zip(peer.weights, old, strict=True)]
        assert all(changed), "weights are trained, statistics follow"
    own = {id(w) for w in result.model.weights}
    assert not own & {id(w) for peer in peers for w in peer.weights}
    again = Mutual(student="again", peers=("again", "again")).apply(Candidate(reference), context)
    for one, other in zip(result.model.weights, again.model.weights, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_it_cannot_do_is_refused(data):
    reference = network(0)
    mixed = Context("mutual", data, reference, Recovery("finetune", epochs=1, mixup=0.5), 0)
    with pytest.raises(CompressError, match="mixup"):
        Mutual().apply(Candidate(reference), mixed)
    part = Unlabelled(data.train.x)
    bare = make_data("bare", part, data.test, validation=part)
    with pytest.raises(CompressError, match="mutual learns from them"):
        refuse_without_labels([Stage("mutual", Mutual())], bare)
    with pytest.raises(ValueError, match="peers"):
        Mutual(peers=())
