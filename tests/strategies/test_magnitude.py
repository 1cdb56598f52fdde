"""Magnitude pruning: exact counts, the right weights, the published schedule."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compress.candidate import Candidate
from compress.data.source import Data, Split, make_data
from compress.errors import CompressError
from compress.graph.kernels import kernels
from compress.graph.selection import Rule, Selection
from compress.strategies.pruning.masks import Axes, Masking, Pattern
from compress.strategies.pruning.prune import Prune
from compress.strategies.pruning.zeros import Zeros
from compress.strategies.strategy import Context
from compress.training import Recovery

layers = tf_keras.layers
AT_ONCE = Recovery(method="none")
# Few distinct values, so that ties and zeros are frequent.
WEIGHTS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=4, max_side=6),
    elements=st.sampled_from([0.0, 0.5, -0.5, 1.0]) | st.floats(-10, 10, width=32),
)


@pytest.fixture(scope="module")
def data() -> Data:
    x = np.random.default_rng(0).normal(size=(96, 6, 6, 2)).astype(np.float32)
    part = Split(x, np.arange(96) % 3)
    return make_data("random", part, part)


@pytest.fixture
def model() -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((6, 6, 2), name="image")
    x = layers.Conv2D(5, 3, name="conv")(image)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(x)
    return tf_keras.Model(image, layers.Dense(3, name="dense")(layers.Flatten()(x)))


def context(model: tf_keras.Model, data: Data, recovery: Recovery = AT_ONCE, **changes) -> Context:
    return Context(stage="prune", data=data, reference=model, recovery=recovery, seed=1, **changes)


def zeros_of(model: tf_keras.Model) -> dict[str, tuple[int, int]]:
    return {k.name: (int(np.count_nonzero(k.value == 0)), k.size) for k in kernels(model)}


@given(weights=WEIGHTS, sparsity=st.floats(0, 1))
def test_the_mask_drops_exactly_so_many_and_keeps_the_largest(weights, sparsity):
    layer = Masking([Axes(-1, (-1,))], Pattern(), "layer", [1.0])
    (mask,) = layer.masks([np.abs(weights)], sparsity)
    assert mask.shape == weights.shape
    assert mask.dtype == bool
    # At least one weight is left, so that a layer never dies.
    assert np.count_nonzero(~mask) == min(round(sparsity * weights.size), weights.size - 1)
    dropped, kept = np.abs(weights[~mask]), np.abs(weights[mask])
    assert dropped.max(initial=0) <= kept.min()


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.83])
def test_every_kernel_ends_at_the_sparsity_and_the_rest_stays(sparsity, model, data):
    result = Prune(sparsity=sparsity).apply(Candidate(model), context(model, data))
    assert zeros_of(result.model) == {k.name: (round(sparsity * k.size), k.size) for k in kernels(model)}
    for before, after in zip(kernels(model), kernels(result.model), strict=True):
        kept = after.value != 0
        np.testing.assert_array_equal(after.value[kept], before.value[kept])
        assert np.abs(before.value[~kept]).max() <= np.abs(before.value[kept]).min()
    np.testing.assert_array_equal(result.model.get_layer("dense").bias, model.get_layer("dense").bias)
    assert not any(count for count, _ in zeros_of(model).values()), "the model given stays as it is"


def test_four_tenths_is_the_default_and_weights_is_its_counterpart(model, data):
    default = Prune().apply(Candidate(model), context(model, data))
    share = Prune(weights=0.6).apply(Candidate(model), context(model, data))
    expected = {k.name: (round(0.4 * k.size), k.size) for k in kernels(model)}
    assert zeros_of(default.model) == zeros_of(share.model) == expected


@pytest.mark.parametrize(("ramp", "sparsity"), [(0.0, 0.37), (0.5, 0.37), (0.5, 0.9), (1.0, 0.6)])
def test_gradual_pruning_ends_exactly_at_the_sparsity(ramp, sparsity, model, data):
    recovery = Recovery(epochs=3, batch_size=16, learning_rate=0.05)
    result = Prune(sparsity=sparsity, ramp=ramp).apply(Candidate(model), context(model, data, recovery))
    assert zeros_of(result.model) == {k.name: (round(sparsity * k.size), k.size) for k in kernels(model)}
    (guarantee,) = result.guarantees
    assert guarantee.check(result.model) == []
    moved = [np.abs(a.value - b.value).max() for a, b in zip(kernels(result.model), kernels(model), strict=True)]
    assert min(moved) > 0, "it trained"


def test_sparsity_grows_along_zhu_and_guptas_cubic(data):
    """arXiv 1710.01878, equation 1: s_t = s_f + (s_i - s_f) (1 - t)^3 with s_i = 0, over the ramp; then s_f."""
    tf_keras.utils.set_random_seed(0)
    values = tf_keras.Input((100,))
    model = tf_keras.Model(values, layers.Dense(100, name="dense")(values))
    final, ramp = 0.8, 0.6
    seen: dict[float, float] = {}

    class Probe(Context):
        """In place of the training: how sparse the kernel is when so much of it is done."""

        def recover(self, candidate, *, projections=(), terms=()):
            (projection,) = projections
            kernel = candidate.model.get_layer("dense").kernel
            for done in (0.006, 0.06, 0.15, 0.3, 0.45, 0.6, 0.8, 1.0):
                projection(tf.constant(done))
                seen[done] = float(np.mean(np.asarray(kernel) == 0))
            return candidate

    Prune(sparsity=final, ramp=ramp).apply(Candidate(model), Probe("prune", data, model, Recovery(), 1))
    for done, sparsity in seen.items():
        progress = min(done / ramp, 1.0)
        # The masks are renewed when a fiftieth of the ramp has passed: at most 6 % of the sparsity late.
        assert sparsity == pytest.approx(final * (1 - (1 - progress) ** 3), abs=0.06 * final + 1e-4)
    assert list(seen.values()) == sorted(seen.values())
    assert seen[0.6] == seen[1.0] == pytest.approx(final, abs=1e-4)


@pytest.mark.parametrize("recovery", [AT_ONCE, Recovery(epochs=2, batch_size=16)], ids=["at-once", "training"])
def test_earlier_zeros_stay(recovery, model, data):
    first = Prune(sparsity=0.4).apply(Candidate(model), context(model, data))
    second = Prune(sparsity=0.6).apply(first, context(model, data, recovery))
    assert len(second.guarantees) == 2
    for guarantee in second.guarantees:
        assert guarantee.check(second.model) == []
    for before, after in zip(kernels(first.model), kernels(second.model), strict=True):
        assert not after.value[before.value == 0].any()
        assert np.count_nonzero(after.value == 0) == round(0.6 * after.size)


def test_less_sparsity_than_there_is_changes_nothing(model, data):
    first = Prune(sparsity=0.6).apply(Candidate(model), context(model, data))
    second = Prune(sparsity=0.3).apply(first, context(model, data))
    for a, b in zip(first.model.get_weights(), second.model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert second.guarantees[1].describe() == first.guarantees[0].describe()


MACS = {"conv": 16 * 18 * 5, "depthwise": 4 * 9 * 10, "dense": 40 * 3}


@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_a_budget_of_multiply_adds_counts_those_with_a_weight(keep, model, data):
    result = Prune(macs=keep).apply(Candidate(model), context(model, data))
    left = sum(MACS[k.layer.name] * np.count_nonzero(k.value) / k.size for k in kernels(result.model))
    assert left / sum(MACS.values()) == pytest.approx(keep, abs=0.005)


def test_a_budget_is_of_the_model_not_of_the_selected_layers(model, data):
    selection = Selection(only=(Rule(type="Conv2D"),))
    result = Prune(macs=0.6).apply(Candidate(model), context(model, data, selection=selection))
    total = sum(MACS.values())
    left = MACS["conv"] * np.count_nonzero(result.model.get_layer("conv").kernel) / 90
    assert (total - MACS["conv"] + left) / total == pytest.approx(0.6, abs=0.01)
    with pytest.raises(CompressError) as caught:
        Prune(macs=0.2).apply(Candidate(model), context(model, data, selection=selection))
    assert caught.value.where == "strategy.prune.macs"
    assert f"{1 - MACS['conv'] / total:.3f}" in caught.value.expected


def test_a_budget_of_parameters_counts_biases_and_norms_as_kept(model, data):
    result = Prune(params=0.7).apply(Candidate(model), context(model, data))
    kernel_sizes = {k.name: k.size for k in kernels(model)}
    rest = 5 + 2 * 5 + 10 + 3
    total = sum(kernel_sizes.values()) + rest
    nonzero = sum(int(np.count_nonzero(k.value)) for k in kernels(result.model))
    assert (nonzero + rest) / total == pytest.approx(0.7, abs=0.005)


def test_nothing_to_prune_is_an_error(data):
    image = tf_keras.Input((6, 6, 2))
    model = tf_keras.Model(image, layers.Flatten()(image))
    with pytest.raises(CompressError, match="stage prune"):
        Prune().apply(Candidate(model), context(model, data))


@given(
    weights=hnp.arrays(np.float32, (3, 4), elements=st.floats(-5, 5, width=32)),
    mask=hnp.arrays(bool, (3, 4)),
)
@settings(deadline=None)
def test_the_guarantee_projects_counts_and_reads_the_file(weights, mask):
    guarantee = Zeros("prune", {"dense/kernel": mask})
    np.testing.assert_array_equal(guarantee.project("dense/kernel", tf.constant(weights)), weights * mask)
    wrong = int(np.count_nonzero(weights * ~mask))

    def model_with(kernel):
        return SimpleNamespace(get_layer=lambda name: SimpleNamespace(kernel=kernel))

    violations = guarantee.check(model_with(weights))
    in_file = guarantee.check_file(SimpleNamespace(kernel_of=lambda name, shape: weights))
    assert (
        [v.found.split()[0] for v in violations] == [v.found.split()[0] for v in in_file] == [str(wrong)] * bool(wrong)
    )
    assert guarantee.check(model_with(weights * mask)) == []
    assert len(guarantee.check_file(SimpleNamespace(kernel_of=lambda name, shape: None))) == 1
