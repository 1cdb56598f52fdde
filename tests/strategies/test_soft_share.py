"""Soft weight sharing: the mixture's density and gradients against NumPy, and what is left of the weights."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from scipy.special import logsumexp
from scipy.stats import norm

from compress.candidate import Candidate
from compress.data.source import Data, Split, make_data
from compress.errors import CompressError
from compress.graph.kernels import kernels
from compress.strategies.pruning.prune import Prune
from compress.strategies.sharing.mixture import MixturePrior
from compress.strategies.sharing.soft_share import SoftShare
from compress.strategies.strategy import Context
from compress.training import Recovery
from compress.training_step import Batch

layers = tf_keras.layers
TRAINING = Recovery(epochs=2, batch_size=16, learning_rate=0.01)
SETTINGS = {"zeros": 0.6, "width": 0.1, "certainty": 0.5}


def grouped(seed: int = 0) -> np.ndarray:
    """Sixty weights in a hundred near zero, the others near one of three values."""
    rng = np.random.default_rng(seed)
    centres = np.where(rng.random((40, 25)) < 0.6, 0, rng.choice([-1.0, 0.5, 2.0], (40, 25)))
    return (centres + rng.normal(0, 0.03, (40, 25))).astype(np.float32)


def prior_of(*weights: np.ndarray, components: int = 3, strength: float = 1.0, **settings) -> MixturePrior:
    return MixturePrior([tf.Variable(w) for w in weights], components, strength=strength, **(SETTINGS | settings))


def samples(count: int) -> Data:
    x = np.random.default_rng(0).normal(size=(count, 6, 6, 2)).astype(np.float32)
    part = Split(x, np.arange(count) % 3)
    return make_data("random", part, part)


@pytest.fixture(scope="module")
def data() -> Data:
    return samples(96)


def log_density(prior: MixturePrior, relative: np.ndarray, zeros: float) -> np.ndarray:
    """The log density of each weight and component times its share, from SciPy's normal distribution."""
    means, widths, shares = (np.asarray(v, np.float64) for v in prior.variables)
    parts = np.append(zeros, (1 - zeros) * np.exp(shares - logsumexp(shares)))
    return np.log(parts) + norm.logpdf(relative.reshape(-1, 1), np.append(0, means), np.exp(widths))


EMPTY = Batch(tf.zeros(1), tf.zeros(1), tf.zeros(1), tf.zeros(1))


def test_the_loss_is_minus_the_log_of_the_mixture_s_density(data):
    """Up to a constant: the differences between two sets of weights."""
    weights, others = grouped(), grouped(1)
    prior = prior_of(weights, strength=2.0)
    prior.prepare(data, 16, same_images=True)
    values, expected = [], []
    for now in (weights, others):
        prior._weights[0].assign(now)
        values.append(float(prior(EMPTY)))
        # Relative to the spread that the weights had at the start.
        density = logsumexp(log_density(prior, now / weights.std(dtype=np.float64), 0.6), axis=1)
        expected.append(-2.0 / len(data.train) * density.sum())
    assert values[1] - values[0] == pytest.approx(expected[1] - expected[0], rel=1e-3)


def test_weights_are_drawn_to_the_means_of_the_components_they_belong_to(data):
    weights = grouped()
    prior = prior_of(weights)
    prior.prepare(data, 16, same_images=True)
    variable = prior._weights[0]
    with tf.GradientTape() as tape:
        loss = prior(EMPTY)
    found = tape.gradient(loss, variable).numpy()
    spread = weights.std(dtype=np.float64)
    densities = log_density(prior, weights / spread, 0.6)
    belongs = np.exp(densities - logsumexp(densities, axis=1, keepdims=True))
    means, widths, _ = (np.asarray(v, np.float64) for v in prior.variables)
    away = weights.reshape(-1, 1) / spread - np.append(0, means)
    expected = (belongs * away * np.exp(-2 * widths)).sum(1) / spread / len(data.train)
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-3, atol=1e-6)


def test_the_mixture_finds_the_groups():
    weights = grouped()
    prior = prior_of(weights)
    np.testing.assert_allclose(prior.values(), [0, -1, 0.5, 2], atol=0.02)
    nearest = np.abs(weights[..., None] - np.array([0, -1, 0.5, 2])).argmin(-1)
    np.testing.assert_array_equal(prior.component_of(weights), nearest)
    shares = np.exp(prior.variables[2]) / np.exp(prior.variables[2]).sum()
    np.testing.assert_allclose(shares, np.bincount(nearest.ravel(), minlength=4)[1:] / (nearest > 0).sum(), atol=0.02)


def test_a_firm_prior_keeps_the_widths_that_it_expects():
    weights = grouped()
    free, firm = (prior_of(weights, width=0.3, certainty=c) for c in (1e-3, 1e3))
    np.testing.assert_allclose(np.exp(firm.variables[1]), 0.3, rtol=0.05)
    assert np.exp(free.variables[1]).max() < 0.06


def test_training_changes_the_mixture_too(data):
    model = small()
    kernel = model.get_layer("dense").kernel
    prior = MixturePrior([kernel], 4, strength=1.0, **SETTINGS)
    before = [v.numpy() for v in prior.variables]
    from compress.training import train

    train(model, data, TRAINING, seed=0, terms=[prior])
    for old, new in zip(before, prior.variables, strict=True):
        assert np.abs(new.numpy() - old).max() > 1e-4


def small() -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((6, 6, 2), name="image")
    x = layers.Conv2D(8, 3, use_bias=False, name="conv")(image)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.Conv2D(2, 1, use_bias=False, name="tiny")(x)
    return tf_keras.Model(image, layers.Dense(3, name="dense")(layers.Flatten()(x)))


def context(model: tf_keras.Model, data: Data, recovery: Recovery = TRAINING) -> Context:
    return Context(stage="soft_share", data=data, reference=model, recovery=recovery, seed=1)


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("pruned", [False, True])
def test_weights_become_zeros_and_few_values(scope, pruned, data):
    model = small()
    candidate = Candidate(model)
    if pruned:
        candidate = Prune(sparsity=0.5).apply(candidate, context(model, data, Recovery(method="none")))
    result = SoftShare(components=16, scope=scope, zeros=0.5).apply(candidate, context(model, data))
    assert [item.layer for item in result.skipped] == ["tiny"]
    assert [v for guarantee in result.guarantees for v in guarantee.check(result.model)] == []
    shared = [k for k in kernels(result.model) if k.layer.name != "tiny"]
    for kernel in shared:
        assert 2 <= len(np.unique(kernel.value)) <= 17
        assert 0 < np.mean(kernel.value == 0) < 1
    if scope == "model":
        assert len(np.unique(np.concatenate([k.value.ravel() for k in shared]))) <= 17
    if pruned:
        for old, new in zip(kernels(candidate.model), kernels(result.model), strict=True):
            assert not new.value[old.value == 0].any()


def test_bad_input_is_refused(data):
    model = small()
    with pytest.raises(CompressError, match="some training"):
        SoftShare().apply(Candidate(model), context(model, data, Recovery(method="none")))
    with pytest.raises(CompressError, match="a kernel with more than 257 weights"):
        SoftShare(components=256).apply(Candidate(model), context(model, data))
    with pytest.raises(CompressError, match="are most likely zero") as caught:
        SoftShare(zeros=0.999999, width=0.9, certainty=1e5).apply(Candidate(model), context(model, data))
    assert "strategy.soft_share.zeros" in caught.value.fix
