"""Inputs of few levels: what kernels multiply their weights with is rounded, too.

Sources: Rastegari et al., XNOR-Net (arXiv 1603.05279, section 3.2); Zhou et al., DoReFa-Net (arXiv 1606.06160, section
2.5). The gradient goes straight through the rounding, and is zero where a value is cut off (Hubara et al., arXiv
1602.02830, equation 4). All of it is made of TensorFlow's own functions: the model opens without this project, and
trains on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from compress.candidate import Calibration
from compress.data.untuned import in_batches
from compress.deploy.ranges import Histogram, choose
from compress.graph.kernels import kernel_attributes
from compress.graph.rewrite import calls, rewrite

_BINS = 1024


class InputRounding(ABC):
    """How one layer's input is rounded."""

    @abstractmethod
    def __call__(self, value: Any) -> Any:
        """Return the rounded Keras tensor."""

    @abstractmethod
    def settle(self, model: tf_keras.Model) -> None:
        """Give the layers that the call has put into ``model`` the statistics they start from."""


@dataclass(frozen=True)
class SignInput(InputRounding):
    """The signs of the normalised input, times the mean size of the sample's values.

    A batch norm comes first: behind a ReLU there are no other signs. The paper's mean is taken in each window; here it
    is the sample's, which the convolution passes through unchanged.
    """

    layer: str
    mean: np.ndarray
    variance: np.ndarray

    def __call__(self, value: Any) -> Any:
        """Return the signs."""
        normed = tf_keras.layers.BatchNormalization(center=False, scale=False, name=self._norm)(value)
        inside = tf.clip_by_value(normed, -1.0, 1.0)
        # A sign of its own for zero would be a third level.
        signs = inside + tf.stop_gradient(tf.sign(normed + 1e-12) - inside)
        return signs * tf.reduce_mean(tf.abs(normed), list(range(1, len(value.shape))), keepdims=True)

    def settle(self, model: tf_keras.Model) -> None:
        """Set the statistics of the batch norm."""
        norm = model.get_layer(self._norm)
        norm.moving_mean.assign(self.mean)
        norm.moving_variance.assign(self.variance)

    @property
    def _norm(self) -> str:
        return f"{self.layer}_input_norm"


@dataclass(frozen=True)
class UniformInput(InputRounding):
    """The nearest of ``2**bits`` levels between ``low`` and ``high``."""

    low: float
    high: float
    bits: int

    def __call__(self, value: Any) -> Any:
        """Return the levels."""
        step = (self.high - self.low) / (2**self.bits - 1)
        inside = tf.clip_by_value(value, self.low, self.high)
        rounded = tf.round((inside - self.low) * (1.0 / step)) * step + self.low
        return inside + tf.stop_gradient(rounded - inside)

    def settle(self, model: tf_keras.Model) -> None:
        """Nothing: there are no layers with weights."""


def with_rounded_inputs(model: tf_keras.Model, roundings: Mapping[str, InputRounding]) -> tf_keras.Model:
    """Return a copy of the flat model in which the inputs of the named layers, each called once, are rounded."""

    def edit(rounding: InputRounding) -> Any:
        def change(args: list[Any], kwargs: dict[str, Any]) -> None:
            args[0] = rounding(args[0])

        return change

    result = rewrite(model, arguments={(name, 0): edit(rounding) for name, rounding in roundings.items()})
    for rounding in roundings.values():
        rounding.settle(result)
    return result


def once_called(model: tf_keras.Model, names: Collection[str]) -> list[str]:
    """Return those of the layers that have a kernel and a single input: shared ones have several."""
    times = calls(model)
    return [
        layer.name
        for layer in model.layers
        if layer.name in names and kernel_attributes(layer) and times[layer.name] == 1
    ]


def sign_inputs(model: tf_keras.Model, layers: Sequence[str], samples: np.ndarray) -> dict[str, InputRounding]:
    """Return for each layer the signs of its input, normalised as it is on the samples [n, ...]."""
    found: dict[str, InputRounding] = {}
    for name, values in _inputs(model, layers, samples):
        flat = values.reshape(-1, values.shape[-1])
        found[name] = SignInput(name, flat.mean(0, dtype=np.float64), flat.var(0, dtype=np.float64))
    return found


def uniform_inputs(
    model: tf_keras.Model, layers: Sequence[str], samples: np.ndarray, bits: int
) -> dict[str, InputRounding]:
    """Return for each layer the levels with the least squared error from its input on the samples [n, ...]."""
    found: dict[str, InputRounding] = {}
    for name, values in _inputs(model, layers, samples):
        counts, edges = np.histogram(values, _BINS)
        histogram = Histogram(float(edges[0]), float(edges[-1]), counts, (edges[1:] + edges[:-1]) / 2)
        low, high = choose(histogram, Calibration(ranges="mse"), 2**bits)
        found[name] = UniformInput(low, max(high, low + 1e-6), bits)
    return found


def _inputs(model: tf_keras.Model, layers: Sequence[str], samples: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    for name in layers:
        # One at a time: all of a large network's at once would not fit.
        look = tf_keras.Model(model.inputs, model.get_layer(name).input)
        yield name, np.asarray(look.predict(in_batches(samples, 64), verbose=0))
