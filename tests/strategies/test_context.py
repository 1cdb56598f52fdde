"""Calibration samples: of the training part, augmented, half of them mixed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tf_keras

from compress.data.digits import Digits
from compress.data.source import Augmentation, Data
from compress.strategies.strategy import Context
from compress.training import Recovery


@pytest.fixture(scope="module")
def data() -> Data:
    return Digits(train_limit=100, test_limit=10).load()


def context(data: Data, seed: int = 0) -> Context:
    return Context("stage", data, tf_keras.Sequential(), Recovery(), seed)


def test_without_augmentation_they_are_training_samples(data):
    plain = dataclasses.replace(data, augmentation=Augmentation())
    found = context(plain).calibration_samples(40)
    known = {sample.tobytes() for sample in data.train.x.astype(np.float32)}
    assert found.shape == (40, *data.train.x.shape[1:])
    assert {sample.tobytes() for sample in found} <= known


def test_half_of_augmented_ones_are_mixed(data):
    mirrored = dataclasses.replace(data, augmentation=Augmentation(mirror=True))
    before = data.train.x.copy()
    found = context(mirrored).calibration_samples(60)
    train = data.train.x.astype(np.float32)
    known = {sample.tobytes() for sample in np.concatenate([train, train[:, :, ::-1]])}
    pure = sum(sample.tobytes() in known for sample in found)
    assert 30 <= pure <= 36
    assert found.min() >= 0
    assert found.max() <= train.max()
    np.testing.assert_array_equal(data.train.x, before)
    np.testing.assert_array_equal(found, context(mirrored).calibration_samples(60))
    assert not np.array_equal(found, context(mirrored, 1).calibration_samples(60))
