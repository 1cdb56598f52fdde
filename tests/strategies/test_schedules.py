"""Movement pruning, regrowth and rewinding against NumPy; fields that do not go together."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from pydantic import ValidationError

from compress.candidate import Candidate
from compress.cli.build import make_plan
from compress.cli.compose import compose_config
from compress.data.source import Data, Split, make_data
from compress.errors import CompressError
from compress.graph.kernels import get_weight, kernels
from compress.strategies.pruning.masks import Axes, Masking, Pattern
from compress.strategies.pruning.prune import Prune
from compress.strategies.pruning.schedules import Movement, Regrowth
from compress.strategies.strategy import Context
from compress.training import Recovery

layers = tf_keras.layers
TRAINING = Recovery(epochs=3, batch_size=16, learning_rate=0.05)
LAYER = Masking([Axes(-2, (-1,))], Pattern(), "layer", [1.0])
STEPS, RATE = 97, 0.1
# A prime number of steps: no update of the masks is due at a fraction that rounding could tip.


@pytest.fixture(scope="module")
def data() -> Data:
    x = np.random.default_rng(0).normal(size=(96, 6, 6, 4)).astype(np.float32)
    part = Split(x, np.arange(96) % 3)
    return make_data("random", part, part)


@pytest.fixture
def model() -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((6, 6, 4), name="image")
    x = layers.Conv2D(8, 3, name="conv")(image)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    return tf_keras.Model(image, layers.Dense(3, name="dense")(layers.Flatten()(x)))


def context(model: tf_keras.Model, data: Data, recovery: Recovery = TRAINING, **changes) -> Context:
    return Context(stage="prune", data=data, reference=model, recovery=recovery, seed=1, **changes)


def keep_highest(scores: np.ndarray, count: int) -> np.ndarray:
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(scores, axis=None)[scores.size - count :]] = True
    return mask.reshape(scores.shape)


def descend(schedule, variable: tf.Variable, seed: int):
    """Take plain gradient steps with random gradients; yields (share done, gradient) after each."""
    rng = np.random.default_rng(seed)
    project = tf.function(schedule)
    for step in range(1, STEPS + 1):
        gradient = rng.normal(size=variable.shape).astype(np.float32)
        variable.assign_sub(RATE * gradient)
        project(tf.constant(step / STEPS))
        yield step / STEPS, gradient


def test_movement_is_the_sum_of_weight_times_gradient_with_straight_through_scores():
    """arXiv 2005.07683, equations 3 and 4: S -= rate w dL/dw for all weights, W -= rate dL/dw for those in the mask."""
    weights = np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32)
    variable = tf.Variable(weights)
    movement = Movement([variable], LAYER, 0.0, 0.6, ramp=0.5)
    scores, mask, update, came_back = np.zeros_like(weights), np.ones(weights.shape, bool), 0, False
    for done, gradient in descend(movement, variable, 2):
        scores = scores - RATE * weights * gradient
        weights = np.where(mask, weights - RATE * gradient, weights)
        due = int(min(np.float32(done) / np.float32(0.5), 1) * 50)
        if due > update:
            share = 0.6 * (1 - (1 - due / 50) ** 3)
            before, mask, update = mask, keep_highest(scores, 30 - round(share * 30)), due
            came_back |= bool((mask & ~before).any())
        assert (movement.masks[0] == mask).all()
        np.testing.assert_allclose(variable, np.where(mask, weights, 0), atol=1e-5)
    assert mask.sum() == 12
    assert came_back


def test_regrowth_drops_the_smallest_and_grows_by_the_gradient():
    """arXiv 1911.11134, algorithm 1, with the cosine of its equation 1 until three quarters of the training."""
    weights = np.random.default_rng(3).normal(size=(10, 8)).astype(np.float32)
    mask = keep_highest(np.abs(weights), 24)
    variable = tf.Variable(weights)
    regrowth = Regrowth([variable], LAYER, 0.7, 0.3, [mask])
    weights, update, changed = np.where(mask, weights, 0), 0, []
    for done, gradient in descend(regrowth, variable, 4):
        moved = weights - RATE * gradient
        due = int(min(np.float32(done) / np.float32(0.75), 1) * 50)
        if due > update:
            share = 0.15 * (1 + np.cos(np.pi * due / 50))
            left = 80 - round((1 - 0.3 * (1 - share)) * 80)
            stay = keep_highest(np.where(mask, np.abs(moved), -1), left)
            new = keep_highest(np.where(stay, np.inf, np.abs(gradient)), 24)
            changed.append(int((new & ~mask).sum()))
            moved, mask = np.where(mask, moved, 0), new
            update = due
        weights = np.where(mask, moved, 0)
        assert (regrowth.masks[0] == mask).all()
        np.testing.assert_allclose(variable, weights, atol=1e-5)
        assert mask.sum() == 24
    assert changed[0] > 0
    assert changed[-1] == 0
    assert sum(changed) > 20


def test_what_an_earlier_stage_has_set_to_zero_does_not_grow(model, data):
    first = Prune(sparsity=0.3).apply(Candidate(model), context(model, data, Recovery(method="none")))
    for fields in ({"regrow": 0.5}, {"criterion": "movement"}):
        second = Prune(sparsity=0.5, **fields).apply(first, context(model, data))
        earlier, later = (guarantee.masks for guarantee in second.guarantees)
        assert all(not (later[name] & ~earlier[name]).any() for name in later)
        assert {n: int((~m).sum()) for n, m in later.items()} == {n: round(0.5 * m.size) for n, m in later.items()}
        for guarantee in second.guarantees:
            assert guarantee.check(second.model) == []


@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_regrowth_keeps_the_count_and_changes_the_mask(ranking, model, data):
    result = Prune(sparsity=0.8, regrow=0.3, ranking=ranking).apply(Candidate(model), context(model, data))
    (zeros,) = result.guarantees
    masks = zeros.masks
    if ranking == "layer":
        assert {n: int((~m).sum()) for n, m in masks.items()} == {k.name: round(0.8 * k.size) for k in kernels(model)}
    total = sum(m.size for m in masks.values())
    assert abs(sum(int((~m).sum()) for m in masks.values()) - 0.8 * total) <= (1 if ranking == "global" else 2)
    static = Prune(sparsity=0.8, ranking=ranking).apply(Candidate(model), context(model, data, Recovery(method="none")))
    assert any((masks[n] != m).any() for n, m in static.guarantees[0].masks.items())
    assert zeros.check(result.model) == []


class Recorder(Context):
    """In place of the training: notes what it is given, then moves every weight that may move."""

    def recover(self, candidate, *, projections=(), terms=()):
        SEEN.append((self.recovery.epochs, candidate.model.get_weights(), candidate.guarantees))
        rng = np.random.default_rng(len(SEEN))
        for weight in candidate.model.weights:
            weight.assign(weight + rng.normal(size=weight.shape).astype(np.float32))
        for guarantee in candidate.guarantees:
            for name in guarantee.weights():
                layer, _, attribute = name.rpartition("/")
                variable = getattr(candidate.model.get_layer(layer), attribute)
                variable.assign(guarantee.project(name, variable))
        return candidate


SEEN: list = []


def test_rewinding_gives_back_every_value_that_is_left(model, data):
    SEEN.clear()
    recorder = Recorder("prune", data, model, Recovery(epochs=8), 1)
    result = Prune(sparsity=0.875, rounds=3, rewind=True).apply(Candidate(model), recorder)
    given = model.get_weights()
    assert [epochs for epochs, _, _ in SEEN] == [2, 2, 2, 2]
    shares = [0.0, 0.5, 0.75, 0.875]
    before = None
    for (_, weights, guarantees), share in zip(SEEN, shares, strict=True):
        masks = guarantees[-1].masks
        assert {n: int((~m).sum()) for n, m in masks.items()} == {n: round(share * m.size) for n, m in masks.items()}
        by_shape = {m.shape: m for m in masks.values()}
        for value, first in zip(weights, given, strict=True):
            np.testing.assert_array_equal(value, first * by_shape.get(value.shape, 1.0))
        assert before is None or all(not (m & ~before[n]).any() for n, m in masks.items()), "what is gone stays gone"
        before = masks
    assert result.guarantees[0].check(result.model) == []
    moved = get_weight(result.model, "dense/kernel") - get_weight(model, "dense/kernel")
    assert np.abs(moved[before["dense/kernel"]]).min() > 0, "the last round trains"


def test_rewinding_prunes_by_the_trained_weights(model, data):
    SEEN.clear()
    recorder = Recorder("prune", data, model, TRAINING, 1)
    Prune(sparsity=0.5, rewind=True).apply(Candidate(model), recorder)
    noise = np.random.default_rng(1)
    moved = {w.name: np.asarray(w) + noise.normal(size=w.shape).astype(np.float32) for w in model.weights}
    trained = np.abs(moved[model.get_layer("dense").kernel.name])
    np.testing.assert_array_equal(SEEN[1][2][0].masks["dense/kernel"], keep_highest(trained, trained.size // 2))


def test_rounds_without_rewinding_go_on_from_where_they_are(model, data):
    result = Prune(sparsity=0.6, rounds=3, ramp=0.5).apply(Candidate(model), context(model, data))
    counts = {k.name: (int((k.value == 0).sum()), round(0.6 * k.size)) for k in kernels(result.model)}
    assert all(found == wanted for found, wanted in counts.values())


@pytest.mark.parametrize(
    "fields",
    [{"criterion": c} for c in ("magnitude", "movement", "snip")] + [{"regrow": 0.3}, {"rounds": 2, "rewind": True}],
    ids=str,
)
def test_two_of_four_is_met_however_it_comes_about(fields, model, data):
    result = Prune(pattern="2:4", **fields).apply(Candidate(model), context(model, data))
    masks = result.guarantees[0].masks
    assert set(masks) == {"conv/kernel", "dense/kernel"}
    for mask in masks.values():
        groups = mask.reshape(*mask.shape[:-2], -1, 4, mask.shape[-1])
        assert (groups.sum(-2) == 2).all()
    assert [(s.layer, "reads one channel" in s.reason) for s in result.skipped] == [("depthwise", True)]
    assert result.guarantees[0].check(result.model) == []


@pytest.mark.parametrize("fields", [{}, {"criterion": "movement"}, {"regrow": 0.3}, {"ranking": "global"}], ids=str)
def test_blocks_stay_whole_through_training(fields, model, data):
    result = Prune(sparsity=0.5, block=(4, 1), **fields).apply(Candidate(model), context(model, data))
    masks = result.guarantees[0].masks
    for mask in masks.values():
        blocks = mask.reshape(*mask.shape[:-2], -1, 4, mask.shape[-1])
        np.testing.assert_array_equal(blocks.any(-2), blocks.all(-2))
    assert sum((~m).sum() for m in masks.values()) == pytest.approx(0.5 * sum(m.size for m in masks.values()), abs=4)


def test_no_kernel_that_the_pattern_fits_is_an_error(model, data):
    with pytest.raises(CompressError, match="no multiple of 5"):
        Prune(pattern="2:5").apply(Candidate(model), context(model, data))


@pytest.mark.parametrize("fields", [{"criterion": "movement"}, {"regrow": 0.3}, {"rewind": True}], ids=str)
@pytest.mark.parametrize("recovery", [Recovery(method="none"), Recovery(epochs=0)], ids=["none", "epochs=0"])
def test_what_needs_training_is_refused_without_it(fields, recovery, model, data):
    with pytest.raises(CompressError, match="some training") as caught:
        Prune(**fields).apply(Candidate(model), context(model, data, recovery))
    assert caught.value.where == "strategy.prune.recovery"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"pattern": "2:4", "sparsity": 0.6}, "2:4 is a sparsity of 0.5"),
        ({"pattern": "2:4", "macs": 0.5}, "2:4 is a sparsity of 0.5"),
        ({"pattern": "2:4", "block": [4, 1]}, "not both"),
        ({"pattern": "4:2"}, "N:M"),
        ({"pattern": "half"}, "N:M"),
        ({"block": [0, 1]}, "greater than or equal to 1"),
        ({"criterion": "second_order", "ranking": "global", "regrow": 0.3}, "without regrow, ranking"),
        ({"criterion": "movement", "rewind": True}, "without rewind"),
        ({"regrow": 0.3, "rounds": 2}, "without rounds"),
        ({"regrow": 1.0}, "less than 1"),
    ],
    ids=str,
)
def test_fields_that_do_not_go_together_are_refused(fields, says):
    with pytest.raises(ValidationError, match=says):
        Prune(**fields)


def test_the_command_line_spells_pattern_and_block():
    stage = make_plan(compose_config(["strategy=prune", "strategy.prune.pattern=2:4"])).stages[0].strategy
    assert stage.pattern == "2:4"
    stage = make_plan(compose_config(["strategy=prune", "strategy.prune.block=[4,1]"])).stages[0].strategy
    assert stage.block == (4, 1)
    with pytest.raises(CompressError, match=r"a sparsity of 0\.5") as caught:
        make_plan(compose_config(["strategy=prune", "strategy.prune.pattern=2:4", "strategy.prune.sparsity=0.9"]))
    assert caught.value.where == "strategy.prune"
