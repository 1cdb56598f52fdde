"""Weight sharing: k-means against its definition, the codebook's projection against NumPy."""

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
from compress.deploy.tflite import export
from compress.errors import CompressError
from compress.graph.kernels import kernels
from compress.graph.rewrite import copy_model
from compress.metrics.tflite_file import TFLiteFile
from compress.strategies.pruning.prune import Prune
from compress.strategies.sharing.centroids import TrainedCentroids
from compress.strategies.sharing.codebook import Codebook
from compress.strategies.sharing.kmeans import Share, cluster
from compress.strategies.strategy import Context
from compress.training import Recovery

layers = tf_keras.layers
VALUES = st.sampled_from([0.0, 0.25, -0.25, 1.0]) | st.floats(-4, 4, width=32, allow_subnormal=False)
WEIGHTS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=7), elements=VALUES)


def squared_error(weights: np.ndarray, values: np.ndarray) -> float:
    return float(((weights.astype(np.float64) - values.astype(np.float64)) ** 2).sum())


@given(weights=WEIGHTS, clusters=st.integers(2, 12))
@settings(deadline=None)
def test_clustering(weights, clusters):
    codebook, labels = cluster(weights, clusters)
    assert codebook.shape == (clusters,)
    assert labels.shape == weights.shape
    assert labels.min() >= 0
    assert labels.max() < clusters
    shared = codebook[labels]
    assert len(np.unique(shared)) <= clusters
    # Zeros stay zero and have a cluster to themselves.
    assert not shared[weights == 0].any()
    if (weights == 0).any() and (weights != 0).any():
        assert not set(labels[weights == 0]) & set(labels[weights != 0])
    # Every other weight belongs to the nearest of the values that such weights can have.
    rest = weights[weights != 0].astype(np.float64)
    if rest.size:
        used = codebook[np.unique(labels[weights != 0])].astype(np.float64)
        nearest = np.abs(rest[:, None] - used).min(axis=1)
        np.testing.assert_allclose(np.abs(rest - shared[weights != 0]), nearest, atol=1e-6)


@given(weights=WEIGHTS, clusters=st.integers(2, 12))
@settings(deadline=None)
def test_clustering_is_never_worse_than_its_linear_start(weights, clusters):
    codebook, labels = cluster(weights, clusters)
    rest = weights[weights != 0].astype(np.float64)
    if not rest.size:
        rest = np.zeros(1)
    start = np.linspace(rest.min(), rest.max(), clusters - bool((weights == 0).any()))
    at_start = float((np.abs(rest[:, None] - start).min(axis=1) ** 2).sum())
    assert squared_error(weights, codebook[labels]) <= at_start + 1e-9


@given(
    values=st.lists(VALUES, min_size=1, max_size=8, unique_by=lambda v: np.float32(v) + 0.0),
    repeats=st.integers(1, 4),
    more=st.integers(0, 3),
)
@settings(deadline=None)
def test_few_distinct_values_are_kept_exactly(values, repeats, more):
    weights = np.tile(np.array(values, np.float32), repeats)
    codebook, labels = cluster(weights, max(2, len(values) + more))
    np.testing.assert_array_equal(codebook[labels], weights)


def test_well_separated_groups_are_found():
    rng = np.random.default_rng(0)
    centres = np.array([-3.0, -1.0, 0.5, 2.0])
    weights = (centres[rng.integers(0, 4, (50, 20))] + rng.normal(0, 0.02, (50, 20))).astype(np.float32)
    codebook, labels = cluster(weights, 4)
    np.testing.assert_allclose(np.sort(codebook), centres, atol=0.01)
    for label in range(4):
        assert codebook[label] == pytest.approx(weights[labels == label].mean(), abs=1e-6)


def test_one_iteration_moves_each_centroid_to_the_mean_of_its_interval():
    weights = np.array([0.1, 0.2, 0.3, 0.9, 1.1, 4.0], np.float32)
    # Linear start 0.1, 1.4, 2.7, 4.0: the borders are 0.75, 2.05 and 3.35, and the third interval is empty.
    codebook, labels = cluster(weights, 4, iterations=1)
    np.testing.assert_allclose(codebook[labels], [0.2, 0.2, 0.2, 1.0, 1.0, 4.0], atol=1e-6)


def projected(value: np.ndarray, labels: np.ndarray, clusters: int) -> np.ndarray:
    """What the docstring of ``Codebook.project`` says, in NumPy."""
    result = np.zeros_like(value)
    means = {}
    for label in range(clusters):
        members = (labels == label) & (value != 0)
        if members.any():
            means[label] = value[members].mean(dtype=np.float64)
    if len(means) == clusters and (value == 0).any():
        means[min(means, key=lambda label: abs(means[label]))] = 0.0
    for label, mean in means.items():
        result[(labels == label) & (value != 0)] = mean
    return result


@given(data=st.data(), clusters=st.integers(2, 6), shape=st.sampled_from([(7,), (3, 4), (2, 2, 3, 2)]))
@settings(deadline=None, max_examples=60)
def test_projection_equals_numpy_and_never_adds_a_value(data, clusters, shape):
    # Multiples of 1/8, whose sums are exact: equal means are then equal in float32 and in float64.
    value = data.draw(hnp.arrays(np.float32, shape, elements=st.integers(-20, 20).map(lambda n: n / 8)))
    labels = data.draw(hnp.arrays(np.uint16, shape, elements=st.integers(0, clusters - 1)))
    guarantee = Codebook("share", clusters, {"dense/kernel": labels})
    once = np.asarray(guarantee.project("dense/kernel", tf.constant(value)))
    assert once.shape == shape
    assert len(np.unique(once)) <= clusters
    assert not once[value == 0].any()
    np.testing.assert_allclose(once, projected(value, labels, clusters), atol=1e-6)
    twice = np.asarray(guarantee.project("dense/kernel", tf.constant(once)))
    np.testing.assert_allclose(twice, once, atol=1e-6)


def test_zeros_that_come_in_take_the_cluster_nearest_to_zero():
    labels = np.array([0, 0, 1, 1, 2, 2], np.uint16)
    guarantee = Codebook("share", 3, {"dense/kernel": labels})
    given_values = tf.constant([-1.0, -3.0, 0.5, 0.7, 4.0, 0.0])
    np.testing.assert_allclose(guarantee.project("dense/kernel", given_values), [-2, -2, 0, 0, 4, 0], atol=1e-6)
    without_zeros = tf.constant([-1.0, -3.0, 0.5, 0.7, 4.0, 6.0])
    np.testing.assert_allclose(guarantee.project("dense/kernel", without_zeros), [-2, -2, 0.6, 0.6, 5, 5], atol=1e-6)


@given(weights=hnp.arrays(np.float32, (4, 5), elements=VALUES), clusters=st.integers(2, 8))
@settings(deadline=None)
def test_the_guarantee_counts_distinct_values(weights, clusters):
    guarantee = Codebook("share", clusters, {"dense/kernel": np.zeros((4, 5), np.uint16)})
    too_many = len(set((weights + 0.0).ravel().tolist())) > clusters
    model = SimpleNamespace(get_layer=lambda name: SimpleNamespace(kernel=weights))
    assert bool(guarantee.check(model)) == too_many
    assert bool(guarantee.check_file(SimpleNamespace(kernel_of=lambda name, shape: weights))) == too_many
    assert guarantee.check_file(SimpleNamespace(kernel_of=lambda name, shape: None))


@pytest.fixture(scope="module")
def data() -> Data:
    x = np.random.default_rng(0).normal(size=(96, 6, 6, 2)).astype(np.float32)
    part = Split(x, np.arange(96) % 3)
    return make_data("random", part, part)


@pytest.fixture
def model() -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((6, 6, 2), name="image")
    x = layers.Conv2D(5, 3, use_bias=False, name="conv")(image)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.Conv2D(2, 1, name="tiny")(x)
    built = tf_keras.Model(image, layers.Dense(3, name="dense")(layers.Flatten()(x)))
    rng = np.random.default_rng(0)
    built.get_layer("norm").set_weights([rng.uniform(0.5, 1.5, 5).astype(np.float32) for _ in range(4)])
    return built


def context(model: tf_keras.Model, data: Data, recovery: Recovery) -> Context:
    return Context(stage="share", data=data, reference=model, recovery=recovery, seed=1)


@pytest.mark.parametrize(
    "recovery",
    [Recovery(method="none"), Recovery(epochs=2, batch_size=16, learning_rate=0.05)],
    ids=["none", "training"],
)
def test_every_kernel_gets_few_values_and_small_ones_are_left_alone(recovery, model, data):
    result = Share(clusters=12).apply(Candidate(model), context(model, data, recovery))
    assert [item.layer for item in result.skipped] == ["tiny"]
    found = {k.layer.name: len(np.unique(k.value)) for k in kernels(result.model)}
    assert found["conv"] <= 12
    assert found["dense"] <= 12
    assert min(found["conv"], found["dense"]) > 6
    (guarantee,) = result.guarantees
    assert guarantee.layers == {"conv", "dense"}
    assert guarantee.check(result.model) == []


def test_what_is_clustered_is_the_kernel_with_the_norm_folded_in(model, data):
    result = Share(clusters=40).apply(Candidate(model), context(model, data, Recovery(method="none")))
    assert not [layer for layer in result.model.layers if isinstance(layer, layers.BatchNormalization)]
    norm = model.get_layer("norm")
    gain = np.asarray(norm.gamma) / np.sqrt(np.asarray(norm.moving_variance) + norm.epsilon)
    folded = np.asarray(model.get_layer("conv").kernel) * gain
    codebook, labels = cluster(folded, 40)
    np.testing.assert_allclose(result.model.get_layer("conv").kernel, codebook[labels], atol=1e-5)


@pytest.mark.parametrize("clusters", [4, 12])
def test_zeros_of_an_earlier_stage_survive_training(clusters, model, data):
    recovery = Recovery(epochs=2, batch_size=16, learning_rate=0.05)
    pruned = Prune(sparsity=0.5).apply(Candidate(model), context(model, data, Recovery(method="none")))
    shared = Share(clusters=clusters).apply(pruned, context(model, data, recovery))
    for guarantee in shared.guarantees:
        assert guarantee.check(shared.model) == []
    for before, after in zip(kernels(pruned.model), kernels(shared.model), strict=True):
        assert not after.value[before.value == 0].any()
        if after.layer.name != "tiny":
            assert len(np.unique(after.value)) <= clusters


def test_no_kernel_large_enough_is_an_error(model, data):
    with pytest.raises(CompressError, match="tiny"):
        Share(clusters=5000).apply(Candidate(model), context(model, data, Recovery(method="none")))


def between_normalisations(kind: str) -> tf_keras.Model:
    """A model in which a normalisation that cannot be folded stands next to the layer ``touched``."""
    layers = tf_keras.layers
    if kind == "before":
        image = tf_keras.Input((8,))
        x = layers.Dense(32, activation="relu", name="free")(image)
        x = layers.Dropout(0.1)(layers.BatchNormalization()(x))
        return tf_keras.Model(image, layers.Dense(24, name="touched")(x))
    image = tf_keras.Input((8, 8, 4))
    if kind == "separable":
        x = layers.SeparableConv2D(16, 3, name="touched")(image)
        x = layers.BatchNormalization()(x)
    else:
        x = layers.Conv2D(16, 3, use_bias=False, name="touched")(image)
        x = layers.Normalization(mean=np.zeros(16), variance=np.linspace(0.5, 2, 16))(x)
    x = layers.Flatten()(layers.ReLU()(x))
    return tf_keras.Model(image, layers.Dense(24, name="free")(x))


@pytest.mark.parametrize("kind", ["before", "separable", "after"])
def test_a_layer_next_to_a_normalisation_that_stays_is_left_alone(kind, tmp_path):
    """The converter merges it into the kernel, so the file would hold other values than the model."""
    model = between_normalisations(kind)
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.5, 2.0, np.shape(w)) if np.ndim(w) else w for w in model.get_weights()])
    shape = model.input_shape[1:]
    split = Split(rng.normal(size=(40, *shape)).astype(np.float32), np.arange(40) % 24)
    data = make_data("made", split, split)
    context = Context("share", data, model, Recovery(method="none"), 0)
    shared = Share(clusters=8).apply(Candidate(model), context)
    assert {item.layer for item in shared.skipped} == {"touched"}
    file = TFLiteFile.read(export(shared, data, tmp_path / "model.tflite").path)
    assert [v for guarantee in shared.guarantees for v in guarantee.check_file(file)] == []
    free = np.shape(model.get_layer("free").kernel)
    assert len(np.unique(file.kernel_of("free", free))) <= 8


@pytest.mark.parametrize("start", ["linear", "density", "kmeans++"])
@given(weights=WEIGHTS, clusters=st.integers(2, 12))
@settings(deadline=None, max_examples=40)
def test_wherever_it_starts_each_weight_has_the_nearest_value(start, weights, clusters):
    codebook, labels = cluster(weights, clusters, 100, start, np.random.default_rng(0))
    rest = weights[weights != 0].astype(np.float64)
    if rest.size:
        used = np.unique(codebook[labels[weights != 0]]).astype(np.float64)
        nearest = np.abs(rest[:, None] - used).min(axis=1)
        np.testing.assert_allclose(np.abs(rest - codebook[labels][weights != 0]), nearest, atol=1e-6)
    assert not codebook[labels][weights == 0].any()


def test_a_drawn_start_finds_what_a_linear_one_misses():
    """Most weights are small: between extremes that are far away a linear start has little for them."""
    rng = np.random.default_rng(0)
    weights = np.concatenate([rng.normal(0, 0.01, 20_000), [-5.0, 5.0]]).astype(np.float32)
    errors = {}
    for start in ("linear", "density", "kmeans++"):
        codebook, labels = cluster(weights, 16, 3, start, np.random.default_rng(0))
        errors[start] = squared_error(weights, codebook[labels])
    assert errors["kmeans++"] < errors["linear"] / 2
    again = (cluster(weights, 16, 3, "kmeans++", np.random.default_rng(0))[0] for _ in range(2))
    np.testing.assert_array_equal(*again)


TRAINING = Recovery(epochs=2, batch_size=16, learning_rate=0.05)


@pytest.mark.parametrize("recovery", [Recovery(method="none"), TRAINING], ids=["none", "training"])
def test_each_channel_has_values_of_its_own(recovery, model, data):
    shared = Share(clusters=4, scope="channel").apply(Candidate(model), context(model, data, recovery))
    (guarantee,) = shared.guarantees
    assert guarantee.check(shared.model) == []
    dense = np.asarray(shared.model.get_layer("dense").kernel)
    assert all(len(np.unique(dense[:, channel])) <= 4 for channel in range(3))
    assert len(np.unique(dense)) > 4
    shared.model.get_layer("dense").kernel.assign(np.where(np.arange(3) == 1, np.linspace(0, 1, 32)[:, None], dense))
    (violation,) = guarantee.check(shared.model)
    assert (violation.layer, violation.found) == ("dense/kernel", "32 distinct values, at most 4")


@pytest.mark.parametrize("recovery", [Recovery(method="none"), TRAINING], ids=["none", "training"])
def test_the_whole_model_shares_one_codebook(recovery, model, data):
    shared = Share(clusters=6, scope="model").apply(Candidate(model), context(model, data, recovery))
    together = np.concatenate([kernel.value.ravel() for kernel in kernels(shared.model)])
    assert 3 <= len(np.unique(together)) <= 6
    (guarantee,) = shared.guarantees
    assert guarantee.layers == {"conv", "tiny", "dense"}
    assert guarantee.check(shared.model) == []
    dense = shared.model.get_layer("dense").kernel
    before = np.asarray(dense)
    dense.assign_add(tf.random.normal(dense.shape))
    assert guarantee.check(shared.model) != []
    np.testing.assert_array_equal(guarantee.project("dense/kernel", dense.value()), before)


def test_more_clusters_than_the_whole_model_has_weights_are_refused_with_their_number(model, data):
    total = sum(kernel.size for kernel in kernels(model))
    with pytest.raises(CompressError, match=rf"clusters.*the {total:,} weights of the selected kernels together"):
        Share(clusters=total, scope="model").apply(Candidate(model), context(model, data, Recovery(method="none")))


@pytest.mark.parametrize("gradient", ["mean", "sum"])
def test_a_centroid_moves_by_the_mean_or_the_sum_of_its_weights_moves(gradient):
    labels = np.array([[0, 1], [1, 2]], np.uint16)
    weights = tf.Variable([[0.0, 1.0], [1.0, 3.0]])
    trained = TrainedCentroids([weights], [labels], joint=False, summed=gradient == "sum")
    weights.assign_add([[0.5, 0.25], [0.5, -1.0]])
    trained(tf.constant(0.5))
    # The zero stays; both weights of the second centroid move together.
    second = 1.75 if gradient == "sum" else 1.375
    np.testing.assert_allclose(weights, [[0.0, second], [second, 2.0]])


@given(data=st.data(), shape=st.sampled_from([(7, 3), (2, 2, 3, 2)]))
@settings(deadline=None, max_examples=40)
def test_projection_by_channel_is_that_of_each_channel(data, shape):
    clusters = 3
    value = data.draw(hnp.arrays(np.float32, shape, elements=st.integers(-20, 20).map(lambda n: n / 8)))
    labels = data.draw(hnp.arrays(np.int32, shape, elements=st.integers(0, clusters - 1)))
    numbered = labels + clusters * np.arange(shape[-1])
    guarantee = Codebook("share", clusters, {"dense/kernel": numbered}, per_channel=True)
    once = np.asarray(guarantee.project("dense/kernel", tf.constant(value)))
    for channel in range(shape[-1]):
        alone = Codebook("share", clusters, {"dense/kernel": labels[..., channel].astype(np.uint16)})
        expected = alone.project("dense/kernel", tf.constant(value[..., channel]))
        np.testing.assert_allclose(once[..., channel], expected, atol=1e-6)


@pytest.mark.parametrize("scope", ["layer", "channel", "model"])
def test_pruned_zeros_survive_every_scope(scope, model, data):
    pruned = Prune(sparsity=0.5).apply(Candidate(model), context(model, data, Recovery(method="none")))
    shared = Share(clusters=5, scope=scope, gradient="sum").apply(
        pruned, context(model, data, Recovery(epochs=1, batch_size=16, learning_rate=0.001))
    )
    assert [v for guarantee in shared.guarantees for v in guarantee.check(shared.model)] == []
    for before, after in zip(kernels(pruned.model), kernels(shared.model), strict=True):
        assert not after.value[before.value == 0].any()


@pytest.mark.parametrize("pruned", [False, True])
def test_tfmot_s_scheme_gives_few_values_and_keeps_zeros(pruned, model, data):
    candidate = Candidate(model)
    if pruned:
        candidate = Prune(sparsity=0.5).apply(candidate, context(model, data, Recovery(method="none")))
    before = [weight.copy() for weight in candidate.model.get_weights()]
    shared = Share(clusters=6, scheme="tfmot").apply(candidate, context(model, data, TRAINING))
    for one, other in zip(before, candidate.model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert [type(layer) for layer in shared.model.layers if "Cluster" in type(layer).__name__] == []
    assert [v for guarantee in shared.guarantees for v in guarantee.check(shared.model)] == []
    for old, new in zip(kernels(candidate.model), kernels(shared.model), strict=True):
        assert not new.value[old.value == 0].any()
        if new.layer.name in ("conv", "dense"):
            assert 3 <= len(np.unique(new.value)) <= 6


def test_tfmot_s_scheme_trains_a_model_that_ends_in_a_softmax_on_its_logits(model, data):
    found = []
    for ending in (tf_keras.activations.linear, tf_keras.activations.softmax):
        network = copy_model(model)
        network.outputs[0].node.layer.activation = ending
        candidate = Share(clusters=6, scheme="tfmot").apply(Candidate(network), context(network, data, TRAINING))
        assert candidate.model.outputs[0].node.layer.activation is ending
        found.append(candidate.model.get_weights())
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_tfmot_s_scheme_is_refused_or_listed_where_it_cannot(model, data):
    shared = Share(clusters=6).apply(Candidate(model), context(model, data, Recovery(method="none")))
    with pytest.raises(CompressError, match="know nothing of share"):
        Share(clusters=4, scheme="tfmot").apply(shared, context(model, data, Recovery(method="none")))
    with pytest.raises(ValueError, match="scope=model only beside scheme=own"):
        Share(scheme="tfmot", scope="model")
    image = tf_keras.Input((6, 6, 2))
    x = layers.Flatten()(layers.DepthwiseConv2D(3, name="depthwise")(image))
    deep = tf_keras.Model(image, layers.Dense(3, name="dense")(x))
    found = Share(clusters=4, scheme="tfmot").apply(Candidate(deep), context(deep, data, Recovery(method="none")))
    assert [(item.layer, item.by_choice) for item in found.skipped] == [("depthwise", False)]
    assert len(np.unique(found.model.get_layer("dense").kernel)) <= 4
    pruned = Prune(sparsity=0.5).apply(Candidate(model), context(model, data, Recovery(method="none")))
    with pytest.raises(CompressError, match="TFMOT's cluster_weights takes"):
        Share(clusters=2, scheme="tfmot").apply(pruned, context(model, data, Recovery(method="none")))
