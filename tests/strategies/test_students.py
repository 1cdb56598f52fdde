"""Students: which network learns, what it starts from, what it does to a pipeline; omitted classes; who teaches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.candidate import Candidate, Effect, Storage
from compress.data.source import Data, Split, make_data
from compress.errors import CompressError
from compress.graph.rewrite import copy_model
from compress.graph.scaling import narrower, with_fresh_weights
from compress.graph.selection import Rule, Selection
from compress.pipeline.refusals import refuse_clashes
from compress.pipeline.stage import Stage
from compress.strategies.distillation.distill import Distill, _offset
from compress.strategies.distillation.judging import accuracy_of, probabilities
from compress.strategies.pruning.prune import Prune
from compress.strategies.pruning.zeros import Zeros
from compress.strategies.strategy import Context
from compress.training import History, Recovery

layers = tf_keras.layers
COUNT = 96


@pytest.fixture(scope="module")
def data() -> Data:
    """Four classes: where in the image the bright square is."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 60, (2 * COUNT, 8, 8, 1)).astype(np.uint8)
    y = np.arange(2 * COUNT) % 4
    for place, label in enumerate(y):
        x[place, 4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 150
    return make_data("squares", Split(x[:COUNT], y[:COUNT]), Split(x[COUNT:], y[COUNT:]), validation_fraction=0.25)


def network(seed: int = 0, classes: int = 4) -> tf_keras.Model:
    tf_keras.utils.set_random_seed(seed)
    image = tf_keras.Input((8, 8, 1), name="image")
    x = layers.Rescaling(1 / 255, name="rescale")(image)
    for index in range(3):
        x = layers.Conv2D(8, 3, padding="same", name=f"conv{index}")(x)
        x = layers.ReLU(name=f"relu{index}")(layers.BatchNormalization(name=f"norm{index}")(x))
    x = layers.Flatten(name="flatten")(layers.MaxPooling2D(4, name="pool")(x))
    return copy_model(tf_keras.Model(image, layers.Dense(classes, name="scores")(x), name="net"))


@pytest.fixture(scope="module")
def reference(data) -> tf_keras.Model:
    model = network()
    context = Context("train", data, model, Recovery("finetune", epochs=12, batch_size=24, learning_rate=0.05), 0)
    context.recover(Candidate(model))
    assert accuracy_of([model], data.test) > 95
    return model


@pytest.fixture
def context(data, reference) -> Context:
    recovery = Recovery("distill", epochs=0.5, batch_size=24)
    return Context("distill", data, reference, recovery, 3, untrained_model=lambda name, seed: network(seed))


def weights(model: tf_keras.Model) -> list[np.ndarray]:
    return [np.asarray(weight) for weight in model.weights]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_model_itself_learns_by_default(context, reference):
    made = Distill().student_of(Candidate(reference), context).model
    assert made is not reference
    assert same(weights(made), weights(reference))
    assert Distill().effects == {Effect.TRAIN}


def test_a_named_network_is_built_by_the_seed(context, reference):
    made = Distill(student="net").student_of(Candidate(reference, storage=Storage("int8")), context)
    assert same(weights(made.model), weights(network(context.seed)))
    assert made.storage == Storage(), "how the old network was written says nothing of the new one"


def test_again_is_the_same_network_with_other_weights(context, reference):
    made = Distill(student="again").student_of(Candidate(reference), context).model
    assert [w.shape for w in made.weights] == [w.shape for w in reference.weights]
    assert same(weights(made), weights(with_fresh_weights(reference, context.seed)))
    kernel, before = (model.get_layer("conv1").kernel for model in (made, reference))
    assert abs(np.corrcoef(np.ravel(kernel), np.ravel(before))[0, 1]) < 0.3


def test_a_narrow_copy_starts_at_random_or_with_what_was_kept(context, reference):
    kept = Distill(width=0.5, start="teacher").student_of(Candidate(reference), context)
    drawn = Distill(width=0.5).student_of(Candidate(reference), context)
    assert same(weights(kept.model), weights(narrower(reference, 0.5).model))
    assert [w.shape for w in kept.model.weights] == [w.shape for w in drawn.model.weights]
    assert not same(weights(kept.model), weights(drawn.model))
    assert kept.model.get_layer("conv1").kernel.shape == (3, 3, 4, 4)
    assert [item.layer for item in kept.skipped] == ["scores"]


def test_both_at_once_and_by_rule(context, reference):
    both = Distill(width=0.5, depth=0.5).student_of(Candidate(reference), context).model
    gone = {layer.name for layer in reference.layers} - {layer.name for layer in both.layers}
    assert gone == {"conv1", "norm1", "relu1"}
    assert both.get_layer("conv2").filters == 4
    by_rule = context.for_stage("distill", selection=Selection(only=(Rule(name="conv1"),)))
    one = Distill(width=0.25).student_of(Candidate(reference), by_rule).model
    assert [one.get_layer(f"conv{index}").filters for index in range(3)] == [8, 2, 8]


@pytest.mark.parametrize(
    "fields",
    [
        {"student": "resnet20", "width": 0.5},
        {"student": "again", "depth": 0.5},
        {"start": "teacher"},
        {"student": "again", "start": "teacher"},
        {"raise_bias": True},
        {"width": 1.0},
        {"depth": 0.0},
        {"temperature": 0.0},
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(reversed(fields)))):
        Distill(**fields)


def test_what_changes_nothing_is_refused(context, reference):
    by_rule = context.for_stage("distill", selection=Selection(only=(Rule(name="scores"),)))
    for fields, key in (({"width": 0.5}, "width"), ({"depth": 0.99}, "depth")):
        with pytest.raises(CompressError) as caught:
            Distill(**fields).student_of(Candidate(reference), by_rule if key == "width" else context)
        assert caught.value.where == f"strategy.distill.{key}"
    with pytest.raises(CompressError, match="only, skip"):
        Distill(student="net").student_of(Candidate(reference), by_rule)


def test_a_network_of_other_classes_is_refused_with_both(context, reference):
    other = dataclasses.replace(context, untrained_model=lambda name, seed: network(seed, classes=7))
    with pytest.raises(CompressError) as caught:
        Distill(student="seven").student_of(Candidate(reference), other)
    assert "net: (8, 8, 1) to (4), 4 classes" in caught.value.expected
    assert "seven: (8, 8, 1) to (7), 7 classes" in caught.value.received


def test_another_network_keeps_no_guarantee(reference, context):
    zeros = Zeros("prune", {"conv1/kernel": np.ones((3, 3, 8, 8), bool)})
    for student in (Distill(width=0.5), Distill(student="again")):
        stages = [Stage("prune", Prune()), Stage("distill", student)]
        with pytest.raises(CompressError) as caught:
            refuse_clashes(stages, reference)
        assert "stage distill after stage prune" in str(caught.value)
        assert "another network" in caught.value.received
        # The other way round, and with what is given up, it goes.
        refuse_clashes(list(reversed(stages)), reference)
        refuse_clashes([stages[0], dataclasses.replace(stages[1], release=("prune",))], reference)
        with pytest.raises(CompressError, match="prune"):
            student.student_of(Candidate(reference, guarantees=(zeros,)), context)
    refuse_clashes([Stage("prune", Prune()), Stage("distill", Distill())], reference)


def test_a_student_learns_from_its_teacher(data, reference):
    recovery = Recovery("distill", epochs=15, batch_size=24, learning_rate=0.05)
    context = Context("distill", data, reference, recovery, 3)
    made = Distill(width=0.5).apply(Candidate(reference), context).model
    assert accuracy_of([made], data.test) > 90


def test_previous_is_the_generation_before(data, reference, monkeypatch):
    recovery = Recovery("distill", epochs=0.3, batch_size=24, teachers=("previous",))
    teachers, made = [], []
    original = Distill.apply

    def watched(self, candidate, context):
        teachers.extend(context.teacher_models())
        made.append(original(self, candidate, context))
        return made[-1]

    monkeypatch.setattr(Distill, "apply", watched)
    stage = Stage("distill", Distill(student="again"), recovery=recovery, repeat=3)
    result = stage.apply(Candidate(reference), Context("", data, reference, Recovery(), 0))
    assert teachers == [reference, made[0].model, made[1].model]
    assert result.model is made[2].model
    assert not same(weights(made[0].model), weights(made[1].model)), "each generation is drawn anew"
    assert result.recovered.teachers == ("previous",)
    assert result.recovered.teacher_accuracy == pytest.approx(accuracy_of([made[1].model], data.validation))


def test_a_chain_of_assistants_narrows_step_by_step(data, reference):
    recovery = Recovery("distill", epochs=0.3, batch_size=24, teachers=("previous",))
    context, candidate, widths = Context("", data, reference, Recovery(), 0), Candidate(reference), []
    for name in ("distill", "distill2"):
        candidate = Stage(name, Distill(width=0.5), recovery=recovery).apply(candidate, context)
        widths.append(candidate.model.get_layer("conv1").filters)
    assert widths == [4, 2]
    assert candidate.lineage == ("distill", "distill2")


def test_omitted_classes_are_never_shown(data, reference, monkeypatch):
    import compress.strategies.strategy as strategy

    shown = []

    def watched(model, source, *arguments, **settings):
        shown.append(source)
        return History(0, 0, 0.0, 0.0)

    monkeypatch.setattr(strategy, "train", watched)
    recovery = Recovery("distill", epochs=1, batch_size=24)
    Distill(omit=(1, 2)).apply(Candidate(reference), Context("distill", data, reference, recovery, 0))
    assert set(shown[0].train.y) == {0, 3}


def test_biases_of_omitted_classes_are_raised_to_the_teachers_share(data, reference):
    recovery = Recovery("distill", epochs=6, batch_size=24, learning_rate=0.05)
    context = Context("distill", data, reference, recovery, 0)
    plain = Distill(omit=(3,)).apply(Candidate(reference), context)
    raised = Distill(omit=(3,), raise_bias=True).apply(Candidate(reference), context)
    wanted = probabilities([reference], data.validation.x)[:, 3].mean()
    assert probabilities([raised.model], data.validation.x)[:, 3].mean() == pytest.approx(wanted, abs=1e-3)
    before, after = (candidate.model.get_layer("scores").bias.numpy() for candidate in (plain, raised))
    change = after - before
    assert change[3] == pytest.approx(raised.measured["bias_raised"], abs=1e-4)
    np.testing.assert_allclose(change[:3], 0, atol=1e-5)


def test_classes_that_are_not_there_are_refused(context, reference):
    for omit in ((4,), (0, 1, 2, 3)):
        with pytest.raises(CompressError) as caught:
            Distill(omit=omit).apply(Candidate(reference), context)
        assert caught.value.where == "strategy.distill.omit"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.001, 0.999), min_size=1, max_size=20), st.floats(0.01, 0.99))
def test_the_offset_reaches_the_share_that_is_wanted(given_shares, wanted):
    shares = np.array(given_shares)
    raised = _offset(shares, wanted)
    odds = shares / (1 - shares) * np.exp(raised)
    assert (odds / (1 + odds)).mean() == pytest.approx(wanted, abs=1e-6)


def test_a_student_whose_biases_cannot_be_raised_is_refused_before_it_trains(data, reference, context, monkeypatch):
    image = tf_keras.Input((8, 8, 1))
    scores = layers.Dense(4, use_bias=False, name="unbiased")(layers.Flatten()(image))
    student = tf_keras.Model(image, scores, name="bare")
    monkeypatch.setattr("compress.strategies.strategy.train", lambda *given, **others: pytest.fail("it trains"))
    without = dataclasses.replace(context, untrained_model=lambda name, seed: student)
    with pytest.raises(CompressError, match="unbiased") as caught:
        Distill(student="bare", omit=(1,), raise_bias=True).apply(Candidate(reference), without)
    assert caught.value.where == "strategy.distill.raise_bias"
