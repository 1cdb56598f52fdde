"""A network that overflows, and data that say nothing, are refused before any work is done."""

from __future__ import annotations

import numpy as np
import pytest
import tf_keras

from compress.candidate import Candidate
from compress.data.source import Data, Split, make_data
from compress.errors import CompressError
from compress.strategies.quantization.aware import QuantizeAware
from compress.strategies.quantization.calibration import check_activations
from compress.strategies.quantization.dorefa import DoReFa
from compress.strategies.quantization.mixed_precision import MixedPrecision
from compress.strategies.quantization.post_training import Quantize
from compress.strategies.quantization.xnor import XnorNet
from compress.strategies.strategy import Context
from compress.training import Recovery

layers = tf_keras.layers
READERS = {
    "int8": Quantize(),
    "4 bits": Quantize(bits=4),
    "int16": Quantize(scheme="int16"),
    "corrected": Quantize(scheme="weight_only", bias_correction=True),
    "qat": QuantizeAware(),
    "tfmot": QuantizeAware(scheme="tfmot"),
    "mixed": MixedPrecision(),
    "latency": MixedPrecision(latency=0.5),
    "inputs": DoReFa(input_bits=2),
    "xnor": XnorNet(),
}


def network(size: float = 1.0) -> tf_keras.Model:
    """Two convolutions, the second one of which overflows from a size of 1e20 on."""
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((6, 6, 2))
    x = layers.Conv2D(4, 3, activation="relu", name="first")(image)
    x = layers.Conv2D(4, 3, name="second")(x)
    model = tf_keras.Model(image, layers.Dense(3, name="dense")(layers.Flatten()(x)))
    for name in ("first", "second"):
        kernel = model.get_layer(name).kernel
        kernel.assign(size * np.abs(kernel) if size > 1 else kernel)
    return model


def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(size=(300, 6, 6, 2)).astype(np.float32)


def made(x: np.ndarray) -> Data:
    part = Split(x, np.arange(len(x)) % 3)
    return make_data("made", part, part)


def apply(strategy, model: tf_keras.Model, x: np.ndarray, monkeypatch) -> None:
    def untrained(*args, **kwargs):
        raise AssertionError("it was trained")

    monkeypatch.setattr(Context, "recover", untrained)
    strategy.apply(Candidate(model), Context("stage", made(x), model, Recovery(epochs=1.0), seed=0))


@pytest.mark.parametrize("strategy", READERS.values(), ids=READERS)
def test_the_layer_that_overflows_is_named(strategy, monkeypatch):
    with pytest.raises(CompressError) as caught:
        apply(strategy, network(1e20), images(), monkeypatch)
    assert caught.value.where == "calibration, layer second"
    assert "inf" in caught.value.received


@pytest.mark.parametrize("strategy", READERS.values(), ids=READERS)
def test_samples_that_are_all_equal(strategy, monkeypatch):
    with pytest.raises(CompressError, match="samples of nothing but 3"):
        apply(strategy, network(), np.full((300, 6, 6, 2), 3, np.float32), monkeypatch)


def test_infinite_values_of_both_signs_are_not_a_number_later():
    model = network(1e20)
    model.get_layer("second").kernel.assign(model.get_layer("second").kernel * np.float32([[[[1, -1, 1, -1]]]]))
    with pytest.raises(CompressError) as caught:
        check_activations(Candidate(model), made(images()), 16)
    assert caught.value.where == "calibration, layer second"
    assert "from -inf to inf" in caught.value.received


def test_one_sample_of_many_is_enough():
    """The first layer that overflows on any of the samples is named, not the first that does on the first ones."""
    image = tf_keras.Input((6, 6, 2))
    x = layers.Lambda(lambda value: value / (1 - value), name="early")(image)
    x = layers.Lambda(lambda value: 1e30 * value**2, name="late")(x)
    model = tf_keras.Model(image, layers.Dense(3)(layers.Flatten()(x)))
    x = images()
    x[: len(x) // 2] = 0.999999  # Squared and grown, it overflows; a one does so at once.
    x[-1, 0, 0, 0] = 1
    with pytest.raises(CompressError) as caught:
        check_activations(Candidate(model), made(x), len(x))
    assert caught.value.where == "calibration, layer early"


def test_a_network_that_does_not_overflow_and_its_own_samples():
    good = images()
    check_activations(Candidate(network()), made(good), 256)
    check_activations(Candidate(network(), samples=good[:4]), made(np.full_like(good, 3)), 256)
    with pytest.raises(CompressError, match="NaN or infinite"):
        check_activations(Candidate(network(), samples=np.full_like(good, np.nan)), made(good), 256)
