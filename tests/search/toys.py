"""A small trained network, its data and a context, for tests of searches."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import tf_keras

from compress.candidate import Artifact, Latency, Measurement
from compress.cli.techniques import make_techniques
from compress.data.digits import Digits
from compress.data.source import Data
from compress.search.technique import Technique
from compress.strategies.strategy import Context
from compress.training import Recovery, train

layers = tf_keras.layers


def small_data() -> Data:
    return Digits(train_limit=512, test_limit=128).load()


def small_net(data: Data) -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input(data.train.x.shape[1:], name="image")
    x = layers.Rescaling(1 / 16)(image)
    x = layers.Conv2D(16, 3, use_bias=False, name="conv1")(x)
    x = layers.BatchNormalization(name="norm1")(x)
    x = layers.ReLU()(x)
    x = layers.Conv2D(24, 3, activation="relu", name="conv2")(x)
    x = layers.Flatten()(x)
    x = layers.Dense(32, activation="relu", name="fc1")(x)
    model = tf_keras.Model(image, layers.Dense(10, name="logits")(x), name="small")
    train(model, data, Recovery(epochs=8, learning_rate=0.05, batch_size=32), seed=0, guarantees=())
    return model


def measure(artifact: Artifact) -> Measurement:
    """A board that takes its time for every byte of the file: the same at each call."""
    milliseconds = artifact.path.stat().st_size / 1e5
    return Measurement("toy", Latency(milliseconds, None, None, milliseconds, 100, 1))


def measure_all(artifacts: Sequence[Artifact]) -> list[Measurement]:
    return [measure(artifact) for artifact in artifacts]


def context_of(
    model: tf_keras.Model,
    data: Data,
    remember: Callable[[str, Sequence[Any], Callable[[], Any]], Any] | None = None,
    epochs: float = 0.0,
) -> Context:
    recovery = Recovery(method="finetune" if epochs else "none", epochs=epochs, batch_size=32)
    context = Context("auto", data, model, recovery, seed=0, measure=measure_all)
    return context if remember is None else context.for_stage("auto", remember=remember)


def techniques(**chosen: dict[str, Any]) -> tuple[Technique, ...]:
    return make_techniques(chosen, "techniques")


class Memory:
    """Remembers in JSON's types, as the cache does; counts what it had to make."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}
        self.names: list[str] = []

    @property
    def made(self) -> int:
        return len(self.names)

    def __call__(self, name: str, settings: Sequence[Any], make: Callable[[], Any]) -> Any:
        key = json.dumps([name, *settings], sort_keys=True, default=str)
        if key not in self.known:
            self.known[key] = json.dumps(make())
            self.names.append(name)
        return json.loads(self.known[key])
