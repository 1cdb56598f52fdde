"""Channel pruning: criteria against NumPy, selection, what an earlier stage established."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from compress.candidate import Candidate
from compress.data.source import Split, make_data
from compress.deploy.tflite import export
from compress.errors import CompressError
from compress.graph.channels.groups import Channels
from compress.graph.rewrite import rewrite
from compress.graph.selection import Rule, Selection
from compress.metrics.counts import count_params
from compress.metrics.tflite_file import TFLiteFile
from compress.strategies.pruning.channels import PruneChannels
from compress.strategies.pruning.prune import Prune
from compress.strategies.pruning.saliency import Evidence, criteria
from compress.strategies.pruning.widths import written_channels
from compress.strategies.pruning.zeros import Zeros
from compress.strategies.strategy import Context
from compress.training import Recovery
from tests.graph.zoo import ZOO
from tests.strategies.channels.networks import macs

layers = tf_keras.layers


def test_a_channel_that_does_nothing_goes_first(model, context):
    dead = rewrite(model)
    kernel, bias = dead.get_layer("inner").get_weights()
    kernel[..., 5], bias[5] = 0, 0
    dead.get_layer("inner").set_weights([kernel, bias])
    outer, outer_bias = dead.get_layer("outer").get_weights()
    outer[:, :, 5] = 0
    dead.get_layer("outer").set_weights([outer, outer_bias])
    for name in ("l1", "l2"):
        score = criteria()[name].score(group(dead, "inner"), Evidence(Channels(dead), context.data, 0))
        assert score.argmin() == 5


def group(model: tf_keras.Model, writer: str):
    return next(g for g in Channels(model).groups if writer in g.writers)


def test_norms_by_numpy(model, context):
    evidence = Evidence(Channels(model), context.data, 0)
    inner = model.get_layer("inner").kernel.numpy()
    outer = model.get_layer("outer").kernel.numpy()
    inner_group = group(model, "inner")
    np.testing.assert_allclose(
        criteria()["l1"].score(inner_group, evidence),
        np.abs(inner).sum((0, 1, 2)) + np.abs(outer).sum((0, 1, 3)),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        criteria()["l1_filter"].score(inner_group, evidence), np.abs(inner).sum((0, 1, 2)), rtol=1e-5
    )
    gamma = np.abs(model.get_layer("norm").gamma.numpy())
    np.testing.assert_allclose(criteria()["gamma"].score(inner_group, evidence), gamma, rtol=1e-6)
    flat = inner.reshape(-1, 24).T
    apart = np.linalg.norm(flat[:, None] - flat, axis=-1).sum(1)
    np.testing.assert_allclose(criteria()["geometric_median"].score(inner_group, evidence), apart, rtol=1e-3)


def test_activations_by_a_model_of_their_own(model, context):
    evidence = Evidence(Channels(model), context.data, 3, images=200)
    look = tf_keras.Model(model.inputs, model.get_layer("outer").input)
    chosen = np.random.default_rng(3).permutation(len(context.data.train))[:200]
    values = look.predict(context.data.train.x[chosen].astype(np.float32), verbose=0)
    mean, zeros = evidence.activations(group(model, "inner"))
    np.testing.assert_allclose(mean, np.abs(values).mean((0, 1, 2)), rtol=1e-3)
    np.testing.assert_allclose(zeros, (values == 0).mean((0, 1, 2)), atol=1e-3)


@pytest.mark.parametrize("name", criteria())
def test_every_criterion_scores_every_unit_and_is_a_function_of_its_seed(name, model, context):
    scores = [
        criteria()[name].score(group(model, "inner"), Evidence(Channels(model), context.data, 0, images=64))
        for _ in range(2)
    ]
    assert scores[0].shape == (24,)
    assert np.isfinite(scores[0]).all()
    assert len(np.unique(scores[0])) > 12
    np.testing.assert_array_equal(*scores)
    result = PruneChannels(criterion=name).apply(Candidate(model), context)
    assert macs(result.model) <= 0.5 * macs(model)


def test_channels_of_steps_that_a_wrapper_calls_have_activations(context):
    steps = tf_keras.Input((5, 4))
    inner = layers.TimeDistributed(layers.Dense(8, activation="relu"), name="inner")(steps)
    outer = layers.TimeDistributed(layers.Dense(6), name="outer")(inner)
    built = rewrite(tf_keras.Model(steps, layers.Dense(3)(layers.GlobalAveragePooling1D()(outer))))
    x = np.random.default_rng(0).normal(size=(40, 5, 4)).astype(np.float32)
    seen = dataclasses.replace(context.data, train=Split(x, np.arange(40) % 2))
    score = criteria()["activation"].score(group(built, "inner"), Evidence(Channels(built), seen, 0))
    values = tf_keras.Model(built.input, built.get_layer("inner").output)(x)
    np.testing.assert_allclose(score, np.abs(values).mean((0, 1)), rtol=1e-4)


def test_a_group_that_a_criterion_says_nothing_of_is_told(model, context):
    result = PruneChannels(macs=0.7, criterion="gamma").apply(Candidate(model), context)
    reasons = {item.layer: item.reason for item in result.skipped}
    assert "finds nothing to look at" in reasons["stem"]
    assert "inner" not in reasons
    with pytest.raises(CompressError, match=r"clamped: inner\)"):
        PruneChannels(macs=0.02, criterion="gamma").apply(Candidate(model), context)


def test_several_outputs_and_inputs_that_the_data_do_not_fit(model, context):
    image, other = tf_keras.Input((8, 8, 1)), tf_keras.Input((3,), name="other")
    inner = layers.GlobalAveragePooling2D()(layers.Conv2D(8, 3, name="conv")(image))
    first, second = layers.Dense(10)(inner), layers.Dense(2, activation="sigmoid")(inner)
    two = rewrite(tf_keras.Model(image, [first, second]))
    result = PruneChannels(macs=0.6, criterion="taylor").apply(Candidate(two), context)
    assert result.model.get_layer("conv").filters < 8
    unfit = rewrite(tf_keras.Model([image, other], layers.Dense(4)(layers.Concatenate()([inner, other]))))
    for criterion in ("l2", "activation"):
        with pytest.raises(CompressError, match="other, which takes"):
            PruneChannels(macs=0.6, criterion=criterion).apply(Candidate(unfit), context)


@pytest.mark.parametrize("criterion", ["l2", "apoz"])
def test_scores_that_are_all_the_same_say_nothing(criterion, deep, context):
    flat = rewrite(deep)
    if criterion == "l2":
        flat.set_weights([np.zeros_like(value) for value in flat.get_weights()])
    else:
        for layer in flat.layers:
            if hasattr(layer, "activation"):
                layer.activation = tf_keras.activations.linear
        flat = rewrite(flat)
    with pytest.raises(CompressError, match="scores are all the same") as error:
        PruneChannels(criterion=criterion).apply(Candidate(flat), context)
    assert ("another one (l2)" in str(error.value)) == (criterion != "l2")


def test_only_cuts_what_is_selected(model, context):
    selection = Selection(only=(Rule(name="inner"),))
    chosen = dataclasses.replace(context, selection=selection)
    result = PruneChannels(channels=0.5).apply(Candidate(model), chosen)
    assert result.model.get_layer("inner").output_shape[-1] == 12
    assert result.model.get_layer("stem").output_shape[-1] == 16
    # A group goes only if all that write it are selected.
    with pytest.raises(CompressError, match="may go"):
        PruneChannels().apply(
            Candidate(model), dataclasses.replace(context, selection=Selection(only=(Rule(name="stem"),)))
        )


def test_zeros_of_an_earlier_stage_are_cut_with_their_channels(model, context):
    pruned = Prune(sparsity=0.5).apply(Candidate(model), context)
    training = dataclasses.replace(context, recovery=Recovery(epochs=1, batch_size=32))
    result = PruneChannels(macs=0.5).apply(pruned, training)
    (zeros,) = [g for g in result.guarantees if isinstance(g, Zeros)]
    for name, mask in zeros.masks.items():
        assert mask.shape == result.model.get_layer(name.split("/")[0]).kernel.shape
    assert zeros.check(result.model) == []
    assert sum((~mask).sum() for mask in zeros.masks.values()) > 0


def test_a_model_without_anything_to_cut(context):
    image = tf_keras.Input((8, 8, 1))
    model = tf_keras.Model(image, layers.Dense(10, name="logits")(layers.Flatten()(image)))
    with pytest.raises(CompressError, match="may go"):
        PruneChannels().apply(Candidate(model), context)


def test_an_unknown_criterion_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="geometric_median"):
        PruneChannels(criterion="geometric_medium")


@pytest.mark.parametrize("regularisation", ["group_lasso", "growing"])
def test_regularisation_drives_units_to_zero_before_the_cut(regularisation, model, context):
    training = dataclasses.replace(context, recovery=Recovery(epochs=4, batch_size=32, learning_rate=1e-3))
    seen = []

    class Watching(Context):
        def recover(self, candidate, *, projections=(), terms=()):
            result = super().recover(candidate, projections=projections, terms=terms)
            if projections:
                seen.append(rewrite(result.model))
            return result

    watching = Watching(**{f.name: getattr(training, f.name) for f in dataclasses.fields(Context)})
    result = PruneChannels(channels=0.5, regularisation=regularisation).apply(Candidate(model), watching)
    (trained,) = seen
    assert macs(result.model) < macs(model)
    before, after = (
        criteria()["l2"].score(group(m, "inner"), Evidence(Channels(m), context.data, 0)) for m in (model, trained)
    )
    shrunk = np.sqrt(np.sort(after / before))
    assert (shrunk[:10] < 0.7).all()
    if regularisation == "growing":
        # Those that will go are all but gone, the others are as they were.
        assert (shrunk[:8] < 0.05).all()
        assert shrunk[-8:].min() > 0.5


def test_regularisation_needs_training(model, context):
    with pytest.raises(CompressError, match=r"a recovery that trains[^$]*recovery.method=finetune"):
        PruneChannels(regularisation="growing").apply(Candidate(model), context)


def test_reconstruction_tells_what_it_leaves_alone(deep, context):
    result = PruneChannels(macs=0.7, criterion="reconstruction", images=64).apply(Candidate(deep), context)
    reasons = {item.layer: item.reason for item in result.skipped}
    (shared,) = [name for name in reasons if "stem" in name]
    assert "one linear layer reads" in reasons[shared]
    assert result.model.get_layer("stem").filters == 8


def test_reconstruction_names_what_it_cannot_cut(context):
    image = tf_keras.Input((8, 8, 1))
    shared = layers.Conv2D(8, 3, name="shared")(image)
    total = layers.Add()([layers.Conv2D(4, 3, name="left")(shared), layers.Conv2D(4, 3, name="right")(shared)])
    built = rewrite(tf_keras.Model(image, layers.Dense(10)(layers.GlobalAveragePooling2D()(total))))
    with pytest.raises(CompressError, match="shared: reconstruction cuts what one layer writes"):
        PruneChannels(criterion="reconstruction", images=16).apply(Candidate(built), context)


def test_a_model_with_nothing_to_cut_is_told_so(context):
    image = tf_keras.Input((8, 8, 1))
    plain = rewrite(tf_keras.Model(image, layers.Dense(10)(layers.Flatten()(image))))
    with pytest.raises(CompressError, match=r"an output of the model.*Choose settings that fit"):
        PruneChannels().apply(Candidate(plain), context)


def test_a_criterion_without_anything_to_look_at(deep, context):
    with pytest.raises(CompressError, match="finds nothing to look at"):
        PruneChannels(criterion="gamma").apply(Candidate(deep), context)


def test_fisher_is_the_mean_of_the_samples_squared_gradients(model, context):
    evidence = Evidence(Channels(model), context.data, 0, images=40)
    chosen = np.random.default_rng(0).permutation(len(context.data.train))[:40]
    kernel, total = model.get_layer("inner").kernel, 0.0
    for x, y in zip(context.data.train.x[chosen].astype(np.float32), context.data.train.y[chosen], strict=True):
        with tf.GradientTape() as tape:
            loss = tf_keras.losses.sparse_categorical_crossentropy([y], model(x[None]), from_logits=True)
        total = total + np.asarray(tape.gradient(loss, kernel)) ** 2 / 40
    own = next(m for m in group(model, "inner").members if m.weight.layer == "inner" and m.weight.attribute == "kernel")
    np.testing.assert_allclose(evidence.squared_gradient(own), total.reshape(-1, 24).T, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_labels_or_gradients_that_say_nothing_are_refused(criterion, model, context):
    same = dataclasses.replace(context.data.train, y=np.zeros_like(context.data.train.y))
    flat = dataclasses.replace(context, data=dataclasses.replace(context.data, train=same))
    with pytest.raises(CompressError, match="one and the same label"):
        PruneChannels(criterion=criterion).apply(Candidate(model), flat)
    dead = rewrite(model)
    dead.get_layer("logits").kernel.assign(tf.zeros_like(dead.get_layer("logits").kernel))
    dead.get_layer("logits").trainable = False
    with pytest.raises(CompressError, match="all the same"):
        PruneChannels(criterion=criterion).apply(Candidate(dead), context)


def test_a_pattern_clashes_with_a_cut():
    assert PruneChannels().clashes_with(Prune()) is None
    assert "channels" in PruneChannels().clashes_with(Prune(pattern="2:4"))
    assert "channels" in PruneChannels().clashes_with(Prune(block=(4, 1)))


def test_the_file_of_a_cut_separable_convolution_has_the_width_of_its_second_operator(data, tmp_path):
    image = tf_keras.Input((8, 8, 1))
    x = layers.SeparableConv2D(32, 3, name="separable")(layers.Conv2D(24, 3, name="stem")(image))
    model = rewrite(tf_keras.Model(image, layers.Dense(10, name="logits")(layers.GlobalAveragePooling2D()(x))))
    context = Context("prune_channels", data, model, Recovery(method="none"), 0)
    selection = Selection(skip=(Rule(name="stem"),))
    context = dataclasses.replace(context, selection=selection)
    result = PruneChannels(channels=20 / 32, round_to=1).apply(Candidate(model), context)
    file = TFLiteFile.read(export(result, data, tmp_path / "model.tflite").path)
    (widths,) = result.guarantees
    assert widths.channels == {"separable": 20}
    assert file.output_channels_of("separable") == 20
    assert widths.check_file(file) == []
    assert dataclasses.replace(widths, channels={"separable": 19}).check_file(file) != []


@pytest.mark.parametrize("name", ZOO)
def test_every_odd_network_is_cut_and_every_width_is_known(name):
    model = rewrite(ZOO[name]())
    x = np.random.default_rng(0).normal(size=(32, *[size or 6 for size in model.inputs[0].shape[1:]]))
    part = Split(x.astype(np.float32), np.arange(32) % 2)
    context = Context("prune_channels", make_data("random", part, part), model, Recovery(method="none"), 0)
    result = PruneChannels(channels=0.6, round_to=1, allow_partial=True).apply(Candidate(model), context)
    assert count_params(result.model) < count_params(model)
    (widths,) = result.guarantees
    assert widths.channels
    assert widths.check(result.model) == []
    wider = widths.check(model)
    assert wider
    assert {violation.layer for violation in wider} <= set(widths.channels)


@pytest.mark.parametrize(
    ("layer", "shape", "channels"),
    [
        (layers.Conv2D(7, 3, data_format="channels_first"), (3, 8, 9), 7),
        (layers.Conv2DTranspose(7, 3), (8, 9, 3), 7),
        (layers.DepthwiseConv2D(3, depth_multiplier=2), (8, 9, 3), 6),
        (layers.SeparableConv1D(7, 3, depth_multiplier=2), (8, 3), 7),
        (layers.GRU(7, return_sequences=True, return_state=True), (8, 3), 7),
        (layers.Bidirectional(layers.LSTM(7)), (8, 3), 14),
        (layers.TimeDistributed(layers.Dense(7)), (8, 3), 7),
        (layers.Embedding(9, 7), (8,), 7),
        (layers.ReLU(), (8, 3), None),
    ],
)
def test_how_many_channels_a_layer_writes(layer, shape, channels):
    layer.build((None, *shape))
    assert written_channels(layer) == channels
