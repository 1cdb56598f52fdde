"""Channels: an odd-network zoo and random graphs; whatever is cut, the rebuilt model is the masked original."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.errors import CompressError
from compress.graph.channels.groups import Channels, Group
from compress.graph.channels.handlers import with_handler
from compress.graph.channels.surgery import masked_model, oracle_difference, remove_channels
from compress.graph.channels.trace import Call
from compress.graph.kernels import kernels
from compress.graph.rewrite import rewrite

layers = tf_keras.layers
Build = Callable[[], tf_keras.Model]


def randomised(model: tf_keras.Model) -> tf_keras.Model:
    """Give every weight a value of its own: ones and zeros would hide a mistake."""
    rng = np.random.default_rng(0)
    for weight in model.weights:
        positive = any(part in weight.name for part in ("variance", "gamma", "scale"))
        values = rng.uniform(0.5, 1.5, weight.shape) if positive else rng.normal(size=weight.shape) * 0.4
        weight.assign(values)
    return model


def functional(shape: tuple[int | None, ...], body: Callable) -> Build:
    def build() -> tf_keras.Model:
        x = tf_keras.Input(shape, name="image")
        return randomised(tf_keras.Model(x, body(x)))

    return build


def conv(x, filters: int = 8, name: str | None = None, **settings):
    return layers.Conv2D(filters, 3, padding="same", name=name, **settings)(x)


def head(x):
    return layers.Dense(3, name="head")(layers.GlobalAveragePooling2D()(x))


def residual(x):
    x = conv(x, name="stem")
    y = layers.ReLU()(layers.BatchNormalization()(conv(x, name="inner")))
    return head(layers.Add()([x, conv(y, name="outer")]))


def shared(x):
    layer = layers.Conv2D(8, 3, padding="same", name="twice")
    return head(layer(layers.ReLU()(layer(conv(x, 8, "stem")))))


def shared_at_two_sizes(x):
    layer = layers.Conv2D(8, 3, padding="same", name="twice")
    x = conv(x, 8, "stem")
    sizes = [layers.GlobalMaxPooling2D()(layer(y)) for y in (x, layers.MaxPooling2D()(x))]
    return layers.Dense(3)(layers.Concatenate()(sizes))


def squeeze_and_excite(x):
    x = conv(x, name="stem")
    gate = layers.Reshape((1, 1, 8))(layers.GlobalAveragePooling2D()(x))
    gate = layers.Conv2D(8, 1, activation="sigmoid", name="expand")(layers.Conv2D(4, 1, name="squeeze")(gate))
    return head(layers.Multiply()([x, gate]))


def gate_with_new_axes(x):
    x = conv(x, 8, "stem")
    gate = layers.Dense(8, activation="sigmoid", name="gate")(layers.GlobalAveragePooling2D()(x))
    first, second = (x * gate[:, None, None, :])[..., :4], (x + gate[:, None, None])[..., 4:]
    rows = layers.Flatten()(x[:, 2, None, 1:, None, 2:7])
    return layers.Dense(3)(tf.concat([head(tf.concat([first, second], -1)), layers.Dense(2)(rows)], -1))


def channel_shuffle(x):
    x = layers.Conv2D(12, 1, name="first")(x)
    x = tf.reshape(x, [-1, 6, 6, 3, 4])
    x = tf.transpose(x, [0, 1, 2, 4, 3])
    x = tf.reshape(x, [-1, 6, 6, 12])
    return head(layers.Conv2D(12, 3, groups=3, padding="same", name="grouped")(x))


def split_and_concat(x):
    one, two = tf.split(conv(x, 8, "stem"), 2, axis=-1)
    return head(layers.Concatenate()([conv(two, 6, "right"), one]))


def slices(x):
    x = conv(x, 8, "stem")
    return head(tf.concat([x[..., :3], conv(x[..., 3:], 5, "rest")], -1))


def padded_shortcut(x):
    x = conv(x, 4, "stem")
    y = conv(x, 8, "wide")
    return head(layers.Add()([tf.pad(x, [[0, 0], [0, 0], [0, 0], [1, 3]]), y]))


def nested_model(x):
    inner_input = tf_keras.Input((6, 6, 8))
    inner = tf_keras.Model(inner_input, layers.ReLU()(conv(inner_input, 8, "deep")), name="backbone")
    return head(inner(conv(x, 8, "stem")))


def two_outputs(x):
    x = conv(x, 8, "stem")
    return [layers.Dense(2, name="one")(layers.Flatten()(x)), head(conv(x, 8, "branch"))]


def attention(x):
    x = layers.Reshape((36, 8))(conv(x, 8, "stem"))
    x = layers.LayerNormalization(name="norm")(x)
    y = layers.MultiHeadAttention(4, 3, name="attention")(x, x)
    x = layers.Add()([x, y])
    return layers.Dense(3, name="head")(layers.GlobalAveragePooling1D()(x))


def hand_written_attention(x):
    x = layers.Reshape((36, 8))(conv(x, 8, "stem"))

    def heads(name: str):
        return tf.transpose(tf.reshape(layers.Dense(12, name=name)(x), [-1, 36, 3, 4]), [0, 2, 1, 3])

    weights = tf.nn.softmax(tf.matmul(heads("query"), heads("key"), transpose_b=True) * 0.5)
    y = tf.reshape(tf.transpose(tf.matmul(weights, heads("value")), [0, 2, 1, 3]), [-1, 36, 12])
    x = layers.Add()([x, layers.Dense(8, name="output")(y)])
    return layers.Dense(3, name="head")(layers.GlobalAveragePooling1D()(x))


def recurrent(x):
    x = layers.Reshape((6, 48))(conv(x, 8, "stem"))
    x = layers.LSTM(8, return_sequences=True, name="lstm")(layers.Permute((1, 2))(x))
    x = layers.Bidirectional(layers.GRU(5, return_sequences=True), name="both")(x)
    x = layers.TimeDistributed(layers.Dense(7), name="each")(x)
    return layers.Dense(3, name="head")(layers.SimpleRNN(6, name="simple")(x))


def states(x):
    x = layers.Reshape((6, 48))(conv(x, 8, "stem"))
    x, *state = layers.LSTM(8, return_sequences=True, return_state=True, name="lstm")(x)
    x, last = layers.GRU(6, return_sequences=True, return_state=True, name="gru")(x)
    return layers.Dense(3, name="head")(layers.Concatenate()([*state, last, layers.GlobalMaxPooling1D()(x)]))


def normalised(x):
    x = layers.GroupNormalization(4, name="in_groups")(conv(x, 8, "stem"))
    x = layers.GroupNormalization(6, name="each")(conv(x, 6, "second"))
    x = layers.PReLU(shared_axes=[1, 2], name="slope")(layers.LayerNormalization(name="all")(conv(x, 8, "third")))
    return head(x)


ZOO: dict[str, Build] = {
    "plain": functional((6, 6, 3), lambda x: head(conv(conv(x, 8, "a"), 6, "b"))),
    "one-channel convolution": functional((6, 6, 1), lambda x: head(conv(conv(conv(x, 1, "one"), 8, "a"), 4, "b"))),
    "single output channel": functional((6, 6, 3), lambda x: head(layers.Multiply()([conv(x, 8), conv(x, 1)]))),
    "depth multiplier 2": functional(
        (6, 6, 3), lambda x: head(conv(layers.DepthwiseConv2D(3, depth_multiplier=2, name="d")(conv(x, 4, "a")), 5))
    ),
    "separable": functional((6, 6, 3), lambda x: head(layers.SeparableConv2D(6, 3, depth_multiplier=2)(conv(x, 4)))),
    "grouped": functional((6, 6, 3), lambda x: head(layers.Conv2D(8, 3, groups=2, name="g")(conv(x, 8, "a")))),
    "grouped one by one": functional((6, 6, 3), lambda x: head(layers.Conv2D(16, 3, groups=8)(conv(x, 8, "a")))),
    "transposed": functional(
        (6, 6, 3), lambda x: head(layers.Conv2DTranspose(6, 3, strides=2, name="up")(conv(x, 8, "a")))
    ),
    "shared": functional((6, 6, 3), shared),
    "shared at two sizes": functional((6, 6, 3), shared_at_two_sizes),
    "concat with itself": functional((6, 6, 3), lambda x: (lambda y: head(layers.Concatenate()([y, y])))(conv(x, 8))),
    "broadcast add": functional(
        (6, 6, 3), lambda x: (lambda y: head(y + layers.GlobalMaxPooling2D(keepdims=True)(conv(x, 8))))(conv(x, 8))
    ),
    "residual": functional((6, 6, 3), residual),
    "squeeze and excite": functional((6, 6, 3), squeeze_and_excite),
    "gate with new axes": functional((6, 6, 3), gate_with_new_axes),
    "split and concat": functional((6, 6, 3), split_and_concat),
    "slices": functional((6, 6, 3), slices),
    "padded shortcut": functional((6, 6, 3), padded_shortcut),
    "channel shuffle": functional((6, 6, 3), channel_shuffle),
    "flatten": functional((6, 6, 3), lambda x: layers.Dense(3)(layers.Dense(9)(layers.Flatten()(conv(x, 8))))),
    "reshape": functional((6, 6, 3), lambda x: layers.Dense(3)(layers.Reshape((288,))(conv(x, 8, "a")))),
    "reshape to blocks": functional(
        (6, 6, 3), lambda x: layers.Dense(3)(layers.Flatten()(layers.Reshape((36, 2, 4))(conv(x, 8, "a"))))
    ),
    "two outputs": functional((6, 6, 3), two_outputs),
    "nested": functional((6, 6, 3), nested_model),
    "recurrent": functional((6, 6, 3), recurrent),
    "states": functional((6, 6, 3), states),
    "attention": functional((6, 6, 3), attention),
    "hand-written attention": functional((6, 6, 3), hand_written_attention),
    "normalisations": functional((6, 6, 3), normalised),
    "pooling, padding, upsampling": functional(
        (6, 6, 3),
        lambda x: head(
            conv(layers.UpSampling2D()(layers.ZeroPadding2D()(layers.MaxPooling2D()(conv(x, 8, "a")))), 6, "b")
        ),
    ),
    "one-dimensional": functional(
        (12, 3),
        lambda x: layers.Dense(3)(
            layers.GlobalMaxPooling1D()(layers.SeparableConv1D(6, 3)(layers.DepthwiseConv1D(3)(layers.Conv1D(8, 3)(x))))
        ),
    ),
    "embedding": functional(
        (12,), lambda x: layers.Dense(3)(layers.LSTM(6)(layers.Embedding(50, 8, name="words")(tf.abs(x))))
    ),
    "open size": functional((None, None, 3), residual),
    "hard swish": functional(
        (6, 6, 3), lambda x: (lambda y: head(y * tf.nn.relu6(y + 3.0) * (1 / 6)))(conv(x, 8, "a"))
    ),
    "mean over space": functional((6, 6, 3), lambda x: layers.Dense(3)(tf.reduce_mean(conv(x, 8, "a"), axis=[1, 2]))),
}


def samples(model: tf_keras.Model) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.normal(size=(3, *[size or 6 for size in t.shape[1:]])).astype(np.float32) for t in model.inputs]


def half_gone(channels: Channels, seed: int = 0, share: float = 0.5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    stay = np.ones(channels.count, bool)
    for group in channels.groups:
        if group.kept_because is None:
            stay[rng.permutation(group.units)[: min(round(share * len(group)), len(group) - 1)]] = False
    return channels.viable(stay)


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
    assert sum(k.macs for k in kernels(cut)) == pytest.approx(macs + sum(k.macs for k in kernels(model)) - whole[0])
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


@pytest.mark.parametrize(
    "name", ["gate with new axes", "slices", "split and concat", "padded shortcut", "channel shuffle"]
)
def test_channels_of_functions_in_a_loaded_model_are_cut(name, tmp_path):
    """Keras gives their arguments back in another form than it was given."""
    rewrite(ZOO[name]()).save(tmp_path / "model.keras")
    model = rewrite(tf_keras.models.load_model(tmp_path / "model.keras"))
    channels = Channels(model)
    assert channels.trace.unsupported == {}
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
