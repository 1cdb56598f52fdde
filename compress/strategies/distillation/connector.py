"""What is trained beside a student so that its features can be compared with those of a teacher that has others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf


def flat(features: tf.Tensor) -> tf.Tensor:
    """Return features [b, ...] as vectors [b, d]."""
    return tf.reshape(features, [tf.shape(features)[0], -1]) if features.shape.rank != 2 else features


class Connector:
    """A linear map of features as vectors, or a convolution of maps [b, h, w, c] without padding.

    It starts as the identity where that is possible and asked for, else as drawn by Glorot and Bengio's rule.
    """

    def __init__(
        self, inputs: int, outputs: int, seed: int, *, kernel: Sequence[int] = (), identity: bool = False
    ) -> None:
        """Make the variables; ``kernel``: its height and width for maps, nothing for vectors."""
        area = int(np.prod(kernel))
        limit = float(np.sqrt(6.0 / (area * (inputs + outputs))))
        shape = [*kernel, inputs, outputs]
        if identity and inputs == outputs and area == 1:
            start = tf.reshape(tf.eye(inputs), shape)
        else:
            start = tf.random.stateless_uniform(shape, [seed, inputs * outputs], -limit, limit)
        self.kernel = tf.Variable(start, name="connector_kernel")
        self.bias = tf.Variable(tf.zeros(outputs), name="connector_bias")
        self.variables: Sequence[tf.Variable] = (self.kernel, self.bias)

    def __call__(self, features: tf.Tensor) -> tf.Tensor:
        """Return the features mapped."""
        if self.kernel.shape.rank == 2:
            return tf.matmul(flat(features), self.kernel) + self.bias
        return tf.nn.conv2d(features, self.kernel, 1, "VALID") + self.bias
