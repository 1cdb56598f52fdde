"""What tests of channel pruning cut."""

from __future__ import annotations

import pytest
import tf_keras

from compress.data.digits import Digits
from compress.data.source import Data
from compress.strategies.strategy import Context
from compress.training import Recovery
from tests.strategies.channels.networks import four_blocks, one_block


@pytest.fixture(scope="module")
def data() -> Data:
    return Digits(train_limit=256, test_limit=64).load()


@pytest.fixture(scope="module")
def model() -> tf_keras.Model:
    return one_block()


@pytest.fixture(scope="module")
def deep() -> tf_keras.Model:
    return four_blocks()


@pytest.fixture
def context(data: Data, model: tf_keras.Model) -> Context:
    return Context("prune_channels", data, model, Recovery(method="none"), 0)
