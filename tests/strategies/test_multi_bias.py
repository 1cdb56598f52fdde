"""Filters with several biases: the clustering against all partitions, the new order of channels, the files."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.candidate import Candidate, Storage
from compress.data.source import Data, Split, make_data
from compress.deploy.tflite import export
from compress.errors import CompressError
from compress.graph.channels.groups import Channels
from compress.graph.channels.order import Order, can_be_ordered
from compress.graph.selection import Rule, Selection
from compress.metrics.accuracy import file_outputs
from compress.metrics.counts import count_macs
from compress.metrics.tflite_file import TFLiteFile
from compress.strategies.compact.multi_bias import cluster_outputs, leading
from compress.strategies.compact.transferred import Transferred
from compress.strategies.pruning.prune import Prune
from compress.strategies.sharing.hashed import Hashed
from compress.strategies.strategy import Context
from compress.training import Recovery

layers = tf_keras.layers
NONE = Recovery(method="none")


def partitions(items: list[int], each: int) -> Iterator[list[list[int]]]:
    """All ways to part items into clusters of ``each``."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for mask in range(1 << len(rest)):
        if mask.bit_count() == each - 1:
            mates = [item for index, item in enumerate(rest) if mask >> index & 1]
            others = [item for index, item in enumerate(rest) if not mask >> index & 1]
            for tail in partitions(others, each):
                yield [[first, *mates], *tail]


def explained(covariance: np.ndarray, clusters: list[list[int]]) -> float:
    return sum(float(np.linalg.eigvalsh(covariance[np.ix_(part, part)])[-1]) for part in clusters)


@given(seed=st.integers(0, 1000), each=st.integers(2, 3))
@settings(deadline=None, max_examples=20)
def test_outputs_that_go_together_are_found(seed: int, each: int) -> None:
    rng = np.random.default_rng(seed)
    responses = rng.normal(size=(200, 6 // each))
    owners = rng.permutation(np.repeat(np.arange(6 // each), each))
    outputs = responses[:, owners] * rng.uniform(0.5, 2, 6) + 0.01 * rng.normal(size=(200, 6))
    covariance = np.cov(outputs.T)
    clusters = cluster_outputs(covariance, each, rng)
    assert sorted(clusters.reshape(-1)) == list(range(6))
    best = max(explained(covariance, parts) for parts in partitions(list(range(6)), each))
    assert explained(covariance, clusters.tolist()) == pytest.approx(best, rel=1e-6)
    for part, scales in zip(clusters, leading(covariance, clusters), strict=True):
        assert scales @ covariance[np.ix_(part, part)] @ scales == pytest.approx(explained(covariance, [part]))


@pytest.fixture(scope="module")
def data() -> Data:
    x = np.random.default_rng(0).normal(size=(96, 8, 8, 3)).astype(np.float32)
    part = Split(x, np.arange(96) % 3)
    return make_data("random", part, part)


@pytest.fixture(scope="module")
def model() -> tf_keras.Model:
    """A network in which two convolutions may share responses, and two may not: they are added up."""
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="first")(image)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="second")(x)
    one = layers.Conv2D(6, 3, padding="same", name="one")(x)
    other = layers.Conv2D(6, 1, name="other")(x)
    x = layers.Conv2D(12, 3, strides=2, activation="relu", name="last")(layers.Add()([one, other]))
    model = tf_keras.Model(image, layers.Dense(3, name="logits")(layers.Flatten()(x)), name="network")
    rng = np.random.default_rng(1)
    for layer in model.layers:
        layer.set_weights([rng.uniform(0.5, 1.5, w.shape) if w.ndim == 1 else w for w in layer.get_weights()])
    return model


def test_channels_in_another_order_change_nothing(model, data) -> None:
    channels = Channels(model)
    free = {g.name for g in channels.groups if g.kept_because is None and len(g.writers) == 1 and can_be_ordered(g)}
    assert free == {"first", "second", "last"}
    rng = np.random.default_rng(0)
    order = Order.of(channels, {"first": rng.permutation(8), "second": rng.permutation(8), "last": rng.permutation(12)})
    other = order.model()
    assert not np.array_equal(other.get_layer("last").kernel, model.get_layer("last").kernel)
    np.testing.assert_allclose(other(data.train.x[:4]), model(data.train.x[:4]), atol=1e-4)


def applied(model, data, before: Candidate | None = None, recovery=NONE, **fields) -> Candidate:
    context = Context("transferred", data, model, recovery, seed=1)
    return Transferred(transform="multi_bias", **fields).apply(before or Candidate(model), context)


def share(model: tf_keras.Model, name: str, each: int, rng: np.random.Generator) -> None:
    """Give the layer filters that are copies of fewer ones, in any order."""
    layer = model.get_layer(name)
    kernel, *bias = layer.get_weights()
    owners = rng.permutation(np.repeat(np.arange(kernel.shape[-1] // each), each))
    layer.set_weights([kernel[..., owners] * rng.uniform(0.5, 2, len(owners)), *bias])


@pytest.mark.parametrize("images", [0, 96])
def test_filters_that_are_copies_lose_nothing(images, model, data) -> None:
    copies = tf_keras.models.clone_model(model)
    copies.set_weights(model.get_weights())
    rng = np.random.default_rng(2)
    for name in ("first", "second", "last"):
        share(copies, name, 2, rng)
    result = applied(copies, data, images=images)
    assert result.guarantees[0].filters == {"first": 4, "second": 4, "last": 6}
    assert {item.layer: item.reason for item in result.skipped} == {
        "one": "its channels are those of other, too",
        "other": "its channels are those of one, too",
    }
    assert result.guarantees[0].check(result.model) == []
    wanted = np.asarray(copies(data.train.x))
    np.testing.assert_allclose(result.model(data.train.x), wanted, atol=1e-2 * np.abs(wanted).max())
    saved = 64 * 4 * (27 + 72) + 9 * 6 * 54
    assert count_macs(copies) - count_macs(result.model) == saved - 64 * (8 + 8) - 9 * 12


def test_least_squares_on_images_beats_the_weights_alone(model, data) -> None:
    wanted = np.asarray(model(data.train.x))
    errors = {i: float(np.mean((applied(model, data, images=i).model(data.train.x) - wanted) ** 2)) for i in (0, 96)}
    assert errors[96] < 0.8 * errors[0]


@pytest.mark.parametrize("scheme", ["float32", "int8"])
def test_the_file_runs_so_few_filters(scheme, model, data, tmp_path) -> None:
    result = applied(model, data, images=32).evolve(storage=Storage(scheme))
    artifact = export(result, data, tmp_path / "model.tflite")
    file = TFLiteFile.read(artifact.path)
    assert result.guarantees[0].check_file(file) == []
    ours, theirs = file_outputs(artifact.path, data.test.x), np.asarray(result.model(data.test.x))
    assert np.abs(ours - theirs).max() <= (1e-5 if scheme == "float32" else 0.15) * np.abs(theirs).max()
    whole = export(Candidate(model), data, tmp_path / "whole.tflite")
    found = result.guarantees[0].check_file(TFLiteFile.read(whole.path))
    assert {item.layer for item in found} == {"first", "second", "last"}


def test_zeros_of_the_layers_behind_move_with_their_channels(model, data) -> None:
    context = Context("prune", data, model, NONE, seed=1, selection=Selection(only=(Rule(name="one|other|logits"),)))
    pruned = Prune(sparsity=0.5).apply(Candidate(model), context)
    result = applied(model, data, before=pruned, images=32)
    assert [v for bound in result.guarantees for v in bound.check(result.model)] == []
    # In the old order they would not be where the mask says.
    (old,) = (bound for bound in pruned.guarantees)
    assert old.check(result.model)


def test_weights_that_are_bound_to_their_places_keep_the_order(model, data) -> None:
    context = Context("hashed", data, model, NONE, seed=1, selection=Selection(only=(Rule(name="second"),)))
    hashed = Hashed(weights=0.5, images=0).apply(Candidate(model), context)
    context = Context("transferred", data, model, NONE, 1, Selection(only=(Rule(name="first|last"),)))
    result = Transferred(transform="multi_bias", images=0).apply(hashed, context)
    assert [v for bound in result.guarantees for v in bound.check(result.model)] == []
    assert {item.layer: item.reason for item in result.skipped} == {
        "first": "an earlier stage has bound the weights of second to the order of its channels"
    }


def test_filters_that_are_not_so_many_times_are_named(model, data) -> None:
    with pytest.raises(CompressError) as caught:
        applied(model, data, filters=5)
    assert "8 filters are not several times 5" in caught.value.received
