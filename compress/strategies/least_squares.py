"""Closed-form repair: least squares on what a layer reads and should give, and elimination of what costs least.

Sources: Hassibi and Stork, Second Order Derivatives for Network Pruning (NIPS 1992), for the elimination step; He et
al., Channel Pruning (arXiv 1707.06168), for re-solving the layer that reads what is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
import tf_keras
from scipy.linalg import cho_factor, cho_solve

MOST_ROWS = 5000
"""Layers with more inputs for each output than this are left as they are: their moments would not fit."""
_MOST_PLACES = 400_000


@dataclass(frozen=True)
class Moments:
    """Second moments of a linear layer's inputs (with a constant 1 at the end) and of its targets.

    ``inputs`` [d + 1, d + 1] is the mean of x x^T, ``cross`` [d + 1, outputs] that of x t^T.
    """

    inputs: np.ndarray
    cross: np.ndarray


def is_linear(layer: tf_keras.layers.Layer) -> bool:
    """Say whether a layer is a Dense or an ordinary Conv2D, small enough to be solved for."""
    kinds = tf_keras.layers
    # Exactly these: a class derived from one may do something else with its kernel.
    if type(layer) is kinds.Conv2D:
        fits = layer.groups == 1 and layer.data_format == "channels_last"
        return fits and int(np.prod(layer.kernel.shape[:-1])) <= MOST_ROWS
    return type(layer) is kinds.Dense and layer.kernel.shape[0] <= MOST_ROWS


def matrix_of(layer: tf_keras.layers.Layer) -> np.ndarray:
    """Return kernel and bias as one matrix [d + 1, outputs] in double precision."""
    kernel = np.asarray(layer.kernel, np.float64)
    bias = np.asarray(layer.bias, np.float64) if layer.use_bias else np.zeros(kernel.shape[-1])
    return np.concatenate([kernel.reshape(-1, kernel.shape[-1]), bias[None]])


def assign_matrix(layer: tf_keras.layers.Layer, matrix: np.ndarray) -> None:
    """Write a matrix [d + 1, outputs] into the layer's kernel and bias."""
    layer.kernel.assign(matrix[:-1].reshape(layer.kernel.shape))
    if layer.use_bias:
        layer.bias.assign(matrix[-1])


def rows_of(layer: tf_keras.layers.Layer, x: np.ndarray) -> tf.Tensor:
    """Return what each output value of the layer is a weighted sum of: [samples, ..., d]."""
    if isinstance(layer, tf_keras.layers.Dense):
        return tf.convert_to_tensor(x)
    height, width = layer.kernel_size
    return tf.image.extract_patches(
        x,
        [1, height, width, 1],
        [1, *layer.strides, 1],
        [1, *layer.dilation_rate, 1],
        layer.padding.upper(),
    )


def moments(
    layer: tf_keras.layers.Layer,
    x: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    known: Moments | None = None,
    rows: Callable[[tf_keras.layers.Layer, np.ndarray], tf.Tensor] = rows_of,
    batch: int = 64,
) -> Moments:
    """Stream the moments of a layer over samples ``x`` with ``targets`` [samples, ..., outputs].

    ``weights`` [samples, ...] says how much each place counts. Of large maps only the first samples are taken, so many
    that there are enough places. ``known``: moments of the same inputs with other targets; the inputs' are taken over.
    ``rows`` says what an output value is a weighted sum of, where it is not :func:`rows_of`.
    """
    places = int(np.prod(targets.shape[1:-1], dtype=np.int64))
    samples = min(len(x), max(batch, _MOST_PLACES // max(places, 1)))
    size = int(np.prod(layer.kernel.shape[:-1])) + 1
    inputs, cross, total = np.zeros((size, size)), np.zeros((size, targets.shape[-1])), 0.0
    for start in range(0, samples, batch):
        part = slice(start, min(start + batch, samples))
        # In single precision rounding would exceed the ridge, and the sum would not be positive definite.
        read = tf.cast(tf.reshape(rows(layer, x[part]), [-1, size - 1]), tf.float64)
        read = tf.concat([read, tf.ones([tf.shape(read)[0], 1], tf.float64)], 1)
        wanted = tf.reshape(tf.constant(targets[part], tf.float64), [-1, targets.shape[-1]])
        weighted = read
        if weights is not None:
            weighted = read * tf.reshape(tf.constant(weights[part], tf.float64), [-1, 1])
        if known is None:
            inputs += tf.matmul(weighted, read, transpose_a=True).numpy()
        cross += tf.matmul(weighted, wanted, transpose_a=True).numpy()
        total += float(read.shape[0])
    if not layer.use_bias:
        # There is no bias to solve for: the constant is tied to nothing.
        inputs[-1], inputs[:, -1], cross[-1] = 0.0, 0.0, 0.0
        inputs[-1, -1] = total
    return Moments(inputs / total if known is None else known.inputs, cross / total)


def solve(known: Moments, before: np.ndarray, ridge: float, left: np.ndarray | None = None) -> np.ndarray:
    """Return the matrix [d + 1, outputs] with the least squared error, drawn towards ``before``.

    Args:
        known: the moments.
        before: the matrix to be near to, [d + 1, outputs].
        ridge: how strongly, relative to the mean of the inputs' squares.
        left: which of the d inputs there are, [d] booleans, or for each output, [d, outputs]; the others become zero.
    """
    if left is not None and left.ndim == 2:
        start = np.where(np.vstack([left, np.ones((1, left.shape[1]), bool)]), before, 0.0)
        parts = [
            solve(Moments(known.inputs, known.cross[:, [o]]), start[:, [o]], ridge, left[:, o])
            for o in range(left.shape[1])
        ]
        return np.concatenate(parts, 1)
    size = len(before)
    use = np.append(np.ones(size - 1, bool) if left is None else left, True)
    gram = known.inputs[np.ix_(use, use)]
    strength = ridge * max(float(np.mean(np.diag(known.inputs)[:-1])), 1e-12)
    penalty = np.full(len(gram), strength)
    penalty[-1] = strength * 1e-3
    start = before[use]
    step = cho_solve(cho_factor(gram + np.diag(penalty)), known.cross[use] - gram @ start)
    result = np.zeros_like(before)
    result[use] = start + step
    return result


def eliminate(
    known: Moments, units: np.ndarray, metric: np.ndarray | None = None, ridge: float = 1e-4
) -> tuple[np.ndarray, np.ndarray]:
    """Remove groups of inputs one after the other, each time the one that costs the least after a re-solve.

    Args:
        known: the moments.
        units: rows of the inputs that go together, [units, rows of each].
        metric: what errors of the outputs mean together, [outputs, outputs]; all the same if None.
        ridge: relative to the mean of the inputs' squares.

    Returns:
        The order in which units go [units], and the squared error after each [units].
    """
    strength = ridge * max(float(np.mean(np.diag(known.inputs)[:-1])), 1e-12)
    penalty = np.append(np.full(len(known.inputs) - 1, strength), strength * 1e-3)
    inverse = np.linalg.inv(known.inputs + np.diag(penalty))
    cross = known.cross
    if metric is not None:
        values, vectors = np.linalg.eigh(metric)
        cross = cross @ (vectors * np.sqrt(np.maximum(values, 0)))
    solution = inverse @ cross
    alive = np.arange(len(units))
    order, errors, total = [], [], 0.0
    small = 1e-12 * np.eye(units.shape[1])
    for _ in range(len(units)):
        rows = units[alive]
        blocks = inverse[rows[:, :, None], rows[:, None, :]] + small * np.trace(inverse) / len(inverse)
        parts = solution[rows]
        repaired = np.linalg.solve(blocks, parts)
        costs = np.einsum("urt,urt->u", parts, repaired)
        best = int(np.argmin(costs))
        total += float(max(costs[best], 0.0))
        gone = rows[best]
        columns = inverse[:, gone]
        solution = solution - columns @ repaired[best]
        inverse = inverse - columns @ np.linalg.solve(blocks[best], columns.T)
        inverse[gone], inverse[:, gone], solution[gone] = 0, 0, 0
        order.append(int(alive[best]))
        errors.append(total)
        alive = np.delete(alive, best)
    return np.array(order), np.array(errors)
