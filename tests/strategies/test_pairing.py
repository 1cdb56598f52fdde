"""Which layers of student and teacher are compared: by themselves, by rule, and what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from compress.candidate import Candidate
from compress.data.source import Augmentation, Split, make_data
from compress.errors import CompressError
from compress.graph.residual import residual_blocks, without_blocks
from compress.graph.rewrite import copy_model
from compress.models.resnet import cifar_resnet
from compress.strategies.distillation.loss import LayerLoss
from compress.strategies.distillation.losses import losses
from compress.strategies.distillation.losses.activation_boundary import ActivationBoundary
from compress.strategies.distillation.losses.hints import Hints
from compress.strategies.distillation.losses.relational_distance import RelationalDistance
from compress.strategies.distillation.losses.similarity import Similarity
from compress.strategies.distillation.losses.soft_targets import SoftTargets
from compress.strategies.distillation.pairing import Layers, Pair, pair, stage_pairs
from compress.strategies.distillation.teacher import Teacher, keep_nothing
from compress.strategies.distillation.terms import LayerTerm, LogitsTerm, distillation_terms
from compress.strategies.quantization.fake_quantization import with_fake_quantization
from compress.strategies.strategy import Context
from compress.training import Recovery
from compress.training_step import Batch

layers = tf_keras.layers


def residual(
    inner: int = 6, seed: int = 0, *, width: int = 4, blocks: int = 2, stages: int = 1, dropped: bool = False
) -> tf_keras.Model:
    tf_keras.utils.set_random_seed(seed)
    image = tf_keras.Input((8, 8, 1))
    x = layers.Rescaling(1 / 255)(image)
    for stage in range(stages):
        x = layers.Conv2D(width, 3, strides=2 if stage else 1, padding="same", name=f"stem{stage}")(x)
        for number in range(stage * blocks, (stage + 1) * blocks):
            y = layers.Conv2D(inner, 3, padding="same", use_bias=False, name=f"inner{number}")(x)
            y = layers.ReLU(name=f"relu{number}")(layers.BatchNormalization(name=f"norm{number}")(y))
            x = layers.Add(name=f"sum{number}")([x, layers.Conv2D(width, 3, padding="same", name=f"outer{number}")(y)])
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    x = layers.Dropout(0.1, name="dropped")(x) if dropped else x
    return tf_keras.Model(image, layers.Dense(5, name="logits")(x), name="residual")


def plain(width: int, sizes: tuple[int, ...] = (8, 4)) -> tf_keras.Model:
    image = x = tf_keras.Input((8, 8, 1))
    for number, size in enumerate(sizes, start=1):
        strides = int(x.shape[1]) // size
        x = layers.Conv2D(width if number == 1 else 4, 3, strides=strides, padding="same", name=f"conv{number}")(x)
        x = layers.ReLU(name=f"relu{number}")(x)
    return tf_keras.Model(image, layers.Dense(5, name="logits")(layers.Flatten(name="flat")(x)), name="plain")


def dense(*widths: int) -> tf_keras.Model:
    image = tf_keras.Input((8, 8, 1))
    x = layers.Flatten(name="flat")(image)
    for number, width in enumerate(widths):
        x = layers.ReLU(name=f"active{number}")(layers.Dense(width, name=f"dense{number}")(x))
    return tf_keras.Model(image, layers.Dense(5, name="logits")(x), name="dense")


def data():
    x = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1)).astype(np.uint8)
    part = Split(x, np.arange(64) % 5)
    return make_data("random", part, part, validation=part, augmentation=Augmentation(mirror=True))


def names(found: list[Pair]) -> list[tuple[str, str]]:
    return [(one.student, one.teacher) for one in found]


def stages(teacher: tf_keras.Model, student: tf_keras.Model) -> list[tuple[str, str]]:
    return names(stage_pairs(Teacher(teacher).layers, Layers(student)))


def hint_layers(teacher: tf_keras.Model, student: tf_keras.Model) -> tuple[str, ...]:
    return tuple(one.student for one in Hints().choose(Teacher(teacher).layers, Layers(student)))


def test_hints_compare_sums_of_one_name_and_size_else_the_last_layer_of_each_size():
    assert hint_layers(residual(), residual(inner=3)) == ("sum0", "sum1")
    assert hint_layers(plain(6), plain(6)) == ("relu1", "relu2")
    assert hint_layers(plain(6), plain(3)) == ("relu2",)


def test_hints_of_a_network_that_is_as_deep_but_for_some_blocks_go_by_name_and_of_another_depth_do_not():
    deep = residual(blocks=3)
    flat = without_blocks(deep, tuple(b for b in residual_blocks(deep) if b.add == "sum1"))
    assert hint_layers(deep, flat) == ("sum0", "sum2")
    shallow = residual(blocks=2)
    assert names(Hints().choose(Teacher(deep).layers, Layers(shallow))) == [("sum0", "sum1"), ("sum1", "sum2")]
    assert names(Hints().choose(Teacher(shallow).layers, Layers(deep))) == [("sum1", "sum0"), ("sum2", "sum1")]


def test_stages_are_paired_by_size_and_relative_depth():
    deep, shallow = residual(blocks=4, stages=2), residual(blocks=2, stages=2, width=3)
    assert stages(deep, shallow) == [("sum0", "sum1"), ("sum1", "sum3"), ("sum2", "sum5"), ("sum3", "sum7")]
    assert stages(shallow, deep) == [("sum1", "sum0"), ("sum3", "sum1"), ("sum5", "sum2"), ("sum7", "sum3")]
    assert stages(deep, deep) == [(f"sum{n}", f"sum{n}") for n in range(8)]
    assert stages(residual(blocks=3), residual(blocks=1)) == [("sum0", "sum2")]


def test_a_network_without_blocks_is_paired_by_the_last_layer_of_each_size():
    assert stages(plain(6), plain(3)) == [("relu1", "relu1"), ("relu2", "relu2")]
    assert stages(residual(stages=2), plain(3)) == [("relu1", "sum1"), ("relu2", "sum3")]
    assert stages(plain(6), plain(3, (8, 2))) == [("relu1", "relu1")]


def test_maps_that_are_only_padded_are_no_stage():
    expected = [f"stage{stage}_block{block}_add" for stage in (1, 2, 3) for block in (1, 2, 3)]
    teacher, student = cifar_resnet(20), cifar_resnet(8)
    assert list(sum(Layers(teacher).maps().values(), ())) == expected
    assert stages(teacher, student) == [(f"stage{n}_block1_add", f"stage{n}_block3_add") for n in (1, 2, 3)]


def test_without_a_common_size_the_stages_are_paired_by_depth():
    assert stages(plain(6, (8, 4)), plain(3, (2, 1))) == [("relu1", "relu1"), ("relu2", "relu2")]


def test_networks_without_maps_are_paired_by_their_hidden_layers():
    assert stages(dense(9, 8, 7), dense(6)) == [("active0", "active2")]
    assert stages(dense(9, 8), dense(6, 5)) == [("active0", "active0"), ("active1", "active1")]
    assert stages(plain(6), dense(6)) == []


def test_relations_compare_what_the_classes_are_told_by_and_similarity_the_last_maps():
    teacher, student = Teacher(residual(dropped=True)).layers, Layers(plain(3))
    # Without the features that are dropped at random.
    assert names(RelationalDistance().choose(teacher, student)) == [("flat", "mean")]
    assert names(Similarity().choose(teacher, student)) == [("relu2", "sum1")]
    assert names(Similarity().choose(teacher, Layers(dense(6)))) == [("active0", "mean")]


def test_boundaries_are_those_before_the_activation_beyond_pooling_and_rounding():
    def network(pooled: bool, activation=None) -> tf_keras.Model:
        image = tf_keras.Input((8, 8, 1))
        x = layers.Conv2D(4, 3, padding="same", activation=activation, name="conv1")(image)
        x = x if activation else layers.ReLU(name="relu1")(x)
        x = layers.Conv2D(4, 3, strides=1 if pooled else 2, padding="same", name="conv2")(x)
        x = tf.nn.relu(layers.BatchNormalization(name="norm2")(x))
        x = layers.Dropout(0.5)(layers.MaxPooling2D(name="pool")(x)) if pooled else x
        return tf_keras.Model(image, layers.Dense(5, name="logits")(layers.Flatten()(x)), name="network")

    def chosen(teacher: tf_keras.Model, student: tf_keras.Model) -> list[tuple[str, str]]:
        return names(ActivationBoundary().choose(Layers(teacher), Layers(student)))

    assert chosen(network(True), network(True)) == [("norm2", "norm2")]
    assert chosen(network(False), network(False)) == [("conv1", "conv1"), ("norm2", "norm2")]
    # A layer with its activation within does not show what goes into it.
    assert chosen(network(False), network(False, "relu")) == [("norm2", "norm2")]
    rounding = with_fake_quantization(network(False), {"relu1": (0.0, 1.0), "norm2": (-1.0, 1.0)}, {})
    assert chosen(network(False), rounding) == [("conv1", "conv1"), ("norm2_range", "norm2")]
    assert chosen(residual(), residual()) == [("sum0", "sum0"), ("sum1", "sum1")]


def test_layers_that_have_become_several_are_known_by_their_names():
    def network(factorized: bool) -> tf_keras.Model:
        image = x = tf_keras.Input((8, 8, 1))
        x = layers.Flatten(name="flat")(x)
        for name, units in (("fc1", 9), ("fc2", 8), ("logits", 5)):
            x = layers.Dense(3, use_bias=False, name=f"{name}_reduce")(x) if factorized and name != "fc1" else x
            x = layers.Dense(units, name=name)(x)
        return tf_keras.Model(image, x, name="network")

    whole, factorized = network(False), network(True)
    assert stages(whole, factorized) == [("fc1", "fc1"), ("fc2", "fc2")]
    assert names(RelationalDistance().choose(Layers(whole), Layers(factorized))) == [("fc2", "fc2")]


def terms(teacher: tf_keras.Model, student: tf_keras.Model, **fields):
    recovery = Recovery(method="distill", **fields)
    return distillation_terms(recovery, [Teacher(teacher)], student, seed=0, where="recovery", keep=keep_nothing)


def test_a_rule_says_which_and_a_loss_may_have_its_own():
    rule, own = {"relu2": "sum1"}, {"relu1": "norm0"}
    _, attention, hints = terms(
        residual(), plain(3), pairs=rule, losses={"hints": {"weight": 2, "pairs": own}, "attention": 1000}
    )
    assert names(attention.pairs) == [("relu2", "sum1")]
    # The batch norm has been folded into the convolution before it.
    assert names(hints.pairs) == [("relu1", "inner0")]
    assert hints.pairs[0].student_shape == (8, 8, 3)
    assert [tuple(v.shape) for v in hints.variables] == [(1, 1, 3, 6), (6,)]


@pytest.mark.parametrize(
    ("student", "fields", "said"),
    [
        (plain(3), {"pairs": {"relu3": "sum1"}}, ["recovery.pairs", "relu3", "relu2", "plain"]),
        (plain(3), {"pairs": {"relu2": "summ1"}}, ["recovery.pairs", "summ1", "sum1", "residual"]),
        (plain(3), {"pairs": {"flat": "sum1"}}, ["flat (64,)", "sum1 (8, 8, 4)", "regressor"]),
        # A regressor has no padding: it makes maps smaller.
        (plain(3), {"pairs": {"relu2": "sum1"}}, ["relu2 (4, 4, 4)", "sum1 (8, 8, 4)", "smaller"]),
        (plain(3), {"losses": {"hints": {"pairs": {"flat": "sum1"}}}}, ["losses.hints.pairs", "flat (64,)"]),
        (plain(3), {"losses": {"flow": 1}, "pairs": {"relu1": "sum0"}}, ["relu1 (8, 8, 3)", "sum0 (8, 8, 4)"]),
        (plain(4), {"losses": {"flow": 1}, "pairs": {"relu1": "sum0"}}, ["at least 2 pairs", "relu1: sum0"]),
        (plain(3), {"losses": {"attention": 1}, "pairs": {"flat": "sum1"}}, ["flat (64,)", "feature maps"]),
        (plain(3), {"losses": {"activation_boundary": 1}, "pairs": {"relu2": "sum1"}}, ["relu2 (4, 4, 4)", "size"]),
        (dense(6), {"losses": {"attention": 1}}, ["recovery.losses.attention", "at least 1 pair", "dense"]),
        (dense(6), {}, ["recovery.losses.hints", "at least 1 pair", "dense", "residual"]),
    ],
)
def test_what_cannot_be_compared_is_refused_with_both_layers_and_shapes(student, fields, said):
    with pytest.raises(CompressError) as refused:
        terms(residual(), student, **{"losses": {"hints": 1.0}, **fields})
    for part in said:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("teacher", "shapes"), [((8, 8, 3), "(8, 8, 3) to (5,)"), ((8, 8, 1, 7), "(8, 8, 1) to (7,)")], ids=["in", "out"]
)
def test_a_teacher_that_reads_or_gives_something_else_is_refused_with_both(teacher, shapes):
    image = tf_keras.Input(teacher[:3])
    other = tf_keras.Model(image, layers.Dense((*teacher, 5)[3])(layers.Flatten()(image)), name="other")
    with pytest.raises(CompressError, match=r"recovery\.teachers.*plain.*\(8, 8, 1\) to \(5,\).*other") as refused:
        terms(other, plain(3))
    assert shapes in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"batch_size": 1, "losses": {"similarity": 1.0}}, ["recovery.batch_size", "2 samples", "similarity"]),
        ({"batch_size": 1024, "losses": {"relational_angle": 1.0}}, ["recovery.batch_size", "512 at most"]),
    ],
)
def test_a_batch_that_a_loss_cannot_compare_is_refused(fields, said):
    with pytest.raises(CompressError) as refused:
        terms(residual(), residual(), **fields)
    for part in said:
        assert part in str(refused.value)


def test_a_second_teacher_that_nobody_listens_to_is_refused():
    with pytest.raises(CompressError, match=r"recovery\.teachers.*one teacher.*2 teachers"):
        terms(residual(), residual(), soft_weight=0.0, losses={"hints": 1.0}, teachers=("reference", "resnet44"))


def test_hints_of_a_single_vector_are_relative_to_its_size():
    teacher, student = tf.constant([[3.0, -4.0]]), tf.constant([[3.0, 1.0]])
    np.testing.assert_allclose(Hints().between(student, teacher), 12.5 / 12.5)


def test_nothing_to_learn_is_refused():
    with pytest.raises(CompressError, match=r"recovery\.soft_weight"):
        terms(residual(), plain(3), soft_weight=0.0, losses={"hints": 0.0})


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({"attension": 1.0}, ["losses.attension", "attention"]),
        ({"soft_targets": 1.0}, ["losses.soft_targets", "soft_weight"]),
        ({"decoupled": {"gamma": 1.0}}, ["losses.decoupled.gamma", "alpha"]),
        ({"decoupled": {"alpha": -1.0}}, ["losses.decoupled.alpha", "-1"]),
        ({"hints": {"pairs": 3}}, ["losses.hints.pairs", "3"]),
    ],
)
def test_a_loss_or_setting_that_does_not_exist_is_refused(losses, said):
    with pytest.raises(CompressError) as refused:
        terms(residual(), residual(), losses=losses)
    for part in said:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "weights"),
    [
        ({}, [pytest.approx(0.1)]),
        ({"losses": {"hints": 1, "attention": 1}}, [pytest.approx(0.1), 1, 1]),
        ({"soft_weight": 0.0, "losses": {"hints": 1, "decoupled": 1}}, [1, 1]),
        ({"soft_weight": 0.0, "losses": {"hints": 1}, "label_weight": 0.0}, [0]),
        ({"label_weight": 0.7}, [0.7]),
    ],
)
def test_the_labels_have_what_soft_targets_leave_unless_told_otherwise(fields, weights):
    assert [term.task_weight for term in terms(residual(), residual(), **fields)] == weights


def normed() -> tf_keras.Model:
    """Both sizes of its maps end in a batch norm, whose numbers are drawn."""
    image = tf_keras.Input((8, 8, 1))
    x = layers.Conv2D(4, 3, padding="same", name="conv1")(image)
    x = layers.ReLU(name="relu1")(layers.BatchNormalization(name="norm1")(x))
    x = layers.Conv2D(4, 3, padding="same", name="conv2")(x)
    x = layers.BatchNormalization(name="norm2")(x)
    x = layers.BatchNormalization(name="norm3")(layers.Conv2D(6, 3, padding="same", strides=2, name="conv3")(x))
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    model = tf_keras.Model(image, layers.Dense(5, name="logits")(x), name="normed")
    rng = np.random.default_rng(0)
    for number in (1, 2, 3):
        norm = model.get_layer(f"norm{number}")
        norm.set_weights([rng.uniform(0.5, 3, w.shape) for w in norm.get_weights()])
    return model


RULES = [None, {"norm1": "norm1", "conv2": "conv2"}]


@pytest.mark.parametrize("rule", RULES, ids=["chosen", "rule"])
@pytest.mark.parametrize("name", [name for name, kind in losses().items() if issubclass(kind, LayerLoss)])
def test_a_copy_gives_at_every_layer_what_its_teacher_gives(name, rule):
    teacher = normed()
    student = copy_model(teacher)
    (term,) = terms(teacher, student, soft_weight=0.0, losses={name: 1.0}, pairs=rule)
    x = tf.random.stateless_normal((16, 8, 8, 1), (0, 0))
    outputs = {layer: student.get_layer(layer).output for layer in term.layers}
    features = tf_keras.Model(student.inputs, outputs)(x, training=False)
    batch = Batch(x, tf.zeros(16, tf.int64), tf.zeros((16, 5)), tf.range(16), features)
    given = term._teacher(batch)
    for pair_ in term.pairs:
        np.testing.assert_allclose(features[pair_.student], given[pair_.teacher], rtol=1e-4, atol=1e-4)
    # Contrastive compares with other samples, activation boundary asks for a margin.
    if name not in ("contrastive", "activation_boundary"):
        assert float(term(batch)) == pytest.approx(0, abs=1e-5)


def test_all_terms_share_one_pass_of_the_teacher():
    teacher = Teacher(residual())
    soft = LogitsTerm(SoftTargets(weight=0.9), [teacher], 4.0)
    hints = LayerTerm(Hints(), teacher, [pair(teacher.layers, Layers(residual()), "sum0", "sum0")])
    passes = 0
    look = teacher._look

    def counting(*args, **kwargs):
        nonlocal passes
        passes += 1
        return look(*args, **kwargs)

    teacher._look = counting
    x = tf.random.stateless_normal((3, 8, 8, 1), (0, 0))
    batch = Batch(x, tf.zeros(3, tf.int64), tf.zeros((3, 5)), tf.range(3), {"sum0": tf.zeros((3, 8, 8, 4))})
    soft(batch), hints(batch)
    assert passes == 1


def context(weight: float, reference: tf_keras.Model, **fields) -> Context:
    recovery = Recovery(
        method="distill", epochs=8, learning_rate=0.01, batch_size=16, losses={"hints": weight}, **fields
    )
    return Context(stage="stage", data=data(), reference=reference, recovery=recovery, seed=0)


def test_with_hints_the_inner_layers_come_nearer():
    reference = residual()
    x = data().train.x.astype(np.float32)

    def distance(weight: float) -> float:
        student = copy_model(reference)
        kernel = student.get_layer("outer0").kernel
        kernel.assign(kernel.numpy() + np.random.default_rng(0).normal(0, 0.1, kernel.shape))
        after = context(weight, reference).recover(Candidate(student)).model
        one, other = (tf_keras.Model(m.inputs, m.get_layer("sum0").output)(x) for m in (after, reference))
        return float(tf.reduce_mean((one - other) ** 2))

    assert distance(1.0) < 0.7 * distance(0.0)


def test_the_first_stage_of_fitnets_leaves_what_lies_behind_the_hint_alone():
    reference, student = residual(), residual(seed=1, inner=3)
    fields = {"soft_weight": 0.0, "label_weight": 0.0, "pairs": {"sum0": "sum1"}, "weight_decay": 0.0}
    after = context(1.0, reference, **fields).recover(Candidate(copy_model(student))).model
    for name, trained in (("stem0", True), ("outer0", True), ("outer1", False), ("logits", False)):
        same = np.array_equal(after.get_layer(name).kernel, student.get_layer(name).kernel)
        assert same != trained, name


def test_no_layer_to_compare_is_refused_by_the_stage():
    image = tf_keras.Input((8, 8, 1))
    student = tf_keras.Model(image, layers.Dense(5, name="logits")(layers.Flatten()(image)))
    with pytest.raises(CompressError, match=re.escape("strategy.stage.recovery.losses.hints")):
        context(1.0, residual()).recover(Candidate(student))
