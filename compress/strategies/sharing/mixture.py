"""A mixture of Gaussians as the prior of a network's weights, learned with them.

Sources: Nowlan and Hinton, Simplifying Neural Networks by Soft Weight-Sharing (Neural Computation 1992); Ullrich,
Meeds, Welling, Soft Weight-Sharing for Neural Network Compression (arXiv 1702.04008, section 3 and appendix A).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from compress.data.source import Data
from compress.training_step import Batch

_FITTING_STEPS = 30
_PLACES = 8192
"""On the line from the smallest weight to the largest: far more than fit into a component's width."""


class MixturePrior:
    """The loss term ``strength / samples * -log p(weights, mixture)``.

    One component is fixed: its mean is zero, and its share of the weights is given. Means, widths and shares of the
    others, and its width, are trained. Gamma priors on the precisions draw the widths towards one that is small beside
    the weights' own spread; they count as much as ``certainty`` times the weights that a component expects to have.

    The mixture's variables occur nowhere else in the loss, so its strength does not change where they tend to. They are
    given natural gradients: a step of rate one would be a step of expectation maximisation.

    Args:
        weights: what the prior is of, with a spread other than zero.
        components: of the mixture besides the one at zero.
        zeros: share of the one at zero.
        width: standard deviation of a component that the priors expect, relative to that of the weights.
        certainty: of the priors.
        strength: of the whole term: 1 makes the loss a posterior.
    """

    task_weight = 1.0
    layers: Sequence[str] = ()

    def __init__(
        self,
        weights: Sequence[tf.Variable],
        components: int,
        *,
        zeros: float,
        width: float,
        certainty: float,
        strength: float,
    ) -> None:
        self._weights, self._strength, self._scale = list(weights), strength, 0.0
        flat = self._flat().numpy()
        self._spread = float(flat.std())
        self._zeros, self._width = zeros, np.float32(width)
        expected = np.append(zeros, np.full(components, (1 - zeros) / components))
        self._pseudo = (certainty * flat.size * expected).astype(np.float32)
        # Even numbers of them lie symmetrically, none on the one at zero.
        low, high = flat.min() / self._spread, flat.max() / self._spread
        self._means = tf.Variable(np.linspace(low, high, components), dtype=tf.float32, name="means")
        between = max((high - low) / max(components - 1, 1) / 2, width)
        self._widths = tf.Variable(np.log(np.append(width, np.full(components, between))), dtype=tf.float32)
        self._shares = tf.Variable(tf.zeros(components), name="shares")
        self.variables: Sequence[tf.Variable] = [self._means, self._widths, self._shares]
        for _ in range(_FITTING_STEPS):
            self._fit()

    def prepare(self, data: Data, batch_size: int, *, same_images: bool) -> None:
        """Note how many samples the task loss is the mean of."""
        self._scale = self._strength / len(data.train)

    def __call__(self, batch: Batch) -> tf.Tensor:
        """Return the complexity of the weights."""
        return self._complexity(self._scale)

    def component_of(self, weights: np.ndarray) -> np.ndarray:
        """Return which component each weight [...] most likely comes from; 0 is the one at zero."""
        flat = tf.constant(weights.reshape(-1) / self._spread, tf.float32)
        likely = tf.argmax(self._densities(flat, *self.variables), 1)
        return np.asarray(likely).reshape(weights.shape)

    def values(self) -> np.ndarray:
        """Return the components' means [1 + components]; the first is zero."""
        return np.append(np.float32(0), self._means.numpy() * np.float32(self._spread))

    def _flat(self) -> tf.Tensor:
        return tf.concat([tf.reshape(weight, [-1]) for weight in self._weights], 0)

    def _densities(self, flat: tf.Tensor, means: tf.Tensor, widths: tf.Tensor, shares: tf.Tensor) -> tf.Tensor:
        """Return log density times share of each weight [n] and component [1 + components], up to a constant."""
        rest = np.log1p(-self._zeros) + tf.nn.log_softmax(shares)
        parts = tf.concat([tf.constant([np.log(self._zeros)], tf.float32), rest], 0)
        centres = tf.concat([[0.0], means], 0)
        return parts - widths - 0.5 * ((flat[:, None] - centres) * tf.exp(-widths)) ** 2

    def _complexity(self, scale: float) -> tf.Tensor:
        """Return ``scale`` times minus the log of the posterior density of weights and mixture.

        The gradient of the weights is that of this value, those of the mixture's variables are natural ones, whatever
        the scale: they come with differences that are zero. (A gradient that TensorFlow is told of is registered for
        good, and the compiled step with it.)
        """
        weights, variables = self._flat() / self._spread, [variable.value() for variable in self.variables]
        flat, (means, widths, shares) = tf.stop_gradient(weights), [tf.stop_gradient(value) for value in variables]
        # Which components a weight belongs to depends on its size alone: that is computed for places on a line.
        low, high = tf.reduce_min(flat), tf.reduce_max(flat)
        step = tf.maximum((high - low) / (_PLACES - 1), 1e-12)
        centres = low + step * tf.range(_PLACES, dtype=tf.float32)
        place = tf.cast(tf.round((flat - low) / step), tf.int32)
        offset = flat - tf.gather(centres, place)
        count = tf.math.bincount(place, minlength=_PLACES, maxlength=_PLACES, dtype=tf.float32)[:, None]
        offsets = tf.math.unsorted_segment_sum(offset, place, _PLACES)[:, None]
        squares = tf.math.unsorted_segment_sum(offset**2, place, _PLACES)[:, None]
        densities = self._densities(centres, means, widths, shares)
        belongs = tf.nn.softmax(densities)
        away = centres[:, None] - tf.concat([[0.0], means], 0)
        precisions = tf.exp(-2.0 * widths)
        slope, bend = (tf.reduce_sum(belongs * part * precisions, 1) for part in (away, tf.ones_like(away)))
        # The Gamma density of a precision whose mode is the width that is expected.
        prior = -self._pseudo * (widths + 0.5 * (self._width * tf.exp(-widths)) ** 2)
        likelihoods = tf.reduce_logsumexp(densities, 1) * count[:, 0] - slope * offsets[:, 0]
        value = -tf.reduce_sum(likelihoods) - tf.reduce_sum(prior)

        of_weights = tf.gather(slope, place) + tf.gather(bend, place) * offset
        members = tf.reduce_sum(belongs * count, 0)
        distances = tf.reduce_sum(belongs * (away * count + offsets), 0)
        variances = tf.reduce_sum(belongs * (away**2 * count + 2.0 * away * offsets + squares), 0)
        of_means = -distances[1:] / (members[1:] + 1.0)
        counts = members + self._pseudo
        variances += self._pseudo * self._width**2
        of_widths = (counts - variances * precisions) / (2.0 * counts)
        expected = tf.nn.softmax(shares) * tf.reduce_sum(members[1:])
        of_shares = (expected - members[1:]) / (expected + 1.0)
        natural = zip(variables, (means, widths, shares), (of_means, of_widths, of_shares), strict=True)
        result = scale * (value + tf.reduce_sum((weights - flat) * of_weights))
        return result + tf.add_n([tf.reduce_sum((live - held) * slope_of) for live, held, slope_of in natural])

    def _fit(self) -> None:
        """Make a step of expectation maximisation, damped where it would go far."""
        with tf.GradientTape() as tape:
            value = self._complexity(1.0)
        for variable, gradient in zip(self.variables, tape.gradient(value, self.variables), strict=True):
            variable.assign_sub(tf.clip_by_value(gradient, -1.0, 1.0))
