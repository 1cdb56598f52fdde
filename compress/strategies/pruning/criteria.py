"""Criteria that score single weights once, before any training: each a small class; the lowest scores go first.

Those that look at the network before it is trained (SNIP, GraSP, SynFlow) are as well defined on a trained one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import tensorflow as tf
import tf_keras

from compress.data.source import Data
from compress.errors import CompressError
from compress.graph.kernels import get_variable
from compress.graph.rewrite import NewLayer, rewrite
from compress.graph.softmax import gives_probabilities, logits_of
from compress.strategies.pruning.gradients import require_gradients, require_labels
from compress.strategies.pruning.masks import GONE, Masking

_BATCH = 128
_ROUNDS = 100
"""Of SynFlow."""
_TEMPERATURE = 200.0
"""Of GraSP."""


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at: the model, labelled samples, and how its scores will become masks."""

    model: tf_keras.Model
    kernels: Sequence[str]
    """Names of the kernels to score."""
    data: Data
    seed: int
    images: int
    masking: Masking
    sparsity: float
    stage: str

    @cached_property
    def variables(self) -> list[tf.Variable]:
        """The kernels."""
        return [get_variable(self.model, name) for name in self.kernels]

    @cached_property
    def values(self) -> list[np.ndarray]:
        """Values of the kernels."""
        return [np.asarray(variable) for variable in self.variables]

    def gradients(self, temperature: float = 1.0) -> list[np.ndarray]:
        """Return the gradient of the mean cross-entropy, of logits over ``temperature``, by each kernel.

        Raises:
            CompressError: if the labels or the gradients say nothing.
        """
        found = self._mean(lambda x, y: self._loss(x, y, temperature))
        require_gradients(found, f"strategy.{self.stage}.criterion")
        return found

    def hessian_times(self, vectors: Sequence[np.ndarray], temperature: float = 1.0) -> list[np.ndarray]:
        """Return the product of the loss's Hessian by all kernels with ``vectors``, one for each kernel."""
        constants = [tf.constant(vector, tf.float32) for vector in vectors]

        def slope(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
            with tf.GradientTape(watch_accessed_variables=False) as inner:
                inner.watch(self.variables)
                loss = self._loss(x, y, temperature)
            first = inner.gradient(loss, self.variables, unconnected_gradients="zero")
            return tf.add_n([tf.reduce_sum(g * v) for g, v in zip(first, constants, strict=True)])

        return self._mean(slope)

    def _loss(self, x: tf.Tensor, y: tf.Tensor, temperature: float) -> tf.Tensor:
        logits = logits_of(self.model(x, training=False), gives_probabilities(self.model)) / temperature
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits))

    def _mean(self, scalar: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]) -> list[np.ndarray]:
        """Return the gradient of ``scalar``, which is a mean over samples, by each kernel."""

        def gradient(x: tf.Tensor, y: tf.Tensor) -> list[tf.Tensor]:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(self.variables)
                value = scalar(x, y)
            found = tape.gradient(value, self.variables, unconnected_gradients="zero")
            return [tf.convert_to_tensor(part) for part in found]

        compiled = tf.function(gradient, reduce_retracing=True)
        sums, count = [np.zeros(v.shape) for v in self.variables], 0
        for x, y in self._batches():
            count += len(x)
            for total, value in zip(sums, compiled(x, y), strict=True):
                total += np.asarray(value, np.float64) * len(x)
        return [total / count for total in sums]

    def _batches(self) -> Iterable[tuple[tf.Tensor, tf.Tensor]]:
        train = self.data.train
        chosen = np.random.default_rng(self.seed).permutation(len(train))[: self.images]
        require_labels(train.y[chosen], f"strategy.{self.stage}.criterion")
        samples = tf.data.Dataset.from_tensor_slices((train.x[chosen].astype(np.float32), train.y[chosen]))
        return samples.batch(_BATCH)


class Criterion(ABC):
    """Scores single weights."""

    ranking: Literal["layer", "global"] = "layer"
    """What its paper compares with what."""

    @abstractmethod
    def scores(self, evidence: Evidence) -> list[np.ndarray]:
        """Return a score for each weight of each kernel, in the kernel's shape.

        Raises:
            CompressError: if there is nothing to score by.
        """


class Magnitude(Criterion):
    """Absolute values (Han et al., arXiv 1506.02626)."""

    def scores(self, evidence: Evidence) -> list[np.ndarray]:
        """Take them."""
        return [np.abs(value) for value in evidence.values]


class Random(Criterion):
    """By chance: what every other criterion must beat."""

    def scores(self, evidence: Evidence) -> list[np.ndarray]:
        """Draw."""
        rng = np.random.default_rng(evidence.seed)
        return [rng.random(value.shape) for value in evidence.values]


class Snip(Criterion):
    """Connection sensitivity |w dL/dw| (SNIP, Lee et al., arXiv 1810.02340, equations 4 and 5). Needs labels."""

    ranking = "global"

    def scores(self, evidence: Evidence) -> list[np.ndarray]:
        """Multiply. The paper's division by the sum over all weights changes no ranking."""
        return [np.abs(w * g) for w, g in zip(evidence.values, evidence.gradients(), strict=True)]


class Grasp(Criterion):
    """What a weight does for the gradient flow, w (H g) (GraSP, Wang et al., arXiv 2002.07376, equation 8).

    Needs labels. The paper removes the weights with the highest -w (H g), whose loss costs the least flow or adds to
    it; and divides logits by 200 so that no sample is already right.
    """

    ranking = "global"

    def scores(self, evidence: Evidence) -> list[np.ndarray]:
        """Multiply."""
        flow = evidence.hessian_times(evidence.gradients(_TEMPERATURE), _TEMPERATURE)
        return [w * h for w, h in zip(evidence.values, flow, strict=True)]


class SynFlow(Criterion):
    """Synaptic flow |w| dR/d|w|, R = 1' prod |W| 1 (Tanaka et al., arXiv 2006.05467, algorithm 1). Needs no data.

    Scored anew in 100 rounds while the share of the weights that is left falls exponentially, so that no layer dies.
    """

    ranking = "global"

    def scores(self, evidence: Evidence) -> list[np.ndarray]:
        """Return the scores of the last round; what went in an earlier one is gone."""
        network = linear_network(evidence.model)
        variables = [get_variable(network, name) for name in evidence.kernels]

        def flow(ones: tf.Tensor) -> list[tf.Tensor]:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(variables)
                total = tf.reduce_sum(network(ones, training=False))
            found: Any = tape.gradient(total, variables, unconnected_gradients="zero")
            return [v * tf.convert_to_tensor(g) for v, g in zip(variables, found, strict=True)]

        compiled = tf.function(flow)
        ones = tf.ones([1, *(size or 1 for size in network.inputs[0].shape[1:])], tf.float64)
        masks = [value != 0 for value in evidence.values]
        for step in range(1, _ROUNDS + 1):
            found = [np.asarray(score) for score in compiled(ones)]
            if not all(np.isfinite(score).all() for score in found):
                raise CompressError(
                    f"strategy.{evidence.stage}.criterion",
                    expected="a flow that is a finite number",
                    received="synflow on a model so deep that it overflows",
                    fix=f"Write strategy.{evidence.stage}.criterion=snip or magnitude.",
                )
            # A weight that nothing flows through, as nothing reads its output any more, is as good as gone.
            scores = [np.where(mask & (score > 0), score, GONE) for mask, score in zip(masks, found, strict=True)]
            left = evidence.masking.masks(scores, 1 - (1 - evidence.sparsity) ** (step / _ROUNDS))
            masks = [mask & kept for mask, kept in zip(masks, left, strict=True)]
            for variable, mask in zip(variables, masks, strict=True):
                variable.assign(np.where(mask, variable, 0.0))
        return scores


def linear_network(model: tf_keras.Model) -> tf_keras.Model:
    """Return the network of absolute weights, without activations and shifts, in double precision.

    It computes the flow of SynFlow's equation: products of absolute values. Activations let positive numbers pass as
    they are; those that would not (a softmax, a sigmoid) are no part of it, nor are shifts and the preprocessing.
    """
    replacements: dict[str, list[NewLayer]] = {}
    for layer in model.layers:
        name = str(getattr(getattr(layer, "function", None), "__name__", ""))
        if isinstance(layer, _PASSED) or name in _PASSED_OPERATIONS:
            replacements[layer.name] = []
        elif not isinstance(layer, tf_keras.layers.InputLayer) and not hasattr(layer, "function"):
            config = {**layer.get_config(), "dtype": "float64"}
            if "activation" in config:
                config["activation"] = "linear"
            weights = [
                np.zeros_like(value) if _is_shift(weight) else np.abs(value)
                for weight, value in zip(layer.weights, layer.get_weights(), strict=True)
            ]
            replacements[layer.name] = [NewLayer(layer.__class__.from_config(config), tuple(weights))]
    return rewrite(model, replacements)


_PASSED = (
    tf_keras.layers.Activation,
    tf_keras.layers.ReLU,
    tf_keras.layers.LeakyReLU,
    tf_keras.layers.PReLU,
    tf_keras.layers.ELU,
    tf_keras.layers.ThresholdedReLU,
    tf_keras.layers.Softmax,
    tf_keras.layers.Rescaling,
    tf_keras.layers.Normalization,
)
_PASSED_OPERATIONS = ("relu", "relu6", "leaky_relu", "elu", "selu", "gelu", "swish", "sigmoid", "tanh", "softmax_v2")


def _is_shift(weight: tf.Variable) -> bool:
    return weight.name.rpartition("/")[2].partition(":")[0] in ("bias", "beta", "moving_mean")


def criteria() -> dict[str, Criterion]:
    """Return the criteria by the names that a configuration calls them."""
    return {
        "magnitude": Magnitude(),
        "random": Random(),
        "snip": Snip(),
        "grasp": Grasp(),
        "synflow": SynFlow(),
    }
