"""An entry of the stage cache with every kind of guarantee in it."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import tf_keras

from compress.cache.store import Entry
from compress.candidate import Calibration, Candidate, Storage
from compress.strategies.compact.separable_form import SeparableForm
from compress.strategies.lowrank.rank import Rank
from compress.strategies.pruning.zeros import Zeros
from compress.strategies.quantization.stored import Stored
from compress.strategies.sharing.codebook import Codebook

layers = tf_keras.layers
KEY = "0123456789abcdef"


def network() -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((6, 6, 2), name="image")
    x = layers.DepthwiseConv2D(3, name="conv_depthwise")(image)
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(4, 1, name="conv")(x)))
    return tf_keras.Model(image, layers.Dense(3, name="dense")(layers.Flatten()(x)))


@pytest.fixture
def entry() -> Entry:
    mask = np.arange(8).reshape(1, 1, 2, 4) % 3 > 0
    guarantees = (
        Zeros("prune", {"conv/kernel": mask, "dense/kernel": np.ones((64, 3), bool)}),
        Codebook("share", 300, {"dense/kernel": np.arange(192, dtype=np.uint16).reshape(64, 3)}),
        Rank("lowrank", {"dense": 5}),
        SeparableForm("compact", {"conv": "conv_depthwise"}),
        Stored("quantize", "int8"),
    )
    candidate = Candidate(
        network(),
        guarantees,
        Storage("int8", Calibration(images=17, ranges="mse"), ("conv",)),
        lineage=("prune", "share"),
        released=("lowrank: gone",),
    )
    return Entry(
        candidate, {"name": "share", "skipped": [{"layer": "conv", "reason": "too small"}]}, b"\0TFLite\xff", b"\x93CMP"
    )


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("compress"), "warning", lambda text, *values: said.append(text % values))
    return said
