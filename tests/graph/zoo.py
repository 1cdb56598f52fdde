"""The odd-network zoo: small networks, each with one thing that cutting channels can get wrong."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf
import tf_keras

from compress.graph.channels.groups import Channels
from compress.graph.grouped import grouped_convolution, shuffle_channels

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


def shuffled_groups(x):
    x = shuffle_channels(grouped_convolution(conv(x, 12, "stem"), 6, 3, "first"), 3, "shuffle")
    x = layers.DepthwiseConv2D(3, padding="same", name="each")(x)
    return head(grouped_convolution(x, 9, 3, "second"))


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
    "shuffled groups": functional((6, 6, 3), shuffled_groups),
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
