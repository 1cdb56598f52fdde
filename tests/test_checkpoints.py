"""A training that is stopped goes on to the very weights that it would have had, whatever takes part in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import tf_keras

from compress.cache.trainings import Trainings
from compress.data.source import Augmentation
from compress.graph.kernels import get_variable, get_weight
from compress.strategies.distillation.mutual import PeerTerm
from compress.strategies.pruning.masks import Axes, Masking, Pattern
from compress.strategies.pruning.schedules import Movement
from compress.strategies.quantization.trained_ternary import TrainedTernaryQuantizer
from compress.strategies.sharing.mixture import MixturePrior
from compress.training import History, Recovery, train
from tests.test_training import convolutional, data, linear

KEY = "0123456789abcdef"
EPOCHS = 4
DATA = data(40, (6, 6, 1), Augmentation(shift=1, mirror=True))


class Stopped(Exception):
    """In the place of a signal."""


@dataclass
class Memory:
    """Keeps the state in memory; stops the training after ``stop_at`` of them."""

    stop_at: int | None = None
    seconds: float = 0.0
    kept: dict[str, Any] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)

    def load(self, identity: str) -> Mapping[str, np.ndarray] | None:
        return self.kept.get(identity)

    def save(self, identity: str, arrays: Mapping[str, np.ndarray]) -> None:
        self.kept = {identity: {name: np.array(value) for name, value in arrays.items()}}
        self.steps.append(int(arrays["step"]))
        if len(self.steps) == self.stop_at:
            raise Stopped


def drawing(model: tf_keras.Model) -> dict[str, Any]:
    """Dropout, augmentation, mixed images, Adam: nothing but the model's and the optimiser's variables."""
    return {"recovery": Recovery(epochs=EPOCHS, batch_size=10, optimizer="adam", mixup=0.5)}


def scheduled(model: tf_keras.Model) -> dict[str, Any]:
    """A pruning schedule with masks, scores and values of its own."""
    masking = Masking([Axes(-2, (-1,))], Pattern(), "layer", [1.0])
    schedule = Movement([get_variable(model, "dense/kernel")], masking, 0.0, 0.6, ramp=0.5)
    return {"recovery": Recovery(epochs=EPOCHS, batch_size=10), "projections": [schedule]}


def quantized(model: tf_keras.Model) -> dict[str, Any]:
    """Latent weights, trained levels, and a loss term with variables of its own."""
    quantizers = {"conv/kernel": TrainedTernaryQuantizer(get_weight(model, "conv/kernel"), 0.05)}
    dense = [get_variable(model, "dense/kernel")]
    prior = MixturePrior(dense, 4, zeros=0.5, width=0.1, certainty=0.01, strength=0.1)
    return {"recovery": Recovery(epochs=EPOCHS, batch_size=10), "quantizers": quantizers, "terms": [prior]}


def together(model: tf_keras.Model) -> dict[str, Any]:
    """A peer that is trained in the same step, with dropout of its own."""
    peer = convolutional()
    peer.layers[-1].kernel.assign(peer.layers[-1].kernel * 0.5)
    return {"recovery": Recovery(epochs=EPOCHS, batch_size=10), "terms": [PeerTerm([peer], 1.0, 1e-4)]}


def trained(kind: Callable, checkpoint: Memory | None) -> tuple[tf_keras.Model, History]:
    model = convolutional()
    return model, train(model, DATA, seed=3, checkpoint=checkpoint, **kind(model))


@pytest.mark.parametrize("kind", [drawing, scheduled, quantized, together], ids=lambda kind: kind.__name__)
def test_a_stopped_training_ends_with_the_same_weights(kind):
    calm, whole = trained(kind, None)
    memory = Memory(stop_at=2)
    with pytest.raises(Stopped):
        trained(kind, memory)
    assert memory.steps == [4, 8]
    (stopped,) = memory.kept.values()
    resumed, rest = trained(kind, memory)
    assert memory.steps == [4, 8, 12, 16]
    assert (whole.images, rest.images) == (160, 80)
    assert whole.loss == rest.loss
    (finished,) = memory.kept.values()
    assert whole.seconds_before == 0
    assert 0 < rest.seconds_before == float(stopped["seconds"]) < float(finished["seconds"])
    for one, two in zip(calm.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_what_is_finished_is_not_made_again_and_another_beginning_is_another_training():
    memory = Memory()
    first, whole = trained(drawing, memory)
    again, none = trained(drawing, memory)
    assert (whole.images, none.images) == (160, 0)
    assert none.loss == whole.loss
    for one, two in zip(first.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    other = convolutional()
    train(other, DATA, seed=4, checkpoint=memory, **drawing(other))
    assert memory.steps == [4, 8, 12, 16] * 2


def test_a_state_comes_back_from_disk_or_not_at_all(tmp_path):
    arrays = {"variable0": np.arange(6, dtype=np.float32), "step": np.array(8), "loss": np.array(0.5)}
    trainings = Trainings(tmp_path, KEY)
    first, second = trainings.next(), trainings.next()
    first.save("identity", {**arrays, "step": np.array(4)})
    first.save("identity", arrays)
    assert second.load("identity") is None
    found = Trainings(tmp_path, KEY).next().load("identity")
    assert int(found["step"]) == 8
    np.testing.assert_array_equal(found["variable0"], arrays["variable0"])
    assert first.load("another") is None
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 0x55
    file.write_bytes(content)
    assert first.load("identity") is None
    file.write_bytes(content[:40])
    assert first.load("identity") is None
    trainings.forget()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert Trainings(None, KEY).next() is None


def test_a_short_training_leaves_no_state():
    memory = Memory(seconds=60.0)
    model = linear()
    train(model, data(40), Recovery(epochs=3, batch_size=10), seed=0, checkpoint=memory)
    assert memory.steps == []
