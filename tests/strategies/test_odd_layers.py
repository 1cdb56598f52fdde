"""Layers that have next to nothing to share: each sharing strategy leaves them alone, or keeps them whole."""

from __future__ import annotations

import numpy as np
import pytest
import tf_keras

from compress.candidate import Candidate
from compress.cli.build import make_plan
from compress.cli.compose import compose_config
from compress.cli.places import conf_dir
from compress.data.source import Data, Split, make_data
from compress.errors import CompressError
from compress.strategies.strategy import Context, Strategy
from compress.training import Recovery

layers = tf_keras.layers
SHARING = sorted(
    file.stem
    for file in (conf_dir() / "strategy").glob("*.yaml")
    if "strategies.sharing." in file.read_text() and file.stem != "pack"
)
FIELDS = {"rate_distortion": ["images=32", "bytes=0.9"], "product_quantization": ["images=32"]}


@pytest.fixture(scope="module")
def data() -> Data:
    rng = np.random.default_rng(0)
    part = Split(rng.normal(size=(48, 6, 6, 1)).astype(np.float32), np.arange(48) % 4)
    return make_data("random", part, part)


def make(name: str, *fields: str) -> Strategy:
    overrides = [f"strategy.{name}.{field}" for field in fields]
    return make_plan(compose_config([f"strategy={name}", *overrides])).stages[0].strategy


def context(model: tf_keras.Model, data: Data, name: str) -> Context:
    # soft_share is a way to train.
    recovery = Recovery(method="finetune" if name == "soft_share" else "none", epochs=1, batch_size=16)
    return Context("stage", data, model, recovery, seed=0)


@pytest.fixture(scope="module")
def model() -> tf_keras.Model:
    """A convolution of one weight, dense layers to and from a single number, and one that every structure divides."""
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((6, 6, 1))
    x = layers.Conv2D(1, 1, name="single")(image)
    x = layers.Dense(64, activation="relu", name="usual0")(layers.Flatten()(x))
    x = layers.Dense(64, activation="relu", name="usual")(x)
    narrow = layers.Dense(1, name="alone")(layers.Dense(1, name="to_one")(x))
    return tf_keras.Model(image, layers.Dense(4, name="from_one")(layers.Concatenate()([narrow, x])))


@pytest.mark.parametrize("name", SHARING)
def test_a_layer_of_a_single_weight(name: str, model: tf_keras.Model, data: Data) -> None:
    strategy = make(name, *FIELDS.get(name, ()))
    result = strategy.apply(Candidate(model), context(model, data, name))
    assert [v for guarantee in result.guarantees for v in guarantee.check(result.model)] == []
    assert all(np.isfinite(weight).all() for weight in result.model.get_weights())
    assert result.model(data.test.x).shape == (48, 4)
    touched = {layer for guarantee in result.guarantees for layer in guarantee.layers}
    left = {item.layer for item in result.skipped}
    # One value is a multiple of itself: only that strategy has something to say about it.
    assert {"single", "alone"} <= left or (name == "rate_distortion" and {"single", "alone"} <= touched)
    assert any("usual" in layer for layer in touched)


@pytest.mark.parametrize("name", sorted({*SHARING} - {"rate_distortion"}))
def test_nothing_but_a_single_weight(name: str, data: Data) -> None:
    image = tf_keras.Input((6, 6, 1))
    model = tf_keras.Model(image, layers.Flatten()(layers.Conv2D(1, 1, name="single")(image)))
    strategy = make(name, *FIELDS.get(name, ()))
    with pytest.raises(CompressError, match="single: ") as caught:
        strategy.apply(Candidate(model), context(model, data, name))
    assert caught.value.where == "stage stage"
