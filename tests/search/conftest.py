"""The small network that searches are tried on."""

from __future__ import annotations

import pytest
import tf_keras

from compress.data.source import Data
from tests.search.toys import small_data, small_net


@pytest.fixture(scope="module")
def data() -> Data:
    return small_data()


@pytest.fixture(scope="module")
def model(data: Data) -> tf_keras.Model:
    return small_net(data)
