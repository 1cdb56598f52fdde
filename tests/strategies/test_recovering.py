"""What auto stands for, what the report says of teachers, and which teachers are refused."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import time
from typing import Any

import numpy as np
import pytest
import tf_keras

from compress.candidate import Candidate, Recovered
from compress.data.digits import Digits
from compress.data.source import Data, Split, Unlabelled, make_data
from compress.errors import CompressError
from compress.models.file import FileModel
from compress.models.mlp import Mlp
from compress.models.small import Lenet5
from compress.networks import Networks
from compress.pipeline.refusals import refuse_unfit, refuse_without_labels
from compress.pipeline.stage import Stage
from compress.strategies.distillation.automatic import choose
from compress.strategies.distillation.distill import Distill
from compress.strategies.distillation.finetune import Finetune
from compress.strategies.distillation.judging import accuracy_of, probabilities, require_same_values
from compress.strategies.distillation.mutual import Mutual
from compress.strategies.pruning.prune import Prune
from compress.strategies.quantization.aware import QuantizeAware
from compress.strategies.quantization.post_training import Quantize
from compress.strategies.strategy import Context
from compress.training import History, Recovery

layers = tf_keras.layers
COUNT, CLASSES = 200, 4
AUTO = Recovery("auto", epochs=1, batch_size=32)


def samples(count: int, seed: int) -> Split:
    """Which of four pixels is bright."""
    rng = np.random.default_rng(seed)
    y = np.arange(count) % CLASSES
    x = rng.integers(0, 100, (count, CLASSES)).astype(np.uint8)
    x[np.arange(count), y] += 100
    return Split(x, y)


@pytest.fixture(scope="module")
def data() -> Data:
    return make_data("pixels", samples(COUNT, 0), samples(100, 1), validation=samples(100, 2))


def classifier(wrong: float = 0.0, *, scale: float = 1 / 255, offset: float = 0.0, name: str = "net", softmax=False):
    """Right about all images; with ``wrong`` it exchanges classes 0 and 1."""
    values = tf_keras.Input((CLASSES,), name="pixels")
    x = layers.Rescaling(scale, offset, name="rescale")(values) if scale != 1 or offset else values
    activation = "softmax" if softmax else None
    model = tf_keras.Model(values, layers.Dense(CLASSES, activation=activation, name="scores")(x), name=name)
    kernel = 20 * np.eye(CLASSES, dtype=np.float32)
    if wrong:
        kernel[:2] = kernel[[1, 0]]
    model.get_layer("scores").set_weights([kernel, np.zeros(CLASSES, np.float32)])
    return model


def test_the_mean_of_probabilities_judges_several_teachers(data):
    good, bad = classifier(softmax=True), classifier(wrong=1)
    assert accuracy_of([good], data.validation) == 100
    assert accuracy_of([bad], data.validation) == 50
    both = probabilities([good, bad], data.validation.x)
    apart = [probabilities([model], data.validation.x) for model in (good, bad)]
    np.testing.assert_allclose(both, np.mean(apart, axis=0))
    np.testing.assert_allclose(both.sum(1), 1, rtol=1e-5)


def test_auto_picks_by_what_the_data_offer(data):
    good, bad = classifier(), classifier(wrong=1)
    bare = make_data("bare", Unlabelled(data.train.x), data.test, validation=Unlabelled(data.validation.x))
    more = dataclasses.replace(data, unlabelled=data.train.x[:50])
    few = dataclasses.replace(data, train=data.train.take(39))
    enough = dataclasses.replace(data, train=data.train.take(40))
    cases = [
        (data, good, good, "distill", "as good (100.00 % against 100.00 % of 100 validation images)"),
        (data, good, bad, "distill", "100.00 % against 50.00 %"),
        (data, bad, good, "finetune", "worse than the model received (50.00 % against 100.00 %"),
        (more, good, good, "distill", "50 images without labels"),
        (more, bad, good, "distill", "though the teacher is worse"),
        (bare, bad, good, "distill", "without labels"),
        (few, good, good, "none", "39 training images are fewer than 10 for each of 4 classes"),
        (enough, good, good, "distill", "as good"),
        (dataclasses.replace(few, unlabelled=data.train.x[:1]), good, good, "distill", "as good"),
    ]
    for source, teacher, student, method, why in cases:
        recovery, reason = choose(AUTO, source, [teacher], student)
        assert (recovery.method, reason.partition(",")[0].partition(":")[0]) == (method, method), reason
        assert why in reason
        assert dataclasses.replace(recovery, method="auto") == AUTO, "all else is kept"
    assert choose(Recovery("auto", epochs=0), data, [good], good)[0].method == "none"


def test_the_stage_says_what_auto_has_chosen(data):
    good, bad = classifier(), classifier(wrong=1)
    context = Context("", data, good, Recovery(), 0, other_model=lambda name: bad)
    stage = Stage("prune", Prune(sparsity=0.1), recovery=dataclasses.replace(AUTO, teachers=("bad",)))
    found = stage.apply(Candidate(good), context).recovered
    assert found.method == "finetune"
    assert "worse" in found.why
    few = dataclasses.replace(context, data=dataclasses.replace(data, train=data.train.take(20)))
    found = Stage("prune", Prune(sparsity=0.1), recovery=AUTO).apply(Candidate(good), few).recovered
    assert (found.method, found.teachers) == ("none", ())
    assert Stage("prune", Prune(sparsity=0.1), recovery=Recovery("none")).apply(Candidate(good), few).recovered is None


def test_a_teacher_worse_than_the_model_received_is_warned_of(data):
    good, bad = classifier(), classifier(wrong=1)
    context = Context("", data, good, Recovery(), 0, other_model=lambda name: bad)
    recovery = Recovery("distill", epochs=0.2, batch_size=32, learning_rate=1e-4)
    taught = dataclasses.replace(recovery, teachers=("bad",))
    found = Stage("distill", Distill(), recovery=taught).apply(Candidate(good), context).recovered
    assert (found.teacher_accuracy, found.received_accuracy, found.images) == (50, 100, 100)
    assert "(bad)" in found.warning
    assert "worse than the model that the stage received: 50.00 against 100.00 %" in found.warning
    # A stage of its own would distil whatever recovery says.
    assert "strategy=finetune in its place" in found.warning
    assert "validation images" in found.warning
    found = Stage("distill", Distill(), recovery=recovery).apply(Candidate(good), context).recovered
    assert found.teachers == ("reference",)
    assert found.warning is None


def slow(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let a function take half a second longer."""
    module, _, attribute = name.rpartition(".")
    function = getattr(importlib.import_module(module), attribute)

    def slower(*args: Any, **named: Any) -> Any:
        time.sleep(0.5)
        return function(*args, **named)

    monkeypatch.setattr(name, slower)


@pytest.mark.parametrize("method", ["finetune", "distill"])
def test_the_seconds_of_all_trainings_of_a_stage_are_told(data, method, monkeypatch):
    """Each of the two trainings takes half a second longer; so do the guarantees, which are no training."""
    good = classifier()
    slow(monkeypatch, "compress.strategies.strategy.train")
    slow(monkeypatch, "compress.pipeline.stage.require_kept")
    stage = Stage("prune", Prune(sparsity=0.1), recovery=Recovery(method, epochs=2, batch_size=32), repeat=2)
    started = time.perf_counter()
    found = stage.apply(Candidate(good), Context("", data, good, Recovery(), 0)).recovered
    whole = time.perf_counter() - started
    assert 1 < found.seconds < whole - 0.5
    assert Recovered.from_json(json.loads(json.dumps(dataclasses.asdict(found)))) == found


def test_a_student_that_has_clearly_outgrown_its_teacher_is_told_of(data):
    bad = classifier(wrong=1)
    context = Context("", data, bad, Recovery(), 0)
    labels = Recovery("distill", epochs=60, batch_size=32, learning_rate=0.5, label_weight=1.0)
    stage = Stage("distill", Distill(student="again", soft_weight=0.01), recovery=labels)
    found = stage.apply(Candidate(bad), context).recovered
    assert found.received_accuracy == found.teacher_accuracy == 50
    assert found.student_accuracy > 90
    assert f"worse than its student: 50.00 against {found.student_accuracy:.2f} %" in found.warning


def test_labels_are_asked_for_before_anything_runs(data):
    bare = make_data("bare", Unlabelled(data.train.x), data.test, validation=Unlabelled(data.validation.x))
    for strategy, method, refused in (
        (Prune(), "finetune", True),
        (Prune(), "distill", False),
        (Prune(), "auto", False),
        (Prune(), "none", False),
        (Finetune(), "distill", True),
        (Distill(), "finetune", False),
    ):
        stages = [Stage("stage", strategy, recovery=Recovery(method, epochs=1))]
        if refused:
            with pytest.raises(CompressError) as caught:
                refuse_without_labels(stages, bare)
            assert "bare without y_train" in caught.value.received
        else:
            refuse_without_labels(stages, bare)
        refuse_without_labels(stages, data)


def test_distillation_does_without_labels(data):
    bare = make_data("bare", Unlabelled(data.train.x), data.test, validation=Unlabelled(data.validation.x))
    good = classifier()
    recovery = Recovery("distill", epochs=60, batch_size=32, learning_rate=0.5)
    stage = Stage("distill", Distill(student="again"), recovery=recovery)
    made = stage.apply(Candidate(good), Context("", bare, good, Recovery(), 0))
    assert accuracy_of([made.model], data.test) > 90
    assert made.recovered.teachers == ("reference",)
    assert made.recovered.teacher_accuracy is None, "no labels to judge by"


def saturated(name: str) -> tf_keras.Model:
    """Learned from values from 0 to 1: of larger ones, all are alike to it."""
    values = tf_keras.Input((CLASSES,), name="pixels")
    scores = layers.Dense(CLASSES, name="scores")(layers.ReLU(max_value=1.0)(values))
    model = tf_keras.Model(values, scores, name=name)
    model.get_layer("scores").set_weights([20 * np.eye(CLASSES, dtype=np.float32), np.zeros(CLASSES, np.float32)])
    return model


def test_models_that_read_different_values_are_refused_with_both(data):
    raw, unit = classifier(name="raw"), saturated("unit")
    for teacher, reference in ((unit, raw), (raw, unit)):
        with pytest.raises(CompressError) as caught:
            require_same_values(teacher, "the teacher", reference, data, "here")
        said = {"raw": "the values as they are (100.0 %)", "unit": "values from 0 to 1 (100.0 %, and 25.0 % of"}
        assert f"{reference.name} reads: {said[reference.name]}" in caught.value.expected
        assert f"the teacher, which reads {said[teacher.name]}" in caught.value.received
        assert "Rescaling" in caught.value.fix
    # A bad teacher is not one that reads other values; two that read alike are each other's.
    require_same_values(classifier(wrong=1), "bad", raw, data, "here")
    require_same_values(saturated("other"), "other", unit, data, "here")
    bare = make_data("bare", data.train, data.test, validation=data.validation)
    bare = dataclasses.replace(bare, validation=Unlabelled(data.validation.x))
    require_same_values(unit, "unit", raw, bare, "here")


def test_values_from_0_to_1_need_no_scaling(data):
    """Data that are scaled already: what reads them as they are reads values from 0 to 1."""
    parts = {}
    for name in ("train", "validation", "test"):
        part = getattr(data, name)
        parts[name] = part.shown(part.x / np.float32(255))
    scaled = dataclasses.replace(data, pixels=(0.0, 1.0), **parts)
    require_same_values(saturated("one"), "one", classifier(scale=1.0, name="other"), scaled, "here")
    values = tf_keras.Input((CLASSES,))
    x = layers.ReLU(max_value=1.0)(layers.Rescaling(1 / 20, -100 / 20)(values))
    large = tf_keras.Model(values, layers.Dense(CLASSES, kernel_initializer="identity")(x))
    with pytest.raises(CompressError, match="values from 0 to 255"):
        require_same_values(large, "large", saturated("one"), scaled, "here")


def test_a_file_that_reads_other_values_is_refused_before_anything_is_trained(data, tmp_path):
    path = tmp_path / "unit.keras"
    saturated("unit").save(path)
    networks = Networks(
        teachers={"unit.keras": FileModel(path=str(path))}, keys={"unit.keras": "strategy.distill.recovery.teachers"}
    )
    with pytest.raises(CompressError) as caught:
        networks.refuse_misfits(classifier(name="raw"), data, 0, lambda name: f"strategy.distill.student, {name}")
    assert caught.value.where == "strategy.distill.recovery.teachers, unit.keras"
    assert "raw reads" in caught.value.expected


def test_networks_build_students_by_the_seed_and_name_misfits(data):
    digits = Digits(train_limit=40, test_limit=10).load()
    reference = Mlp(hidden=(4,), weights="random").build(digits, 0)
    sources = Networks(students={"mlp": Mlp(hidden=(3,), weights="random"), "lenet5": Lenet5(weights="random")})
    one, same, other = (sources.student("mlp", reference, digits, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.get_layer("fc1").kernel, same.get_layer("fc1").kernel)
    assert not np.array_equal(one.get_layer("fc1").kernel, other.get_layer("fc1").kernel)
    with pytest.raises(CompressError) as caught:
        sources.refuse_misfits(reference, digits, 0, lambda name: f"strategy.distill.student, {name}")
    assert "strategy.distill.student, lenet5" in caught.value.where
    assert "(8, 8, 1)" in caught.value.received


def trained_with(stage: Stage, source: Data, monkeypatch) -> Recovery:
    """Return the recovery that the stage trains by."""
    found = []

    def watched(model: tf_keras.Model, data: Data, recovery: Recovery, **others: Any) -> History:
        found.append(recovery)
        return History(0, 0, 0.0, 0.0)

    monkeypatch.setattr("compress.strategies.strategy.train", watched)
    stage.apply(Candidate(classifier()), Context("", source, classifier(), Recovery(), 0))
    (recovery,) = found
    return recovery


def test_a_distillation_obeys_its_recovery_but_for_what_it_says_itself(data, monkeypatch):
    asked = Recovery("distill", temperature=20.0, soft_weight=0.3)
    for strategy, wanted in (
        (Distill(), (20.0, 0.3)),
        (Distill(temperature=2.0), (2.0, 0.3)),
        (Distill(soft_weight=0.0), (20.0, 0.0)),
    ):
        asked_for_something = dataclasses.replace(asked, losses={"decoupled": 1.0})
        found = trained_with(Stage("distill", strategy, recovery=asked_for_something), data, monkeypatch)
        assert (found.method, found.temperature, found.soft_weight) == ("distill", *wanted)


@pytest.mark.parametrize("method", ["finetune", "distill", "auto"])
def test_plain_training_has_no_teacher(method, data, monkeypatch):
    stage = Stage("finetune", Finetune(), recovery=Recovery(method, epochs=1))
    assert trained_with(stage, data, monkeypatch).method == "finetune"
    assert stage.apply(Candidate(classifier()), Context("", data, classifier(), Recovery(), 0)).recovered.teachers == ()


@pytest.mark.parametrize(
    ("strategy", "method"),
    [(Finetune(), "distill"), (Mutual(), "distill"), (Prune(), "finetune")],
    ids=["finetune", "mutual", "prune"],
)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 9.0),
        ("soft_weight", 0.5),
        ("label_weight", 0.0),
        ("losses", {"hints": 1.0}),
        ("pairs", {"a": "b"}),
        ("teachers", ("previous",)),
    ],
)
def test_settings_of_teachers_are_refused_where_nobody_obeys_them(strategy, method, name, value, data):
    recovery = Recovery(method, **{name: value})
    stage = Stage("stage", strategy, recovery=recovery)
    with pytest.raises(CompressError) as caught:
        refuse_unfit([stage], data)
    assert caught.value.where == f"strategy.stage.recovery.{name}"
    read = {"hints": 1.0} if name == "pairs" else recovery.losses
    other = Stage("prune", Prune(), recovery=dataclasses.replace(recovery, method="distill", losses=read))
    without = dataclasses.replace(recovery, method="none")
    refuse_unfit([stage, other], data)
    with pytest.raises(CompressError):
        refuse_unfit([stage, dataclasses.replace(other, recovery=Recovery("distill"))], data)
    for idle in (Stage("quantize", Quantize(), recovery=recovery), Stage("prune", Prune(), recovery=without)):
        with pytest.raises(CompressError, match="does not train"):
            refuse_unfit([idle], data)
        refuse_unfit([idle, other], data)


@pytest.mark.parametrize("strategy", [Distill(), Finetune(), Mutual(), QuantizeAware()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("recovery", [Recovery("none"), Recovery("distill", epochs=0)], ids=["none", "no epoch"])
def test_a_stage_that_only_trains_is_refused_without_training_by_advice_that_works(strategy, recovery, data):
    with pytest.raises(CompressError, match="some training") as caught:
        refuse_unfit([Stage("stage", strategy, recovery=recovery)], data)
    (method,) = re.findall(r"recovery\.method=(\w+)", caught.value.fix)
    assert method == (strategy.own_method or "finetune")
    refuse_unfit([Stage("stage", strategy, recovery=Recovery(method, epochs=1))], data)


@pytest.mark.parametrize("losses", [None, {"decoupled": 1.0}])
def test_pairs_that_no_loss_compares_are_refused(losses, data):
    unread = Recovery("distill", losses=losses, pairs={"a": "b"})
    stage = Stage("distill", Distill(), recovery=unread)
    with pytest.raises(CompressError, match=r"strategy\.distill\.recovery\.pairs.*leave the pairs out"):
        refuse_unfit([stage], data)
    # What is written for all stages may be meant for another one.
    reads = Stage("prune", Prune(), recovery=dataclasses.replace(unread, losses={"hints": 1.0}))
    refuse_unfit([stage, reads], data)


def test_omitted_classes_need_labels_and_must_be_there(data):
    bare = make_data("bare", Unlabelled(data.train.x), data.test, validation=Unlabelled(data.validation.x))
    more = dataclasses.replace(data, unlabelled=data.train.x[:50])
    for source, omit, said in (
        (data, (12,), "classes from 0 to 3"),
        (data, (0, 1, 2, 3), "leave one"),
        (bare, (1,), "200 of whose images have none"),
        (more, (1,), "50 of whose images have none"),
    ):
        with pytest.raises(CompressError, match=said) as caught:
            refuse_unfit([Stage("distill", Distill(omit=omit))], source)
        assert caught.value.where == "strategy.distill.omit"
    refuse_unfit([Stage("distill", Distill(omit=(1,)))], data)
    refuse_unfit([Stage("distill", Distill())], more)
    with pytest.raises(CompressError, match="mixed"):
        refuse_unfit([Stage("mutual", Mutual(), recovery=Recovery(mixup=0.5))], data)


def test_a_class_that_is_named_twice_is_omitted_once(data):
    weights = []
    for omit in ((1,), (1, 1)):
        stage = Stage("distill", Distill(omit=omit, raise_bias=True), recovery=Recovery("distill", epochs=0.5))
        weights.append(stage.apply(Candidate(classifier()), Context("", data, classifier(), Recovery(), 0)).model)
    for one, other in zip(*(model.get_weights() for model in weights), strict=True):
        np.testing.assert_array_equal(one, other)


def test_who_has_no_labels_is_told_what_does_without(data):
    bare = make_data("bare", Unlabelled(data.train.x), data.test, validation=Unlabelled(data.validation.x))
    for strategy, said in (
        (Finetune(), "strategy=distill"),
        (Mutual(), "strategy=distill"),
        (Prune(), "method=distill"),
    ):
        with pytest.raises(CompressError) as caught:
            refuse_without_labels([Stage("stage", strategy, recovery=Recovery("finetune"))], bare)
        assert said in caught.value.fix
        assert ("method" in caught.value.fix) == isinstance(strategy, Prune)


def test_labels_that_are_not_there_have_no_weight(data):
    bare = make_data("bare", Unlabelled(data.train.x), data.test, validation=Unlabelled(data.validation.x))
    recovery = Recovery("distill", label_weight=0.5)
    for strategy in (Distill(), Prune()):
        refuse_without_labels([Stage("stage", strategy, recovery=recovery)], data)
        with pytest.raises(CompressError, match=r"strategy\.stage\.recovery\.label_weight.*label_weight=0\.5"):
            refuse_without_labels([Stage("stage", strategy, recovery=recovery)], bare)
        for harmless in (None, 0.0):
            given = dataclasses.replace(recovery, label_weight=harmless)
            refuse_without_labels([Stage("stage", strategy, recovery=given)], bare)


@pytest.mark.parametrize("student", [None, "again"])
def test_a_model_that_its_peers_make_worse_is_told_of(student, data):
    good = classifier()
    recovery = Recovery("finetune", epochs=3, batch_size=32, learning_rate=0.5)
    stage = Stage("mutual", Mutual(student=student, weight=1e3), recovery=recovery)
    found = stage.apply(Candidate(good), Context("", data, good, Recovery(), 0)).recovered
    assert (found.method, found.teachers) == ("finetune", ())
    if student is not None:
        assert found.warning is None
        return
    assert (found.received_accuracy, found.images) == (100, 100)
    assert found.student_accuracy < 90
    assert f"worse than the one that it received: {found.student_accuracy:.2f} against 100.00 %" in found.warning
    assert "student=again" in found.warning
    gentle = Stage("mutual", Mutual(weight=1e-3), recovery=dataclasses.replace(recovery, learning_rate=1e-4))
    assert gentle.apply(Candidate(good), Context("", data, good, Recovery(), 0)).recovered.warning is None


def test_a_teacher_that_is_good_in_spite_of_other_values_is_refused_too(data):
    """Learned from values less their mean, it is right about three in four of the values as they are."""
    mean, deviation = data.train.x.mean(), data.train.x.std()
    values = tf_keras.Input((CLASSES,), name="pixels")
    # Class 3 has the sum of all values, too: nothing, if their mean is zero.
    scores = layers.Dense(CLASSES, name="scores")(values)
    teacher = tf_keras.Model(values, scores, name="centred")
    kernel = 2 * np.eye(CLASSES, dtype=np.float32)
    kernel[:, 3] += 0.6
    teacher.get_layer("scores").set_weights([kernel, np.zeros(CLASSES)])
    centred = data.validation.shown(((data.validation.x - mean) / deviation).astype(np.float32))
    plain, scaled = accuracy_of([teacher], data.validation), accuracy_of([teacher], centred)
    assert 60 < plain < scaled - 3
    with pytest.raises(CompressError, match="mean") as caught:
        require_same_values(teacher, "the teacher", classifier(name="raw"), data, "here")
    assert f"{scaled:.1f} %, and {plain:.1f} %" in caught.value.received
