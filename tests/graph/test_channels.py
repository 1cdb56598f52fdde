"""Channels: an odd-network zoo and random graphs; whatever is cut, the rebuilt model is the masked original."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.candidate import Candidate
from compress.data.digits import Digits
from compress.errors import CompressError
from compress.graph.channels.groups import Channels, Group
from compress.graph.channels.handlers import register_handler, with_handler
from compress.graph.channels.surgery import masked_model, oracle_difference, remove_channels
from compress.graph.channels.trace import Call
from compress.graph.rewrite import nodes, rewrite
from compress.graph.selection import Selection
from compress.metrics.counts import count_macs
from compress.strategies.pruning.channels import PruneChannels
from compress.strategies.strategy import Context
from compress.training import Recovery
from tests.graph.zoo import ZOO, conv, functional, half_gone, head, randomised, samples

layers = tf_keras.layers


def assert_cut(model: tf_keras.Model, stay: np.ndarray, channels: Channels) -> tf_keras.Model:
    before = [w.copy() for w in model.get_weights()]
    cut = remove_channels(channels, stay)
    assert oracle_difference(masked_model(channels, stay), cut, samples(model)) < 1e-5
    assert [t.shape for t in cut.outputs] == [t.shape for t in model.outputs]
    assert [t.shape for t in cut.inputs] == [t.shape for t in model.inputs]
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    macs, params = channels.costs(stay | channels.pinned)
    whole = channels.costs(np.ones(channels.count, bool))
    assert cut.count_params() < model.count_params()
    trainable = sum(int(np.prod(w.shape)) for w in cut.trainable_weights)
    assert trainable - params == sum(int(np.prod(w.shape)) for w in model.trainable_weights) - whole[1]
    assert count_macs(cut) == pytest.approx(macs + count_macs(model) - whole[0])
    return cut


@pytest.mark.parametrize("name", ZOO)
def test_the_rebuilt_model_is_the_masked_original(name):
    model = rewrite(ZOO[name]())
    channels = Channels(model)
    assert channels.trace.unsupported == {}
    for seed in range(3):
        assert_cut(model, half_gone(channels, seed), channels)


@pytest.mark.parametrize("name", ZOO)
def test_the_mask_matters(name):
    """A comparison that would pass whatever is cut shows nothing: unmasked, the outputs differ."""
    model = rewrite(ZOO[name]())
    channels = Channels(model)
    assert oracle_difference(model, remove_channels(channels, half_gone(channels)), samples(model)) > 1e-3


@pytest.mark.parametrize("name", ZOO)
def test_what_is_cut_can_be_saved_and_loaded(name, tmp_path):
    model = rewrite(ZOO[name]())
    channels = Channels(model)
    cut = remove_channels(channels, half_gone(channels))
    cut.save(tmp_path / "model.keras")
    loaded = tf_keras.models.load_model(tmp_path / "model.keras")
    assert oracle_difference(cut, loaded, samples(model)) == 0


@pytest.mark.parametrize("name", ZOO)
def test_a_loaded_model_has_the_same_groups(name, tmp_path):
    """Keras gives arguments back in another form than it was given: lists for tuples, keywords for positions."""
    before = rewrite(ZOO[name]())
    before.save(tmp_path / "model.keras")
    model = rewrite(tf_keras.models.load_model(tmp_path / "model.keras"))
    channels = Channels(model)
    assert channels.trace.unsupported == {}
    assert sorted(len(g) for g in channels.groups if g.kept_because is None) == sorted(
        len(g) for g in Channels(before).groups if g.kept_because is None
    )
    assert_cut(model, half_gone(channels), channels)


def group_of(channels: Channels, layer: str) -> Group:
    (found,) = [group for group in channels.groups if layer in group.writers]
    return found


def test_a_wrong_tie_would_be_noticed():
    """The oracle is independent of the cut: two channels swapped by mistake are found."""
    model = rewrite(ZOO["residual"]())
    channels = Channels(model)
    stay = half_gone(channels)
    wrong = remove_channels(channels, stay)
    kernel, bias = wrong.get_layer("inner").get_weights()
    wrong.get_layer("inner").set_weights([kernel[..., ::-1], bias[::-1]])
    assert oracle_difference(masked_model(channels, stay), wrong, samples(model)) > 1e-3


def test_groups_of_a_residual_block_and_their_causes():
    channels = Channels(rewrite(ZOO["residual"]()))
    stage = group_of(channels, "stem")
    assert stage.writers == ("stem", "outer")
    assert set(stage.readers) == {"inner", "head"}
    assert len(stage) == 8
    text = stage.describe()
    assert text.index("stem writes") < text.index("add") < text.index("head reads")
    assert "joins" in text
    inner = group_of(channels, "inner")
    assert inner.writers == ("inner",)
    assert inner.readers == ("outer",)
    assert "an output of the model" in group_of(channels, "head").describe()


def test_one_output_channel_is_not_depthwise():
    channels = Channels(rewrite(ZOO["one-channel convolution"]()))
    assert group_of(channels, "one").kept_because == "a single channel; nothing would be left"
    assert group_of(channels, "a").writers == ("a",)


def test_a_depthwise_convolution_follows_its_input():
    channels = Channels(rewrite(ZOO["depth multiplier 2"]()))
    group = group_of(channels, "a")
    assert len(group) == 4
    stay = np.ones(channels.count, bool)
    stay[group.units[1]] = False
    cut = remove_channels(channels, stay)
    assert cut.get_layer("d").output_shape[-1] == 6


def test_a_branch_that_nobody_knows_keeps_what_it_is_added_to():
    def body(x):
        x = conv(x, 8, "stem")
        y = layers.Lambda(lambda t: t * 2, name="own")(x)
        return head(layers.Add()([y, conv(x, 8, "other")]))

    channels = Channels(rewrite(functional((6, 6, 3), body)()))
    assert group_of(channels, "other").kept_because is not None


def test_a_cut_that_leaves_a_layer_nothing_is_refused():
    channels = Channels(rewrite(ZOO["slices"]()))
    stay = np.ones(channels.count, bool)
    stay[group_of(channels, "stem").units[3:]] = False
    with pytest.raises(CompressError, match="rest"):
        remove_channels(channels, stay)


def test_the_oracle_does_not_pass_what_is_no_number():
    model = rewrite(ZOO["plain"]())
    broken = rewrite(model)
    broken.get_layer("head").bias.assign([np.nan] * 3)
    assert oracle_difference(model, broken, samples(model)) == np.inf


class Doubling(layers.Layer):
    """A layer of a user's with weights that nobody here knows."""

    def build(self, shape):
        self.scale = self.add_weight("scale", (shape[-1],))

    def call(self, x):
        return x * self.scale


class OwnHandler(Doubling):
    """The same, with a handler of its own."""

    def trace_channels(self, call: Call):
        call.weight(self.scale, call.along())
        return [call.inputs[0]]


def doubling_handler(call: Call):
    call.weight(call.layer.scale, call.along())
    return [call.inputs[0]]


@pytest.mark.parametrize("way", ["own", "table"])
def test_a_users_layer_brings_its_handler(way):
    kind = OwnHandler if way == "own" else Doubling
    model = rewrite(functional((6, 6, 3), lambda x: head(kind(name="mine")(conv(x, 8, "a"))))())
    channels = Channels(model, None if way == "own" else with_handler(Doubling, doubling_handler))
    assert group_of(channels, "a").kept_because is None
    assert_cut(model, half_gone(channels), channels)


def test_an_unknown_layer_keeps_what_it_touches_and_says_so():
    model = rewrite(functional((6, 6, 3), lambda x: head(conv(Doubling(name="mine")(conv(x, 8, "a")), 8, "b")))())
    channels = Channels(model)
    assert channels.trace.unsupported == {"mine": "no handler knows its weights"}
    assert "mine" in str(group_of(channels, "a").kept_because)
    assert group_of(channels, "b").kept_because is None
    assert_cut(model, half_gone(channels), channels)


@st.composite
def networks(draw) -> tf_keras.Model:
    """A random graph: every step takes one or two tensors that are there already."""
    image = tf_keras.Input((6, 6, 3))
    there = [conv(image, draw(st.integers(2, 6)))]
    for _ in range(draw(st.integers(2, 7))):
        x = draw(st.sampled_from(there))
        channels = x.shape[-1]
        kind = draw(
            st.sampled_from(
                [
                    "conv",
                    "depthwise",
                    "norm",
                    "relu",
                    "add",
                    "concat",
                    "multiply",
                    "gate",
                    "grouped",
                    "slice",
                    "shuffle",
                ]
            )
        )
        if kind == "conv":
            y = conv(x, draw(st.integers(1, 6)))
        elif kind == "depthwise":
            y = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=draw(st.integers(1, 2)))(x)
        elif kind == "norm":
            y = draw(st.sampled_from([layers.BatchNormalization, layers.LayerNormalization]))()(x)
        elif kind in ("add", "multiply"):
            other = draw(st.sampled_from(there))
            if other.shape[-1] not in (channels, 1):
                other = conv(other, channels)
            y = {"add": layers.Add, "multiply": layers.Multiply}[kind]()([x, other])
        elif kind == "concat":
            y = layers.Concatenate()([x, draw(st.sampled_from(there))])
        elif kind == "gate":
            y = x * layers.Dense(channels, activation="sigmoid")(layers.GlobalAveragePooling2D(keepdims=True)(x))
        elif kind == "grouped" and channels % 2 == 0:
            y = layers.Conv2D(4, 3, groups=2, padding="same")(x)
        elif kind == "slice" and channels > 2:
            y = x[..., 1:]
        elif kind == "shuffle" and channels % 2 == 0:
            y = tf.reshape(
                tf.transpose(tf.reshape(x, [-1, 6, 6, 2, channels // 2]), [0, 1, 2, 4, 3]), [-1, 6, 6, channels]
            )
        else:
            y = layers.ReLU()(x)
        there.append(y)
    last = draw(st.sampled_from([layers.Flatten, layers.GlobalMaxPooling2D]))()(there[-1])
    outputs = [layers.Dense(3)(last)]
    if draw(st.booleans()):
        outputs.append(layers.Dense(2)(layers.Flatten()(draw(st.sampled_from(there)))))
    return randomised(tf_keras.Model(image, outputs))


@given(networks(), st.integers(0, 99), st.floats(0.1, 0.9))
@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
def test_random_graphs(network, seed, share):
    model = rewrite(network)
    channels = Channels(model)
    stay = half_gone(channels, seed, share)
    if stay.all():
        return
    assert_cut(model, stay, channels)


def stays(channels: Channels, **left: list[int]) -> np.ndarray:
    """Cut the groups that the named layers write to the listed units."""
    stay = np.ones(channels.count, bool)
    for layer, units in left.items():
        group = group_of(channels, layer)
        stay[group.units] = np.isin(np.arange(len(group)), units)
    return stay


def test_a_layer_without_weights_called_twice_cuts_both_alike():
    reshape = layers.Reshape((288,))
    body = lambda x: layers.Dense(3)(  # noqa: E731
        layers.Concatenate()([reshape(conv(x, 8, "a")), reshape(conv(x, 8, "b"))])
    )
    model = rewrite(functional((6, 6, 3), body)())
    channels = Channels(model)
    assert group_of(channels, "a") is group_of(channels, "b")
    assert_cut(model, stays(channels, a=[0, 3, 4, 6, 7]), channels)


def test_one_called_on_two_shapes_keeps_both():
    reshape = layers.Reshape((-1, 4))
    body = lambda x: layers.Dense(3)(  # noqa: E731
        layers.Concatenate(1)([reshape(conv(x, 8, "a")), reshape(layers.MaxPooling2D()(conv(x, 4, "b")))])
    )
    channels = Channels(rewrite(functional((6, 6, 3), body)()))
    kept = {group.name: group.kept_because for group in channels.groups}
    assert all(kept[name] is not None for name in kept if {"a", "b"} & set(name.split(", ")))


def test_numbers_of_each_channel_are_cut_with_it():
    body = lambda x: head(  # noqa: E731
        conv(layers.Rescaling(np.arange(1, 9.0).tolist(), offset=np.arange(8.0).tolist())(conv(x, 8, "a")), 4, "b")
    )
    model = rewrite(functional((6, 6, 3), body)())
    channels = Channels(model)
    cut = assert_cut(model, stays(channels, a=[1, 2, 7]), channels)
    (found,) = [layer for layer in cut.layers if isinstance(layer, layers.Rescaling)]
    np.testing.assert_array_equal(found.scale, [2, 3, 8])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: tf.clip_by_value(x, np.zeros(8, np.float32), np.ones(8, np.float32)), "certain channels"),
        (lambda x: x * tuple(range(8)), "certain channels"),
        (lambda x: layers.Add()([x, np.ones((1, 6, 6, 8), np.float32)]), "certain channels"),
        (lambda x: tf.pad(x, [[0, 0], [0, 0], [0, 0], [1, 1]], mode="REFLECT"), "with others"),
        (layers.LayerNormalization(axis=(-1, -2)), "not in order"),
        (
            lambda x: (lambda y: layers.MultiHeadAttention(3, 3, output_shape=(2, 4))(y, y))(
                layers.Reshape((36, 8))(x)
            ),
            "several axes",
        ),
        (layers.BatchNormalization(renorm=True), "moving_stddev"),
        (layers.GroupNormalization(2, axis=1), "another axis"),
        (lambda x: layers.Masking()(layers.Reshape((36, 8))(x)), "all channels"),
        (
            lambda x: layers.MaxPooling1D(3, strides=1, padding="same")(
                layers.Permute((2, 1))(layers.Reshape((36, 8))(x))
            ),
            "along channels",
        ),
    ],
    ids=["clip", "tuple", "array", "reflect", "layer norm", "attention", "renorm", "group norm", "masking", "pooling"],
)
def test_what_is_not_traced_is_kept_with_the_reason(change, reason):
    body = lambda x: layers.Dense(3)(layers.Flatten()(change(conv(x, 8, "a"))))  # noqa: E731
    channels = Channels(rewrite(functional((6, 6, 3), body)()))
    assert any(reason in text for text in channels.trace.unsupported.values())
    assert group_of(channels, "a").kept_because is not None
    assert remove_channels(channels, np.zeros(channels.count, bool)) is not None


def test_a_wrapper_s_own_configuration_is_left_alone():
    image = layers.Input((5, 4))
    inner = layers.LSTM(6, return_sequences=True), layers.LSTM(6, return_sequences=True, go_backwards=True)
    x = layers.Bidirectional(inner[0], backward_layer=inner[1], name="both")(image)
    model = rewrite(randomised(tf_keras.Model(image, layers.Dense(3)(layers.LSTM(4)(x)))))
    channels = Channels(model)
    before = str(model.get_layer("both").get_config())
    remove_channels(channels, half_gone(channels))
    assert str(model.get_layer("both").get_config()) == before
    assert_cut(model, half_gone(channels), channels)


def test_a_handler_that_describes_other_axes_than_there_are_keeps_what_it_touches():
    def wrong(call: Call):
        call.weight(call.layer.scale, call.along(), None)
        return [call.inputs[0]]

    model = rewrite(functional((6, 6, 3), lambda x: head(conv(Doubling(name="mine")(conv(x, 8, "a")), 8, "b")))())
    channels = Channels(model, with_handler(Doubling, wrong))
    assert "2 axes of mine/scale" in str(group_of(channels, "a").kept_because)
    assert_cut(model, half_gone(channels), channels)


@pytest.mark.parametrize("criterion", ["l2", "reconstruction"])
def test_a_registered_handler_reaches_the_strategy(criterion):
    class Foreign(Doubling):
        """A class that cannot be edited."""

    image = layers.Input((8, 8, 1))
    model = rewrite(randomised(tf_keras.Model(image, head(conv(Foreign()(conv(image, 8, "a")), 6, "b")))))
    strategy = PruneChannels(macs=0.6, criterion=criterion, images=64)
    assert "a" not in strategy.targets(model, Selection())
    register_handler(Foreign, doubling_handler)
    assert "a" in strategy.targets(model, Selection())
    context = Context("prune_channels", Digits(train_limit=64, test_limit=16).load(), model, Recovery(method="none"), 0)
    cut = strategy.apply(Candidate(model), context).model
    assert cut.get_layer("a").filters < 8


def test_a_registered_handler_is_no_handler_of_classes_that_have_a_nearer_one():
    class Between(layers.Conv2D):
        """Knows nothing of the class derived from it that follows."""

    class Last(Between):
        def trace_channels(self, call: Call):
            return call.unknown("the nearest")

    register_handler(Between, lambda call: call.unknown("the farther"))
    model = rewrite(functional((6, 6, 3), lambda x: head(Last(4, 3, name="one")(Between(4, 3, name="two")(x))))())
    assert Channels(model).trace.unsupported == {"one": "the nearest", "two": "the farther"}


def masked_steps(x):
    words = layers.Embedding(50, 8, mask_zero=True)(tf.nn.relu(x))
    x = layers.Bidirectional(layers.LSTM(6, return_sequences=True))(words)
    return layers.Dense(3)(layers.GlobalAveragePooling1D()(layers.LayerNormalization()(layers.Dense(5)(x))))


def initialised_with_arrays(x):
    matrix = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    words = layers.Embedding(50, 8, embeddings_initializer=tf_keras.initializers.Constant(matrix))(tf.abs(x))
    bias = tf_keras.initializers.Constant(list(range(6)))
    return layers.Dense(3)(layers.GRU(4)(layers.TimeDistributed(layers.Dense(6, bias_initializer=bias))(words)))


def reshaped_at_two_sizes(x):
    reshape = layers.Reshape((-1, 4))
    rows = layers.Concatenate(1)([reshape(conv(x, 8, "a")), reshape(conv(x, 4, "b"))])
    free = layers.GlobalAveragePooling2D()(conv(conv(x, 10), 6))
    return layers.Dense(3)(layers.Concatenate()([layers.Flatten()(rows), free]))


@pytest.mark.parametrize(
    ("shape", "body"),
    [((7,), masked_steps), ((7,), initialised_with_arrays), ((6, 6, 3), reshaped_at_two_sizes)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_odd_networks_are_cut_as_their_masked_originals(shape, body):
    model = rewrite(functional(shape, body)())
    channels = Channels(model)
    assert channels.trace.unsupported == {}
    assert_cut(model, half_gone(channels), channels)


def test_the_mask_of_steps_reaches_what_reads_masked_channels():
    """The oracle of a network that leaves steps out leaves them out, too: a cut that did not would be found."""
    model = rewrite(functional((7,), masked_steps)())
    channels = Channels(model)
    stay = half_gone(channels)
    steps = np.array([[1, 2, 0, 0, 3, 0, 1]], np.float32)
    other = np.array([[1, 2, 0, 0, 3, 0, 0]], np.float32)
    masked = masked_model(channels, stay)
    cut = remove_channels(channels, stay)
    for x in (steps, other):
        np.testing.assert_allclose(masked(x), cut(x), rtol=1e-4, atol=1e-5)
    assert np.abs(masked(steps) - masked(other)).max() > 1e-3


def test_an_array_beside_channels_keeps_them():
    image = layers.Input(batch_shape=(3, 6, 6, 3))
    joined = tf.concat([conv(image, 8, "a"), tf.ones((3, 6, 6, 2))], -1)
    model = rewrite(randomised(tf_keras.Model(image, head(conv(joined, 5, "b")))))
    channels = Channels(model)
    assert group_of(channels, "a").kept_because is not None
    assert_cut(model, half_gone(channels), channels)


@pytest.mark.parametrize("setting", ["activation", "recurrent_activation"])
def test_softmax_between_the_units_of_a_recurrent_layer_keeps_them(setting):
    body = lambda x: layers.Dense(3)(layers.LSTM(6, name="own", **{setting: "softmax"})(x))  # noqa: E731
    channels = Channels(rewrite(functional((5, 4), body)()))
    assert "softmax" in str(group_of(channels, "own").kept_because)


def test_channels_that_are_all_tied_together_are_told_from_a_single_one():
    def body(x):
        one, other = (layers.GlobalMaxPooling2D()(conv(x, count, name)) for count, name in ((8, "a"), (6, "b")))
        return layers.Dense(3)(layers.Flatten()(one[:, :, None] * other[:, None, :]))

    reason = "channels that can only go all together; nothing would be left"
    assert group_of(Channels(rewrite(functional((6, 6, 3), body)())), "a").kept_because == reason


def test_a_model_without_a_graph_is_refused():
    class Own(tf_keras.Model):
        def call(self, x):
            return x

    model = Own()
    model(np.zeros((1, 4), np.float32))
    for read in (Channels, lambda m: list(nodes(m))):
        with pytest.raises(CompressError, match="functional"):
            read(model)
