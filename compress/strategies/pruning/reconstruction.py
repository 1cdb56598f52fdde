"""Reconstruction: the cut and the repair of a network as one closed-form problem, without labels or gradient steps.

Layer after layer, original and cut network are run side by side on calibration samples. Where a layer reads channels
that may go, second-order elimination (Hassibi and Stork, 1992) takes out those that cost least after a re-solve; then
the layer is re-solved by least squares so that what it gives, or the sum that it is added to, is again that of the
*original* network, which makes up for all errors before it. How many channels each group keeps follows from the
measured change of the logits per multiply-add saved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import tensorflow as tf
import tf_keras
from scipy.interpolate import PchipInterpolator

from compress.graph.channels.groups import Channels, Group
from compress.graph.fold import fold_batch_norm, foldable_pairs
from compress.graph.rewrite import consumers, copy_model
from compress.graph.walk import Step, Walk
from compress.progress import progress
from compress.strategies.least_squares import Moments, assign_matrix, eliminate, is_linear, matrix_of, moments, solve

_LOG = logging.getLogger("compress")
_LEVELS = (7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16)
_RIDGE, _REPAIR_RIDGE = 1e-4, 1e-3
_SENSITIVITY_SAMPLES = 256
_CLIP = (0.05, 20.0)


@dataclass(frozen=True)
class Importance:
    """What errors at a layer's output mean for the logits: for places [samples, ...], for outputs together [c, c]."""

    places: np.ndarray
    metric: np.ndarray


@dataclass(frozen=True)
class Cuttable:
    """A group that one layer writes and one linear layer reads, and its units' rows in that layer's matrix."""

    group: Group
    reader: str
    rows: np.ndarray


@dataclass(frozen=True)
class Curve:
    """Change of the logits (mean squared) when a group keeps 1, 2, ... of its units."""

    errors: np.ndarray


@dataclass
class Reconstruction:
    """The original, prepared: batch norms folded, groups found, and what errors mean.

    ``samples``: calibration inputs, unlabelled.
    """

    model: tf_keras.Model
    samples: np.ndarray
    seed: int
    names: frozenset[str]
    folded: tf_keras.Model = field(init=False)
    channels: Channels = field(init=False)
    cuttable: list[Cuttable] = field(init=False)

    def __post_init__(self) -> None:
        self.folded = fold_batch_norm(self.model)
        self.channels = Channels(self.folded)
        found = (_cuttable(self.folded, group, self.names) for group in self.channels.groups)
        self.cuttable = [item for item in found if item is not None]
        self._sums = _sums(self.folded)
        self._importance: dict[str, Importance] = {}

    def prepare(self) -> None:
        """Measure what errors of each layer's output mean for the logits."""
        readers = {item.reader for item in self.cuttable}
        self._importance = _importances(self.folded, self.samples, readers, self._sums, self.seed)

    def curves(self) -> list[Curve]:
        """Return, for each cuttable group, the change of the logits over the number of units kept."""
        by_reader = {item.reader: number for number, item in enumerate(self.cuttable)}
        curves: list[Curve | None] = [None] * len(self.cuttable)
        walk = Walk(self.folded, copy_model(self.folded), self.samples)
        few = min(_SENSITIVITY_SAMPLES, len(self.samples))
        wanted = _outputs(self.folded, self.samples[:few])
        with progress("channel sensitivity") as shown:
            for step in walk:
                number = by_reader.get(step.layer.name)
                if number is None:
                    continue
                item = self.cuttable[number]
                known, before = self._moments(step, None), matrix_of(step.layer)
                order, _ = eliminate(known, item.rows, self._importance[item.reader].metric, _RIDGE)
                points = {len(item.group): 0.0}
                for level in _LEVELS:
                    count = max(1, round(level * len(item.group)))
                    if count in points:
                        continue
                    assign_matrix(step.layer, self._solved(known, before, item, order[len(order) - count :]))
                    outputs = walk.run(step.node, step.layer, _few(walk.values, few))
                    logits = walk.rest(step.position, outputs, few)
                    points[count] = float(np.mean((logits - wanted) ** 2))
                # The walk goes on as the original.
                assign_matrix(step.layer, before)
                curves[number] = _curve(points, len(item.group))
                shown.advance(sum(curve is not None for curve in curves), len(curves), item.group.name)
        return [curve for curve in curves if curve is not None]

    def run(self, keep: Sequence[int]) -> tuple[tf_keras.Model, np.ndarray]:
        """Cut every cuttable group to ``keep`` units and repair the network.

        Returns:
            A model of the original's structure, repaired, that ignores the channels that go; and the units that stay.
        """
        by_reader = {item.reader: (item, count) for item, count in zip(self.cuttable, keep, strict=True)}
        stay = np.ones(self.channels.count, bool)
        changed = copy_model(self.folded)
        with progress("reconstruction") as shown:
            for step in (walk := Walk(self.folded, changed, self.samples)):
                shown.advance(step.position + 1, len(walk.nodes), step.layer.name)
                if not is_linear(step.layer) or not _once(walk, step):
                    continue
                chosen = by_reader.get(step.layer.name)
                if chosen is None and step.untouched:
                    continue
                before, target = matrix_of(step.layer), self._target(walk, step)
                known = self._moments(step, target)
                if chosen is None:
                    assign_matrix(step.layer, solve(known, before, _REPAIR_RIDGE))
                    continue
                item, count = chosen
                metric = self._importance[item.reader].metric if item.reader in self._importance else None
                order, _ = eliminate(known, item.rows, metric, _RIDGE)
                stay[item.group.units[order[: len(order) - count]]] = False
                assign_matrix(step.layer, self._solved(known, before, item, order[len(order) - count :]))
        return self._with_norms(changed), stay

    def _solved(self, known: Moments, before: np.ndarray, item: Cuttable, kept: np.ndarray) -> np.ndarray:
        left = np.zeros(len(before) - 1, bool)
        left[item.rows[kept].ravel()] = True
        return solve(known, np.where(np.append(left, True)[:, None], before, 0.0), _RIDGE, left)

    def _moments(self, step: Step, target: np.ndarray | None) -> Moments:
        weight = self._importance.get(step.layer.name)
        wanted = _linear_output(step.node.layer, step.inputs[0]) if target is None else target
        return moments(step.layer, step.changed_inputs[0], wanted, None if weight is None else weight.places)

    def _target(self, walk: Walk, step: Step) -> np.ndarray:
        """Return what the layer should give: so much that the sum it is added to is that of the original."""
        own = _linear_output(step.node.layer, step.inputs[0])
        others = self._sums.get(step.layer.name, ())
        for tensor in others:
            if tensor in walk.values and tensor in walk.changed_values:
                own = own + (walk.values[tensor] - walk.changed_values[tensor])
        return own

    def _with_norms(self, changed: tf_keras.Model) -> tf_keras.Model:
        """Return the repaired network with its batch norms, their statistics measured anew."""
        pairs = foldable_pairs(self.model)
        result = copy_model(self.model)
        look = tf_keras.Model(changed.inputs, [changed.get_layer(name).output for name in pairs])
        sums = [np.zeros((2, changed.get_layer(name).output_shape[-1])) for name in pairs]
        batches = 0
        for start in range(0, len(self.samples), 128):
            batches += 1
            for total, output in zip(sums, tf.nest.flatten(look(self.samples[start : start + 128])), strict=True):
                axes = list(range(output.shape.rank - 1))
                total += np.stack([tf.reduce_mean(output, axes), tf.reduce_mean(output**2, axes)])
        for layer in result.layers:
            if layer.name in pairs or not layer.weights or layer.name in pairs.values():
                continue
            layer.set_weights(changed.get_layer(layer.name).get_weights())
        for (name, norm_name), total in zip(pairs.items(), sums, strict=True):
            source, layer, norm = changed.get_layer(name), result.get_layer(name), result.get_layer(norm_name)
            bias = np.asarray(source.bias)
            mean, square = total / batches
            variance = np.maximum(square - mean**2, 1e-8)
            kernel = np.asarray(source.weights[0])
            layer.weights[0].assign(kernel)
            if layer.use_bias:
                layer.bias.assign(bias)
            # Its output is again kernel and bias of the folded layer, whatever the statistics are.
            values = {
                "moving_mean": mean - (0 if layer.use_bias else bias),
                "moving_variance": variance,
                "gamma": np.sqrt(variance + norm.epsilon),
                "beta": mean,
            }
            for attribute, value in values.items():
                variable = getattr(norm, attribute)
                if variable is not None:
                    variable.assign(value)
        return result


def allocate(
    curves: Sequence[Curve],
    sizes: Sequence[int],
    cost: Callable[[Sequence[int]], float],
    budget: float,
    least: Sequence[int],
) -> list[int]:
    """Return how many units each group keeps so that the sum of the errors is least within the budget.

    ``cost(keep)`` is the share of the whole that is left; each group's part in it is taken as linear.
    """
    whole = cost(list(sizes))
    slopes = []
    for number, size in enumerate(sizes):
        fewer = list(sizes)
        fewer[number] = least[number]
        slopes.append((whole - cost(fewer)) / max(size - least[number], 1))

    def at(price: float) -> list[int]:
        return [
            int(np.argmin(curve.errors[low - 1 :] + price * slope * np.arange(low, len(curve.errors) + 1))) + low
            for curve, slope, low in zip(curves, slopes, least, strict=True)
        ]

    low, high = 1e-9, 1e9
    for _ in range(80):
        middle = float(np.sqrt(low * high))
        if cost(at(middle)) > budget:
            low = middle
        else:
            high = middle
    keep = at(high)
    while True:
        # What is left of the budget goes where it helps most.
        gains = []
        for number, count in enumerate(keep):
            more = [c + (i == number) for i, c in enumerate(keep)]
            if count < sizes[number] and slopes[number] > 0 and cost(more) <= budget:
                errors = curves[number].errors
                gains.append(((errors[count - 1] - errors[count]) / slopes[number], number))
        if not gains:
            return keep
        keep[max(gains)[1]] += 1


def _curve(points: dict[int, float], size: int) -> Curve:
    counts = sorted(points)
    errors = np.minimum.accumulate([points[count] for count in counts])
    if len(counts) == 1:
        return Curve(np.zeros(size))
    return Curve(np.maximum(PchipInterpolator(counts, errors)(np.arange(1, size + 1)), 0.0))


def _cuttable(model: tf_keras.Model, group: Group, names: frozenset[str]) -> Cuttable | None:
    """Return the group if elimination can choose its units: one writer, and one linear layer that reads only it."""
    if group.kept_because is not None or not set(group.writers) <= names or len(group.writers) != 1:
        return None
    reading = [member for member in group.members if member.reads and not member.weight.within]
    if len(reading) != 1 or any(m.weight.within for m in group.members):
        return None
    (member,) = reading
    layer = model.get_layer(member.weight.layer)
    ids = member.weight.axes[member.axis]
    if not is_linear(layer) or ids is None or len(member.places) != len(ids):
        return None
    width = len(ids)
    positions = int(np.prod(layer.kernel.shape[:-2])) if len(layer.kernel.shape) > 2 else 1
    places = member.places[np.argsort(member.units, kind="stable")].reshape(len(group), -1)
    rows = (np.arange(positions)[None, :, None] * width + places[:, None, :]).reshape(len(group), -1)
    return Cuttable(group, layer.name, rows)


def _sums(model: tf_keras.Model) -> dict[str, tuple[int, ...]]:
    """Return layer -> the other tensors of the Add that its output goes into, and nothing else."""
    following = consumers(model)
    found: dict[str, tuple[int, ...]] = {}
    for layer in model.layers:
        readers = following[layer.name]
        if len(readers) == 1 and isinstance(readers[0], tf_keras.layers.Add) and len(readers[0].inbound_nodes) == 1:
            inputs = readers[0].inbound_nodes[0].keras_inputs
            found[layer.name] = tuple(id(t) for t in inputs if t.node.layer.name != layer.name)
    return found


def _importances(
    model: tf_keras.Model, samples: np.ndarray, readers: set[str], sums: dict[str, tuple[int, ...]], seed: int
) -> dict[str, Importance]:
    """Return what errors at each reader's output mean: squared gradients of random combinations of the logits."""
    listed = sorted(readers)
    following = consumers(model)
    # An error of a summand is an error of the sum.
    places = [following[name][0].output if name in sums else model.get_layer(name).output for name in listed]
    look = tf_keras.Model(model.inputs, [*places, *model.outputs])

    def gradients(x: tf.Tensor, signs: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            *inner, logits = look(x, training=False)
            for tensor in inner:
                tape.watch(tensor)
            total = tf.reduce_sum(signs * logits)
        return tape.gradient(total, inner, unconnected_gradients="zero")

    compiled = tf.function(gradients, reduce_retracing=True)
    rng = np.random.default_rng(seed)
    weights: list[list[np.ndarray]] = [[] for _ in listed]
    metrics = [np.zeros((tensor.shape[-1],) * 2) for tensor in places]
    width = model.outputs[0].shape[-1]
    for start in range(0, len(samples), 128):
        x = tf.constant(samples[start : start + 128])
        squares: list[np.ndarray | float] = [0.0] * len(listed)
        for _ in range(2):
            signs = rng.choice([-1.0, 1.0], (len(x), width)).astype(np.float32)
            for number, gradient in enumerate(compiled(x, tf.constant(signs - signs.mean(1, keepdims=True)))):
                squares[number] = squares[number] + tf.reduce_mean(gradient**2, -1).numpy()
                flat = tf.reshape(gradient, [-1, gradient.shape[-1]])
                metrics[number] += tf.matmul(flat, flat, transpose_a=True).numpy()
        for number, value in enumerate(squares):
            weights[number].append(np.asarray(value))
    result = {}
    for name, parts, metric in zip(listed, weights, metrics, strict=True):
        whole = np.concatenate(parts)
        relative = np.sqrt(np.clip(whole / max(float(whole.mean()), 1e-30), *_CLIP))
        scale = np.trace(metric) / len(metric)
        result[name] = Importance(relative.astype(np.float32), metric / scale if scale > 0 else np.eye(len(metric)))
    return result


def _linear_output(layer: tf_keras.layers.Layer, x: np.ndarray, batch: int = 128) -> np.ndarray:
    """Return kernel times input plus bias, before the activation."""
    parts = []
    for start in range(0, len(x), batch):
        value = tf.constant(x[start : start + batch])
        if isinstance(layer, tf_keras.layers.Dense):
            output = tf.tensordot(value, layer.kernel, 1)
        else:
            output = tf.nn.convolution(
                value, layer.kernel, layer.strides, layer.padding.upper(), dilations=layer.dilation_rate
            )
        parts.append(np.asarray(output + layer.bias if layer.use_bias else output))
    return np.concatenate(parts)


def _outputs(model: tf_keras.Model, samples: np.ndarray) -> np.ndarray:
    return np.concatenate(
        [np.asarray(model(samples[i : i + 128], training=False)) for i in range(0, len(samples), 128)]
    )


def _few(values: dict[int, np.ndarray], count: int) -> dict[int, np.ndarray]:
    return {key: value[:count] for key, value in values.items()}


def _once(walk: Walk, step: Step) -> bool:
    """Say whether the layer is called only here: a shared layer is left as it is."""
    return sum(node.layer is step.node.layer for node in walk.nodes) == 1
