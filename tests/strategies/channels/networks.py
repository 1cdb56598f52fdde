"""Networks for tests of channel pruning."""

from __future__ import annotations

import numpy as np
import tf_keras

from compress.graph.kernels import kernels
from compress.graph.rewrite import rewrite

layers = tf_keras.layers


def one_block() -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((8, 8, 1))
    x = layers.Conv2D(16, 3, padding="same", name="stem")(layers.Rescaling(1 / 16)(image))
    y = layers.ReLU()(layers.BatchNormalization(name="norm")(layers.Conv2D(24, 3, padding="same", name="inner")(x)))
    x = layers.ReLU()(layers.Add()([x, layers.Conv2D(16, 3, padding="same", name="outer")(y)]))
    built = tf_keras.Model(image, layers.Dense(10, name="logits")(layers.GlobalAveragePooling2D()(x)))
    rng = np.random.default_rng(0)
    built.get_layer("norm").set_weights([rng.uniform(0.5, 2, 24), rng.normal(size=24) / 9, np.zeros(24), np.ones(24)])
    return rewrite(built)


def four_blocks() -> tf_keras.Model:
    """Four residual blocks; the branch of the third adds next to nothing."""
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((8, 8, 1))
    x = layers.Conv2D(8, 3, padding="same", name="stem")(layers.Rescaling(1 / 16)(image))
    for number in range(4):
        y = layers.Conv2D(8, 3, padding="same", activation="relu", name=f"inner{number}")(x)
        x = layers.Add(name=f"sum{number}")([x, layers.Conv2D(8, 3, padding="same", name=f"outer{number}")(y)])
    built = rewrite(tf_keras.Model(image, layers.Dense(10, name="logits")(layers.GlobalAveragePooling2D()(x))))
    built.get_layer("outer2").kernel.assign(built.get_layer("outer2").kernel * 0.01)
    return built


def macs(model: tf_keras.Model) -> int:
    return sum(k.macs for k in kernels(model))
