"""Second-order pruning: the elimination against brute force, the masks, the accuracy without training."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.candidate import Candidate
from compress.data.digits import Digits
from compress.graph.selection import Rule, Selection
from compress.metrics.accuracy import keras_accuracy
from compress.models.small import DigitsCnn
from compress.models.source import Schedule
from compress.reference import make_reference
from compress.strategies.least_squares import Moments, solve
from compress.strategies.pruning.channels import PruneChannels
from compress.strategies.pruning.prune import Prune
from compress.strategies.pruning.second_order import eliminate_each
from compress.strategies.strategy import Context
from compress.training import Recovery


@pytest.fixture(scope="module")
def data():
    return Digits().load()


@pytest.fixture(scope="module")
def model(data):
    return make_reference(DigitsCnn(train=Schedule(epochs=8)), data, 0)


@pytest.fixture
def context(data, model) -> Context:
    return Context("prune", data, model, Recovery(method="none"), 0)


@given(st.integers(0, 10_000), st.integers(2, 6))
@settings(deadline=None, max_examples=25)
def test_each_output_loses_the_weight_that_costs_least(seed, size):
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(60, size)) @ (np.eye(size) + 0.3 * rng.normal(size=(size, size)) / np.sqrt(size))
    x = np.c_[mixed, np.ones(60)]
    targets = rng.normal(size=(60, 3))
    known = Moments(x.T @ x / 60, x.T @ targets / 60)
    elimination = eliminate_each(known, ridge=1e-8)

    def error(output: int, left: tuple[int, ...]) -> float:
        use = [*left, size]
        solution = np.linalg.lstsq(x[:, use], targets[:, output], rcond=None)[0]
        return float(((x[:, use] @ solution - targets[:, output]) ** 2).sum() / 60)

    for output in range(3):
        order = elimination.order[output]
        assert sorted(order) == list(range(size))
        best = min(error(output, left) for left in itertools.combinations(range(size), size - 1))
        whole = error(output, tuple(range(size)))
        assert elimination.added[output, 0] == pytest.approx(best - whole, rel=0.02, abs=1e-3)
        total = error(output, ()) - whole
        assert elimination.added[output].sum() == pytest.approx(total, rel=0.02, abs=1e-3)


@given(st.integers(0, 10_000), st.integers(1, 20))
@settings(deadline=None, max_examples=25)
def test_masks_have_the_size_asked_for_and_solutions_keep_to_them(seed, keep):
    rng = np.random.default_rng(seed)
    x = np.c_[rng.normal(size=(60, 5)), np.ones(60)]
    known = Moments(x.T @ x / 60, x.T @ rng.normal(size=(60, 4)) / 60)
    left = eliminate_each(known).left(keep)
    assert left.shape == (5, 4)
    assert left.sum() == keep
    solved = solve(known, np.zeros((6, 4)), 1e-9, left)
    assert (solved[:-1][~left] == 0).all()
    for output in range(4):
        use = np.append(left[:, output], True)
        wanted = np.linalg.solve(known.inputs[np.ix_(use, use)], known.cross[use, output])
        np.testing.assert_allclose(solved[use, output], wanted, atol=1e-5)


def test_it_keeps_the_accuracy_that_magnitude_alone_loses(model, data, context):
    reached = {}
    for criterion in ("magnitude", "second_order"):
        result = Prune(sparsity=0.85, criterion=criterion, images=250).apply(Candidate(model), context)
        (zeros,) = result.guarantees
        assert zeros.check(result.model) == []
        share = sum((~mask).sum() for mask in zeros.masks.values()) / sum(mask.size for mask in zeros.masks.values())
        assert share == pytest.approx(0.85, abs=0.011)
        assert share >= 0.85 - 1e-3
        reached[criterion] = keras_accuracy(result.model, data.test)
    assert reached["second_order"] > keras_accuracy(model, data.test) - 4
    assert reached["second_order"] > reached["magnitude"] + 3


def test_it_trains_on_with_its_zeros(model, context, data):
    training = Context("prune", data, model, Recovery(epochs=1), 0)
    result = Prune(sparsity=0.8, criterion="second_order", images=100).apply(Candidate(model), training)
    assert result.guarantees[0].check(result.model) == []


def test_what_is_zero_already_costs_nothing_and_stays_zero(model, context):
    """Twice in a row is hardly worse than at once, and the share asked for is the share of all."""
    context = replace(context, selection=Selection(skip=(Rule(type="Dense"),)))
    first = Prune(sparsity=0.6, criterion="second_order", images=300).apply(Candidate(model), context)
    second = Prune(sparsity=0.8, criterion="second_order", images=300).apply(first, context)
    once = Prune(sparsity=0.8, criterion="second_order", images=300).apply(Candidate(model), context)
    (early, late), (zeros,) = second.guarantees, once.guarantees
    assert all((early.masks[name] | ~mask).all() for name, mask in late.masks.items())
    asked, found = (sum((~m).sum() for m in z.masks.values()) for z in (zeros, late))
    assert found == pytest.approx(asked, rel=0.01)
    assert keras_accuracy(second.model, context.data.test) >= keras_accuracy(once.model, context.data.test) - 5


def test_channels_are_repaired_around_the_zeros(model, context):
    convolutions = replace(context, selection=Selection(skip=(Rule(type="Dense"),)))
    sparse = Prune(sparsity=0.6, criterion="second_order", images=300).apply(Candidate(model), convolutions)
    cut = PruneChannels(macs=0.7, criterion="reconstruction", images=300).apply(sparse, context)
    assert all(guarantee.check(cut.model) == [] for guarantee in cut.guarantees)
    before, after = (keras_accuracy(c.model, context.data.test) for c in (sparse, cut))
    assert after >= before - 10
