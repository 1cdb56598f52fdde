"""Repair of a changed network in closed form, shared by every method that has something to make up for.

A network's batch norms are folded; original and changed network walk side by side; each linear layer gets as its target
what makes the sum that it is added to that of the original again; and the norms come back with new statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import tensorflow as tf
import tf_keras

from compress.candidate import Guarantee
from compress.errors import CompressError
from compress.graph.fold import fold_batch_norm, foldable_pairs, gain_of
from compress.graph.rewrite import consumers, copy_model, nodes
from compress.graph.softmax import gives_probabilities, logits_of
from compress.graph.walk import Step, Walk
from compress.strategies.least_squares import Moments, assign_matrix, moments, solve
from compress.strategies.pruning.zeros import Zeros

RIDGE, REPAIR_RIDGE = 1e-4, 1e-3
"""Ridge of a layer that loses inputs, and of one that only makes up for others; relative to its inputs' squares."""
_CLIP = (0.05, 20.0)
_WITHOUT_REPAIR = (
    "quantize (bits=8, rounding=nearest), qat (rounding_images=0), share, prune (criterion=magnitude), "
    "prune_channels (criterion=l2)"
)
_RECTIFIED_ROUNDS = 3
_LEAST_FACTOR = 0.05
"""A batch norm that multiplies with less than this part of what is usual switches the channel off."""


@dataclass(frozen=True)
class Importance:
    """What errors at a layer's output mean for the logits: for places [samples, ...], for outputs together [c, c]."""

    places: np.ndarray
    metric: np.ndarray
    scale: float
    """Squared change of a logit for a squared error of one at every place of an output, averaged over the outputs."""


@dataclass
class Repair:
    """A model made ready: batch norms folded, sums found. ``samples`` are calibration inputs, unlabelled.

    ``guarantees``: what is zero stays zero, and layers whose values are bound otherwise are left as they are.
    """

    model: tf_keras.Model
    samples: np.ndarray
    seed: int
    guarantees: Sequence[Guarantee] = ()
    folded: tf_keras.Model = field(init=False)
    importance: dict[str, Importance] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        _require_walkable(self.model)
        self.folded = fold_batch_norm(self.model)
        self._sums = _sums(self.folded)
        self._rectified = rectified(self.folded, self._sums)
        self.alive: dict[str, np.ndarray] = {}
        """Layer -> which of its weights may be other than zero, [inputs, outputs]."""
        self._fixed: set[str] = set()
        for guarantee in self.guarantees:
            if not isinstance(guarantee, Zeros):
                self._fixed |= {name.rpartition("/")[0] for name in guarantee.weights()}
                continue
            for name, mask in guarantee.masks.items():
                layer, matrix = name.rpartition("/")[0], mask.reshape(-1, mask.shape[-1])
                self.alive[layer] = matrix & self.alive.get(layer, True)

    def measure_importance(self, layers: Iterable[str]) -> None:
        """Measure what errors of the layers' outputs mean for the logits; :meth:`moments` takes it into account."""
        self.importance = _importances(self.folded, self.samples, set(layers), self._sums, self.seed)

    def metric(self, layer: str) -> np.ndarray | None:
        """Return what errors of the outputs of a layer mean together, if that was measured."""
        known = self.importance.get(layer)
        return None if known is None else known.metric

    def moments(self, step: Step, target: np.ndarray | None = None, known: Moments | None = None) -> Moments:
        """Return the moments of a layer's changed inputs with its target, or with its original output."""
        weight = self.importance.get(step.layer.name)
        wanted = linear_output(step.node.layer, step.inputs[0]) if target is None else target
        places = None if weight is None else weight.places
        return moments(step.layer, step.changed_inputs[0], wanted, places, known=known)

    def put(
        self, walk: Walk, step: Step, known: Moments, before: np.ndarray, ridge: float, left: np.ndarray | None = None
    ) -> None:
        """Write the solved matrix into the layer of this step; arguments as for :meth:`solved`."""
        self.put_solution(walk, step, known, lambda found: self.solved(step.layer.name, found, before, ridge, left))

    def put_solution(self, walk: Walk, step: Step, known: Moments, solution: Callable[[Moments], np.ndarray]) -> None:
        """Write what ``solution`` makes of the moments, a matrix [d + 1, outputs], into the layer of this step.

        Where a ReLU follows, what was negative before it may be anything negative: the layer is solved again for the
        nearest such target, a few times; the error behind the ReLU falls each time. (Zhang et al., arXiv 1505.06798,
        section 3.2, minimise the same error; here it is bounded from above by one that is quadratic.)
        """
        assign_matrix(step.layer, solution(known))
        for target in self.rectified_targets(walk, step):
            assign_matrix(step.layer, solution(self.moments(step, target, known)))

    def rectified_targets(self, walk: Walk, step: Step) -> Iterator[np.ndarray]:
        """Yield what a layer before a ReLU should give, each time anew by what it gives by then."""
        name = step.layer.name
        if name not in self._rectified or name in self._fixed:
            return
        others = [tensor for tensor in self._sums.get(name, ()) if tensor in walk.values]
        beside = sum((walk.changed_values[tensor] for tensor in others), np.float32(0))
        wanted = linear_output(step.node.layer, step.inputs[0]) + sum((walk.values[t] for t in others), np.float32(0))
        for _ in range(_RECTIFIED_ROUNDS):
            now = linear_output(step.layer, step.changed_inputs[0]) + beside
            yield np.where(wanted > 0, wanted, np.minimum(now, 0)) - beside

    def solved(
        self, layer: str, known: Moments, before: np.ndarray, ridge: float, left: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the layer's matrix [d + 1, outputs], solved as far as the guarantees allow.

        ``left``: as in :func:`~compress.strategies.least_squares.solve`; the others become zero.
        """
        alive = self.alive.get(layer)
        if alive is not None:
            left = alive if left is None else alive & (left if left.ndim == 2 else left[:, None])
        if left is not None:
            last = np.ones((1, *left.shape[1:]), bool)
            whole = np.concatenate([left, last])
            before = np.where(whole if left.ndim == 2 else whole[:, None], before, 0.0)
        return before if layer in self._fixed else solve(known, before, ridge, left)

    def target(self, walk: Walk, step: Step) -> np.ndarray:
        """Return what the layer should give: so much that the sum it is added to is that of the original."""
        own = linear_output(step.node.layer, step.inputs[0])
        others = self._sums.get(step.layer.name, ())
        for tensor in others:
            if tensor in walk.values and tensor in walk.changed_values:
                own = own + (walk.values[tensor] - walk.changed_values[tensor])
        return own

    def gains(self) -> dict[str, np.ndarray]:
        """Return folded layer -> what :meth:`with_norms` divides each output of its kernel by."""
        return {name: _factor_of(self.model.get_layer(norm)) for name, norm in foldable_pairs(self.model).items()}

    def with_norms(self, changed: tf_keras.Model) -> tf_keras.Model:
        """Return the repaired network with its batch norms, their statistics measured anew."""
        pairs = foldable_pairs(self.model)
        result, factors = copy_model(self.model), self.gains()
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
            # One without centre must not take the mean away.
            mean = mean if norm.center else np.zeros_like(mean)
            # The kernel goes back to the size that it had before it was folded. A norm hides the size of a kernel, but
            # the smaller a kernel is the more a training step turns it.
            factor = factors[name]
            variance = variance / factor**2 if norm.scale else np.asarray(norm.moving_variance)
            kernel = np.asarray(source.weights[0])
            spread = factor.reshape(kernel.shape[2:]) if isinstance(layer, tf_keras.layers.DepthwiseConv2D) else factor
            layer.weights[0].assign(kernel / spread)
            if layer.use_bias:
                layer.bias.assign(bias / factor)
            # Its output is again kernel and bias of the folded layer, whatever the statistics are.
            values = {
                "moving_mean": (mean - (0 if layer.use_bias else bias)) / factor,
                "moving_variance": variance,
                "gamma": factor * np.sqrt(variance + norm.epsilon),
                "beta": mean,
            }
            for attribute, value in values.items():
                variable = getattr(norm, attribute)
                if variable is not None:
                    variable.assign(value)
        return result


def _factor_of(norm: tf_keras.layers.BatchNormalization) -> np.ndarray:
    """Return what a batch norm multiplies each channel with; for one that it nearly switches off, what is usual."""
    factor = gain_of(norm)
    usual = float(np.median(np.abs(factor)))
    # Without a scale there is none to make up for another factor.
    off = np.abs(factor) < _LEAST_FACTOR * usual if norm.scale else np.zeros(factor.shape, bool)
    return np.asarray(np.where(off, usual if usual > 0 else 1.0, factor))


def _sums(model: tf_keras.Model) -> dict[str, tuple[int, ...]]:
    """Return layer -> the other tensors of the Add that its output goes into, and nothing else."""
    following = consumers(model)
    found: dict[str, tuple[int, ...]] = {}
    for layer in model.layers:
        readers = following[layer.name]
        linear = getattr(layer, "activation", None) is tf_keras.activations.linear
        if not linear or len(readers) != 1 or not isinstance(readers[0], tf_keras.layers.Add):
            continue
        (node, *more) = readers[0].inbound_nodes
        if not more and all(tensor.shape == readers[0].output.shape for tensor in node.keras_inputs):
            found[layer.name] = tuple(id(t) for t in node.keras_inputs if t.node.layer.name != layer.name)
    return found


def rectified(model: tf_keras.Model, sums: Collection[str]) -> frozenset[str]:
    """Return the layers whose output, or the sum that it goes into, is read by ReLUs alone."""
    following = consumers(model)

    def is_relu(layer: tf_keras.layers.Layer) -> bool:
        if isinstance(layer, tf_keras.layers.ReLU):
            return layer.negative_slope == 0 and layer.max_value is None and layer.threshold == 0
        return isinstance(layer, tf_keras.layers.Activation) and layer.activation is tf_keras.activations.relu

    found = set()
    for layer in model.layers:
        own = getattr(layer, "activation", None)
        last = following[layer.name][0].name if layer.name in sums else layer.name
        linear = own is tf_keras.activations.linear and following[last] and all(map(is_relu, following[last]))
        # A layer with a ReLU of its own is solved before it.
        if linear or (layer.name not in sums and own is tf_keras.activations.relu):
            found.add(layer.name)
    ends = {tensor.node.layer.name for tensor in model.outputs}
    return frozenset(name for name in found if name not in ends)


def _require_walkable(model: tf_keras.Model) -> None:
    """Refuse a model in which a layer does not treat samples one by one, or passes on a mask.

    Raises:
        CompressError: naming the layer.
    """
    for tensor in model.inputs:
        if tensor.shape[0] is not None:
            raise CompressError(
                f"model {model.name}, input {tensor.node.layer.name}",
                expected="any batch size, for a repair in closed form",
                received=f"a fixed batch size of {tensor.shape[0]}",
                fix="Build the model with Input(shape) instead of Input(batch_shape), give it the same weights, and "
                f"save it again. Or choose what needs no repair: {_WITHOUT_REPAIR}.",
            )
    for node in nodes(model):
        masks = isinstance(node.layer, tf_keras.layers.Masking) or getattr(node.layer, "mask_zero", False)
        if masks or any(t.shape.rank in (0, None) or t.shape[0] is not None for t in tf.nest.flatten(node.outputs)):
            raise CompressError(
                f"layer {node.layer.name}",
                expected="layers that treat each sample by itself and pass on no mask, for a repair in closed form",
                received=f"{type(node.layer).__name__}, which does not",
                fix=f"Choose what needs no repair: {_WITHOUT_REPAIR}.",
            )


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
            # Watched before the forward pass: a frozen layer's variables do not start the tape.
            tape.watch(x)
            *inner, outputs = look(x, training=False)
            total = tf.reduce_sum(signs * logits_of(outputs, probabilities))
        return tape.gradient(total, inner, unconnected_gradients="zero")

    probabilities = gives_probabilities(model)
    compiled = tf.function(gradients, reduce_retracing=True)
    rng = np.random.default_rng(seed)
    weights: list[list[np.ndarray]] = [[] for _ in listed]
    metrics = [np.zeros((tensor.shape[-1],) * 2) for tensor in places]
    width = model.outputs[0].shape[-1]
    for start in range(0, len(samples), 128):
        x = tf.constant(samples[start : start + 128])
        squares: list[np.ndarray | float] = [0.0] * len(listed)
        for _ in range(2):
            signs = rng.choice([-1.0, 1.0], (len(x), *model.output_shape[1:])).astype(np.float32)
            for number, gradient in enumerate(compiled(x, tf.constant(signs - signs.mean(-1, keepdims=True)))):
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
        metric = metric / scale if scale > 0 else np.eye(len(metric))
        # Two draws of a random combination, whose squares add up to those of all logits.
        result[name] = Importance(relative.astype(np.float32), metric, float(scale / (2 * len(samples) * width)))
    return result


def linear_output(layer: tf_keras.layers.Layer, x: np.ndarray, batch: int = 128) -> np.ndarray:
    """Return kernel times input plus bias, before the activation."""
    parts = []
    for start in range(0, len(x), batch):
        value = tf.constant(x[start : start + batch])
        if isinstance(layer, tf_keras.layers.Dense):
            output = tf.tensordot(value, layer.kernel, 1)
        else:
            # By its own method: what stands in for another kind of convolution has another.
            output = layer.convolution_op(value, layer.kernel)
        parts.append(np.asarray(output + layer.bias if layer.use_bias else output))
    return np.concatenate(parts)


def change_of_logits(model: tf_keras.Model, outputs: np.ndarray, wanted: np.ndarray) -> float:
    """Return the mean squared change of the logits between two outputs of ``model``."""
    probabilities = gives_probabilities(model)
    one, other = (logits_of(tf.constant(value), probabilities) for value in (outputs, wanted))
    return float(tf.reduce_mean((one - other) ** 2))


def outputs_of(model: tf_keras.Model, samples: np.ndarray) -> np.ndarray:
    """Return the model's output for all samples."""
    return np.concatenate(
        [np.asarray(model(samples[i : i + 128], training=False)) for i in range(0, len(samples), 128)]
    )


def called_once(walk: Walk, step: Step) -> bool:
    """Say whether the layer is called only here: a shared layer is left as it is."""
    return sum(node.layer is step.node.layer for node in walk.nodes) == 1
