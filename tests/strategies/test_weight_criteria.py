"""SNIP, GraSP and SynFlow against formulas of their own; what cannot be scored is refused."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from compress.candidate import Candidate
from compress.data.source import Data, Split, make_data
from compress.errors import CompressError
from compress.graph.kernels import kernels
from compress.strategies.pruning.criteria import Evidence, Grasp, Snip, SynFlow, criteria, linear_network
from compress.strategies.pruning.masks import Axes, Masking, Pattern
from compress.strategies.pruning.prune import Prune
from compress.strategies.strategy import Context
from compress.training import Recovery

layers = tf_keras.layers
X = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def data() -> Data:
    part = Split(X, np.random.default_rng(1).integers(0, 4, 300))
    return make_data("random", part, part)


def network(hidden: int | None = None, last: str | None = None) -> tf_keras.Model:
    tf_keras.utils.set_random_seed(3)
    values = x = tf_keras.Input((6,))
    if hidden:
        x = layers.Dense(hidden, activation="tanh", bias_initializer="normal", name="hidden")(x)
    return tf_keras.Model(values, layers.Dense(4, last, bias_initializer="normal", name="logits")(x))


def evidence(model: tf_keras.Model, data: Data, *, sparsity: float = 0.5, images: int = 1000) -> Evidence:
    found = kernels(model)
    masking = Masking([Axes.of(k) for k in found], Pattern(), "global", [1.0] * len(found))
    return Evidence(model, [k.name for k in found], data, 0, images, masking, sparsity, "prune")


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("last", [None, "softmax"])
def test_snip_of_a_linear_model_has_a_closed_form(last, data):
    model = network(last=last)
    kernel, bias = (np.asarray(w, float) for w in model.get_layer("logits").weights)
    x, y = data.train.x.astype(float), data.train.y
    gradient = x.T @ (softmax(x @ kernel + bias) - np.eye(4)[y]) / len(x)
    (scores,) = Snip().scores(evidence(model, data))
    np.testing.assert_allclose(scores, np.abs(kernel * gradient), rtol=1e-3, atol=1e-6)


def test_grasp_is_the_slope_of_the_gradients_norm(data):
    """w (H g) = w d(|g|^2 / 2)/dw, by differences of the loss's gradients in double precision."""
    model = network(hidden=5)
    one, two = model.get_layer("hidden"), model.get_layer("logits")
    (w1, b1, w2, b2) = (np.asarray(w, float) for w in [*one.weights, *two.weights])
    x, y = data.train.x.astype(float), data.train.y

    def half_norm(first: np.ndarray, second: np.ndarray) -> float:
        h = np.tanh(x @ first + b1)
        error = (softmax((h @ second + b2) / 200) - np.eye(4)[y]) / 200 / len(x)
        to_second = h.T @ error
        to_first = x.T @ ((error @ second.T) * (1 - h**2))
        return float((to_first**2).sum() + (to_second**2).sum()) / 2

    def slope(place: int, index: tuple[int, ...], step: float = 1e-4) -> float:
        moved = [[w.copy() for w in (w1, w2)] for _ in range(2)]
        moved[0][place][index] += step
        moved[1][place][index] -= step
        return (half_norm(*moved[0]) - half_norm(*moved[1])) / (2 * step)

    scores = Grasp().scores(evidence(model, data))
    for place, weight in enumerate((w1, w2)):
        wanted = np.array([slope(place, index) for index in np.ndindex(weight.shape)]).reshape(weight.shape) * weight
        np.testing.assert_allclose(scores[place], wanted, rtol=2e-2, atol=2e-2 * np.abs(wanted).max())


def test_synaptic_flow_is_conserved_at_every_hidden_neuron(data):
    """arXiv 2006.05467, theorem 1: what flows into a neuron flows out of it; all layers carry the whole flow."""
    tf_keras.utils.set_random_seed(0)
    values = x = tf_keras.Input((6,))
    for index, units in enumerate((7, 5)):
        x = layers.Dense(units, use_bias=False, name=f"dense{index}")(x)
        x = layers.Activation("sigmoid")(layers.BatchNormalization(beta_initializer="ones")(x))
    model = tf_keras.Model(values, layers.Softmax()(layers.Dense(4, bias_initializer="ones", name="last")(x)))
    first, second, third = SynFlow().scores(evidence(model, data, sparsity=0.6))
    alive = [np.where(np.isneginf(s), 0, s) for s in (first, second, third)]
    np.testing.assert_allclose(alive[0].sum(0), alive[1].sum(1), rtol=1e-9)
    np.testing.assert_allclose(alive[1].sum(0), alive[2].sum(1), rtol=1e-9)
    assert alive[0].sum() > 0


def test_the_linear_network_multiplies_absolute_values():
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((5, 5, 2))
    x = layers.Rescaling(1 / 255, offset=-1)(image)
    x = tf.nn.relu6(layers.Conv2D(3, 3, bias_initializer="ones")(x))
    x = layers.add([layers.DepthwiseConv2D(3, padding="same", activation="relu")(x), x])
    model = tf_keras.Model(image, layers.Dense(4, activation="softmax")(layers.Flatten()(x)))
    conv, depthwise, dense = (np.abs(k.value.astype(float)) for k in kernels(model))
    hidden = np.broadcast_to(conv.sum((0, 1, 2)), (3, 3, 3))
    padded = np.pad(hidden, ((1, 1), (1, 1), (0, 0)))
    spread = sum(depthwise[i, j, :, 0] * padded[i : i + 3, j : j + 3] for i in range(3) for j in range(3))
    wanted = (hidden + spread).ravel() @ dense
    np.testing.assert_allclose(np.ravel(linear_network(model)(np.ones((1, 5, 5, 2)))), wanted, rtol=1e-9)


def test_synflow_lets_no_layer_die_where_magnitude_does(data):
    """A wide layer of small weights beside a narrow one: at 1 %, by magnitude the wide one would be empty."""
    tf_keras.utils.set_random_seed(0)
    values = tf_keras.Input((6,))
    small = tf_keras.initializers.RandomNormal(stddev=0.001)
    x = layers.Dense(200, use_bias=False, kernel_initializer=small, name="wide")(values)
    model = tf_keras.Model(values, layers.Dense(4, use_bias=False, name="last")(x))
    seen = evidence(model, data, sparsity=0.99)
    magnitude, synflow = (criteria()[name].scores(seen) for name in ("magnitude", "synflow"))
    wide, last = seen.masking.masks(synflow, 0.99)
    assert wide.sum() + last.sum() == 20
    np.testing.assert_array_equal(wide.any(0), last.any(1), "what is left reads something and is read")
    assert wide.sum() >= 4
    kept = np.sort(np.concatenate([s.ravel() for s in magnitude]))[-20]
    assert magnitude[0].max() < kept


@pytest.mark.parametrize("criterion", ["random", "snip", "grasp", "synflow"])
def test_every_criterion_meets_the_sparsity_exactly(criterion, data):
    model = network(hidden=20)
    context = Context("prune", data, model, Recovery(epochs=1, batch_size=64), 0)
    result = Prune(sparsity=0.71, criterion=criterion).apply(Candidate(model), context)
    left = [np.count_nonzero(k.value) for k in kernels(result.model)]
    sizes = [k.size for k in kernels(model)]
    if criterion == "random":
        assert left == [s - round(0.71 * s) for s in sizes]
    else:
        assert sum(left) == sum(sizes) - round(0.71 * sum(sizes))
    assert result.guarantees[0].check(result.model) == []


@pytest.mark.parametrize("criterion", ["snip", "grasp"])
def test_labels_that_say_nothing_are_refused(criterion):
    part = Split(X, np.zeros(300, int))
    model = network()
    context = Context("prune", make_data("same", part, part), model, Recovery(method="none"), 0)
    with pytest.raises(CompressError, match="one and the same label") as caught:
        Prune(criterion=criterion).apply(Candidate(model), context)
    assert caught.value.where == "strategy.prune.criterion"
