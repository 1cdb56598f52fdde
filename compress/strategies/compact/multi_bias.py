"""Multi-bias activation: one filter's response, several times, each time with a bias of its own before the activation.

Source: Li, Ouyang, Wang, Multi-Bias Non-linear Activation in Deep Neural Networks (arXiv 1604.00676). Here every copy
has a scale, too, as the batch norm behind it would give it; a depthwise 1 x 1 convolution makes scale and bias.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tf_keras
from scipy.optimize import linear_sum_assignment

from compress.candidate import Candidate, Effect, Guarantee, Skipped, Violation
from compress.errors import CompressError
from compress.graph.channels.groups import Channels, Group
from compress.graph.channels.order import Order, can_be_ordered
from compress.graph.channels.surgery import oracle_difference
from compress.graph.fold import fold_batch_norm
from compress.graph.rewrite import NewLayer, calls, copy_model, rewrite
from compress.graph.walk import Walk
from compress.metrics.tflite_file import TFLiteFile
from compress.strategies.least_squares import Moments, is_linear, matrix_of
from compress.strategies.repair import RIDGE, Repair
from compress.strategies.strategy import Context
from compress.words import counted

layers = tf_keras.layers

_ROUNDS, _STARTS = 20, 4
_TOLERANCE = 1e-4
"""Of the outputs after channels are put in another order."""


@dataclass(frozen=True)
class MultiBias(Guarantee):
    """Layer ``name`` repeats, scales and shifts what ``name_filters`` gives; ``filters``: layer -> filters of that."""

    filters: Mapping[str, int]

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that it binds."""
        return frozenset(self.filters) | frozenset(map(filters_of, self.filters))

    def describe(self) -> str:
        """Say how many filters are left."""
        left = counted(sum(self.filters.values()), "filter")
        return f"{left} in {counted(len(self.filters), 'convolution')}, each with several biases"

    def check(self, model: tf_keras.Model) -> list[Violation]:
        """Count what each layer reads."""
        read = {
            layer.name: int(layer.input_shape[-1])
            for layer in model.layers
            if isinstance(layer, layers.DepthwiseConv2D) and layer.name in self.filters
        }
        return [
            Violation(
                name, "its biases are gone" if name not in read else f"{counted(read[name], 'filter')}, at most {count}"
            )
            for name, count in self.filters.items()
            if read.get(name, count + 1) > count
        ]

    def check_file(self, file: TFLiteFile) -> list[Violation]:
        """Count the filters that the file runs."""
        found = {name: file.output_channels_of(filters_of(name)) for name in self.filters}
        return [
            Violation(name, f"the file runs {written} filters, at most {count}")
            for name, count in self.filters.items()
            if (written := found[name]) is None or written > count
        ]


@dataclass(frozen=True)
class Responses:
    """The responses that a layer's outputs become: ``order`` [outputs]: those of the first response, of the second, ...

    ``filters`` [d, responses]; ``scales`` and ``biases`` [outputs], in that order.
    """

    order: np.ndarray
    filters: np.ndarray
    scales: np.ndarray
    biases: np.ndarray

    @property
    def matrix(self) -> np.ndarray:
        """Kernel and bias of the layer that does the same, its outputs in their own order: [d + 1, outputs]."""
        repeated = np.repeat(self.filters, len(self.order) // self.filters.shape[1], 1) * self.scales
        return np.vstack([repeated, self.biases])[:, np.argsort(self.order)]


def multi_bias(
    candidate: Candidate, context: Context, names: Collection[str], each: int, images: int
) -> tuple[Candidate, list[Skipped]]:
    """Return the candidate with ``each`` outputs of the named layers made of one filter, and the layers left alone.

    Raises:
        CompressError: if there is no layer to do that to, or the model cannot be walked through.
    """
    model = fold_batch_norm(candidate.model, frozenset(names))
    channels = Channels(model)
    # Weights that are bound by where they stand: hashed ones, vectors, patterns of zeros.
    placed = {name for g in candidate.guarantees if Effect.CUT in g.broken_by for name in g.layers}
    chosen, skipped = _choose(model, channels, names, each, placed)
    if not chosen:
        raise context.nothing_done("a Conv2D whose filters can share their responses", skipped)
    responses = _solved(candidate, model, chosen, each, images, context)
    for name, found in responses.items():
        layer = model.get_layer(name)
        kernel, *bias = layer.get_weights()
        layer.set_weights([found.matrix[:-1].reshape(kernel.shape), *([found.matrix[-1]] if bias else [])])
    order = Order.of(channels, {name: found.order for name, found in responses.items()})
    ordered = order.model()
    chains = {name: _chain(ordered.get_layer(name), found, order) for name, found in responses.items()}
    result = rewrite(ordered, chains)
    _require_equal(model, result, context)
    guarantees = tuple(guarantee.cut(order.array) for guarantee in candidate.guarantees)
    done = candidate.evolve(model=result, guarantees=guarantees)
    done = done.replaced({name: [filters_of(name)] for name in responses})
    filters = {name: found.filters.shape[1] for name, found in responses.items()}
    return done.with_guarantee(MultiBias(context.stage, filters)), skipped


def _choose(
    model: tf_keras.Model, channels: Channels, names: Collection[str], each: int, placed: Collection[str]
) -> tuple[list[str], list[Skipped]]:
    times, taken = calls(model), {layer.name for layer in model.layers}
    groups = {name: group for group in channels.groups for name in group.writers}
    chosen, skipped = [], []
    for layer in model.layers:
        if layer.name in names:
            reason = _obstacle(layer, groups.get(layer.name), each, placed)
            if times[layer.name] > 1:
                reason = "called more than once"
            if filters_of(layer.name) in taken:
                reason = f"the name {filters_of(layer.name)} is taken"
            if reason is None:
                chosen.append(layer.name)
            else:
                skipped.append(Skipped(layer.name, reason))
    return chosen, skipped


def _obstacle(layer: tf_keras.layers.Layer, group: Group | None, each: int, placed: Collection[str]) -> str | None:
    """Say why a layer's outputs cannot share their responses, so far as the layer and its group say it."""
    if type(layer) is not layers.Conv2D or not is_linear(layer):
        return f"filters of such a {type(layer).__name__} layer are not transferred"
    if layer.filters % each or layer.filters == each:
        return f"{counted(layer.filters, 'filter is', 'filters are')} not several times {each}"
    size = int(np.prod(layer.kernel.shape))
    if (left := size // each + layer.filters) >= size:
        return f"{left:,} numbers for {size:,} would not pay"
    if group is None or group.kept_because is not None:
        return f"its channels keep their order: {'nothing says where they go' if group is None else group.kept_because}"
    if len(group.writers) > 1:
        return f"its channels are those of {', '.join(name for name in group.writers if name != layer.name)}, too"
    if bound := sorted({member.weight.layer for member in group.members} & set(placed)):
        return f"an earlier stage has bound the weights of {', '.join(bound)} to the order of its channels"
    return None if can_be_ordered(group) else "its channels go different ways"


def _solved(
    candidate: Candidate, model: tf_keras.Model, chosen: Sequence[str], each: int, images: int, context: Context
) -> dict[str, Responses]:
    """Return the responses for each layer: by least squares on images, layer after layer; without, by weights."""
    rng = np.random.default_rng(context.seed)
    if not images:
        plain = {name: matrix_of(model.get_layer(name)) for name in chosen}
        return {
            name: _Solver(each, rng)(np.eye(len(matrix) - 1), np.zeros(len(matrix) - 1), matrix)
            for name, matrix in plain.items()
        }
    try:
        repair = Repair(candidate.model, context.calibration_samples(images), context.seed, candidate.guarantees)
    except CompressError as error:
        advice = f"Write strategy.{context.stage}.images=0: responses are then chosen by the weights alone."
        raise CompressError(error.where, expected=error.expected, received=error.received, fix=advice) from error
    found: dict[str, Responses] = {}
    for step in (walk := Walk(repair.folded, copy_model(repair.folded), repair.samples)):
        name = step.layer.name
        if name not in chosen:
            continue
        solver, before = _Solver(each, rng), matrix_of(step.layer)

        def solution(
            known: Moments, name: str = name, solver: _Solver = solver, before: np.ndarray = before
        ) -> np.ndarray:
            best = repair.solved(name, known, before, RIDGE)
            mean = known.inputs[:-1, -1]
            found[name] = solver(known.inputs[:-1, :-1] - np.outer(mean, mean), mean, best)
            return found[name].matrix

        repair.put_solution(walk, step, repair.moments(step, repair.target(walk, step)), solution)
    return found


class _Solver:
    """Fits responses again and again, as the matrix that they stand for moves; which outputs share one stays."""

    def __init__(self, each: int, rng: np.random.Generator) -> None:
        self._each, self._rng = each, rng
        self._clusters: np.ndarray | None = None

    def __call__(self, covariance: np.ndarray, mean: np.ndarray, best: np.ndarray) -> Responses:
        """Return the responses nearest to what ``best`` [d + 1, outputs] gives for inputs of such moments."""
        kernel = best[:-1]
        outputs = kernel.T @ covariance @ kernel
        if self._clusters is None:
            self._clusters = cluster_outputs(outputs, self._each, self._rng)
        scales = leading(outputs, self._clusters)
        filters = np.einsum("dcm,cm->dc", kernel[:, self._clusters], scales)
        order, flat = self._clusters.reshape(-1), scales.reshape(-1)
        # Each output keeps its mean.
        lost = mean @ (kernel[:, order] - np.repeat(filters, self._each, 1) * flat)
        return Responses(order, filters, flat, best[-1, order] + lost)


def leading(covariance: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Return the leading eigenvector of each cluster's outputs [clusters, each], most of it positive."""
    _, vectors = np.linalg.eigh(covariance[clusters[:, :, None], clusters[:, None, :]])
    first = vectors[:, :, -1]
    return np.asarray(first * np.where(first.sum(1, keepdims=True) < 0, -1.0, 1.0))


def cluster_outputs(covariance: np.ndarray, each: int, rng: np.random.Generator) -> np.ndarray:
    """Return outputs that share a response, [clusters, each], so that as much of their variance as can be is explained.

    A response is the leading principal component of its cluster's outputs; outputs are assigned anew to what explains
    them best, each response to ``each`` of them. Neither step lets the explained variance fall.
    """
    count = len(covariance) // each
    found: list[tuple[float, np.ndarray]] = []
    for _ in range(_STARTS):
        mixes = np.eye(len(covariance))[:, rng.permutation(len(covariance))[:count]]
        best, clusters = -np.inf, np.zeros((count, each), np.int64)
        for _ in range(_ROUNDS):
            shared = covariance @ mixes
            explained = shared**2 / np.maximum((mixes * shared).sum(0), 1e-30)
            _, places = linear_sum_assignment(-np.repeat(explained, each, axis=1))
            proposed = np.argsort(places // each, kind="stable").reshape(count, each)
            scales = leading(covariance, proposed)
            blocks = covariance[proposed[:, :, None], proposed[:, None, :]]
            now = float(np.einsum("ci,cij,cj->", scales, blocks, scales))
            if now <= best * (1 + 1e-6):
                break
            best, clusters = now, proposed
            mixes = np.zeros_like(mixes)
            mixes[clusters, np.arange(count)[:, None]] = scales
        found.append((best, clusters))
    return max(found, key=lambda one: one[0])[1]


def filters_of(name: str) -> str:
    """Return the name of the convolution that makes a layer's responses."""
    return f"{name}_filters"


def _chain(old: tf_keras.layers.Conv2D, found: Responses, order: Order) -> list[NewLayer]:
    """Return the convolution of the responses, and the layer that repeats, scales and shifts them."""
    count = found.filters.shape[1]
    config = {**old.get_config(), "name": filters_of(old.name), "filters": count}
    config.update(use_bias=False, activation="linear")
    shift = layers.DepthwiseConv2D(
        1, depth_multiplier=len(found.order) // count, activation=old.activation, name=old.name
    )
    # What it reads may be in a new order, too.
    kernel = order.array(f"{old.name}/kernel", found.filters.reshape(*old.kernel.shape[:-1], count), without=3)
    scales = found.scales.reshape(1, 1, count, -1).astype(np.float32)
    return [
        NewLayer(layers.Conv2D.from_config(config), (kernel.astype(np.float32),)),
        NewLayer(shift, (scales, found.biases.astype(np.float32))),
    ]


def _require_equal(model: tf_keras.Model, result: tf_keras.Model, context: Context) -> None:
    difference = oracle_difference(model, result, [context.data.train.x[:16].astype(np.float32)])
    if not difference <= _TOLERANCE:
        raise CompressError(
            f"stage {context.stage}",
            expected=f"the same outputs after channels are put in another order, within {_TOLERANCE:g}",
            received=f"a difference of {difference:.2g}",
            fix=f"Leave the layers out with strategy.{context.stage}.skip, and report this model.",
        )
