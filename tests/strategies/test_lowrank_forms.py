"""The forms: a chain computes what its formula says and costs what is counted; fits are the best there are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import tf_keras
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compress.graph.kernels import kernels
from compress.graph.rewrite import rewrite
from compress.metrics.counts import count_macs, count_params
from compress.strategies.goal import Goal, goal_of, matrix_with
from compress.strategies.least_squares import Moments
from compress.strategies.lowrank.chain import build, cost, fits, layer_names, read
from compress.strategies.lowrank.fitting import Fit
from compress.strategies.lowrank.form import Form, Spectrum
from compress.strategies.lowrank.forms import forms
from compress.strategies.lowrank.matrices import product
from compress.strategies.lowrank.sensitivity import follow
from compress.strategies.lowrank.vbmf import vbmf_rank

FORMS = forms()
CONVOLUTIONS = [name for name in FORMS if name != "dense"]
PRODUCTS = ["channel", "spatial"]


def random_factors(form: Form, shape: Sequence[int], rank: int, rng: np.random.Generator) -> list[np.ndarray]:
    sizes = dict(zip(form.letters, shape, strict=True))
    sizes |= {letter: int(width[0]) for letter, width in form.widths(shape, np.array([rank])).items()}
    return [rng.normal(size=[sizes[letter] for letter in term]) for term in form.terms]


def model_of(layer: tf_keras.layers.Layer, shape: Sequence[int]) -> tf_keras.Model:
    image = tf_keras.Input(tuple(shape))
    return tf_keras.Model(image, layer(image))


HOW = [{}, {"strides": 2}, {"dilation_rate": 2}, {"strides": (2, 1)}, {"strides": 2, "padding": "valid"}]


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_chain_computes_what_its_formula_says_at_the_cost_that_is_counted(name, how):
    form, rng = FORMS[name], np.random.default_rng(0)
    layer = tf_keras.layers.Conv2D(6, (3, 4), **{"padding": "same", "activation": "relu", "name": "conv", **how})
    model = model_of(layer, (12, 11, 5))
    if reason := form.misfit(layer):
        assert name == "cp"
        assert "stride" in reason
        return
    shape = tuple(layer.kernel.shape)
    for rank in (1, 3):
        factors = random_factors(form, shape, rank, rng)
        layer.set_weights([form.compose(factors).astype(np.float32), rng.normal(size=6).astype(np.float32)])
        chain = rewrite(model, {"conv": build(form, layer, factors)})
        x = rng.normal(size=(2, 12, 11, 5)).astype(np.float32)
        expected = np.asarray(model(x))
        np.testing.assert_allclose(np.asarray(chain(x)), expected, atol=2e-5 * np.abs(expected).max())
        (kernel,) = kernels(model)
        assert cost(form, kernel, np.array([rank]), "macs")[0] == count_macs(chain)
        assert cost(form, kernel, np.array([rank]), "params")[0] + 6 == count_params(chain)
        layers = [chain.get_layer(part) for part in layer_names(form, "conv")]
        assert fits(form, layers)
        for one, other in zip(read(form, layers), factors, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_full_rank_is_exact_and_errors_are_those_of_the_factors(name):
    form, rng = FORMS[name], np.random.default_rng(1)
    kernel = rng.normal(size=(3, 3, 4, 6))
    most = form.highest(kernel.shape)
    found = form.decompose(kernel, most)
    assert len(found.errors) == most
    assert np.all(np.diff(found.errors) <= 1e-12)
    assert found.errors[-1] == pytest.approx(0, abs=1e-3)
    for rank in (1, most):
        missed = np.sum((kernel - form.compose(found.factors(rank))) ** 2) / np.sum(kernel**2)
        # Tucker's are bounded from above; tensorly then improves the factors.
        assert missed <= found.errors[rank - 1] + 1e-3
        assert missed >= 0.8 * found.errors[rank - 1] - 1e-9


@pytest.mark.parametrize("name", ["tucker", "cp", "tensor_train"])
def test_a_kernel_of_low_rank_is_found_again(name):
    form, rng = FORMS[name], np.random.default_rng(2)
    kernel = form.compose(random_factors(form, (3, 3, 8, 8), 2, rng))
    again = form.compose(form.decompose(kernel, 2).factors(2))
    assert np.sum((kernel - again) ** 2) <= 1e-3 * np.sum(kernel**2)


def correlated(rng: np.random.Generator, size: int, count: int = 600) -> np.ndarray:
    mix = rng.normal(size=(size, size)) * np.geomspace(1, 0.05, size)
    return rng.normal(size=(count, size)) @ mix


def test_a_product_is_the_best_there_is_for_the_outputs():
    """The error of reduced-rank regression: the tail of the singular values of what the layer gives (Izenman 1975)."""
    rng = np.random.default_rng(3)
    x, kernel = correlated(rng, 36), rng.normal(size=(3, 3, 4, 7))
    root = rng.normal(size=(7, 7))
    goal = Goal(kernel, x.T @ x, root @ root.T)
    form = FORMS["channel"]
    fit = Fit(form, goal, 7)
    tails = np.linalg.svd(x @ kernel.reshape(36, 7) @ root, compute_uv=False) ** 2
    for rank in (1, 3, 6):
        assert goal.error(form.compose(fit.factors(rank, 0))) == pytest.approx(tails[rank:].sum(), rel=1e-3)
        assert fit.decomposition.errors[rank - 1] * goal.energy == pytest.approx(tails[rank:].sum(), rel=1e-3)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), name=st.sampled_from(CONVOLUTIONS), rank=st.integers(1, 4))
@example(seed=347, name="tucker", rank=1)
def test_least_squares_on_the_outputs_beats_the_nearest_weights(seed, name, rank):
    rng, form = np.random.default_rng(seed), FORMS[name]
    x, kernel = correlated(rng, 36), rng.normal(size=(3, 3, 4, 5))
    goal = Goal(kernel, x.T @ x, None)
    plain = goal.error(form.compose(form.decompose(kernel, rank).factors(rank)))
    fit = Fit(form, goal, rank)
    errors = [goal.error(form.compose(fit.factors(rank, sweeps))) for sweeps in (1, 3)]
    assert errors[1] <= errors[0] + 1e-6 * goal.energy
    assert errors[1] <= plain + 1e-6 * goal.energy


def test_the_bias_makes_up_for_the_mean():
    rng = np.random.default_rng(4)
    x = correlated(rng, 12) + 3.0
    rows = np.concatenate([x, np.ones((len(x), 1))], 1)
    matrix = rng.normal(size=(13, 4))
    known = Moments(rows.T @ rows / len(rows), rows.T @ (rows @ matrix) / len(rows))
    goal = goal_of(known, matrix, (12, 4), None)
    kernel = FORMS["dense"].compose(Fit(FORMS["dense"], goal, 2).factors(2, 0))
    error = rows @ (matrix - matrix_with(known, matrix, kernel))
    np.testing.assert_allclose(error.mean(0), 0, atol=1e-9)
    assert np.mean(np.sum(error**2, 1)) <= goal.error(kernel) * (1 + 1e-9)


def test_a_curve_goes_through_what_was_measured():
    relative = np.array([0.8, 0.4, 0.2, 0.1, 0.05])
    curve = follow(relative, np.array([2, 4]), np.array([4.0, 2.0]))
    assert curve[[1, 3]] == pytest.approx([4.0, 2.0])
    assert np.all(np.diff(curve) <= 0)
    assert curve[0] == pytest.approx(8.0)


def test_a_large_matrix_is_decomposed_in_its_leading_part():
    rng = np.random.default_rng(5)
    values = np.geomspace(100, 1, 80)
    left, right = (np.linalg.qr(rng.normal(size=(size, 80)))[0] for size in (1650, 1540))
    matrix = (left * values) @ right.T
    for turned in (matrix, matrix.T):
        for most in (40, 600):
            whole = product(turned, most)
            assert whole.left.shape == (turned.shape[0], most)
        np.testing.assert_allclose(whole.spectrum.values[:80], values, rtol=0.02)
        found = product(turned, 40)
        tail = np.sum(values[40:] ** 2)
        assert np.sum((turned - found.left @ found.right) ** 2) == pytest.approx(tail, rel=0.02)
        np.testing.assert_allclose(found.spectrum.values, values[:40], rtol=0.02)
        assert found.errors[-1] == pytest.approx(tail / np.sum(values**2), rel=0.02)


@pytest.mark.parametrize(("rank", "shape"), [(0, (60, 90)), (3, (60, 90)), (10, (200, 80)), (25, (120, 400))])
def test_variational_bayes_finds_the_rank_below_noise(rank, shape):
    rng = np.random.default_rng(rank)
    signal = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
    matrix = signal + rng.normal(size=shape)
    values = np.linalg.svd(matrix, compute_uv=False)
    found = {vbmf_rank(Spectrum(scale * values, shape, float(np.sum(values**2)))) for scale in (1.0, 1e-3)}
    assert found == {rank}
