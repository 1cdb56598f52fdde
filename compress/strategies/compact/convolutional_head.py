"""A head of Dense layers that reads any size of map: as convolutions, or behind a global average.

Sources: Long, Shelhamer, Darrell, Fully Convolutional Networks (arXiv 1411.4038, section 3.1), for Dense layers as
convolutions; Lin, Chen, Yan, Network in Network (arXiv 1312.4400, section 3.2), for the global average.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import tf_keras
from annotated_types import Ge, Le
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate, Effect, Guarantee, Skipped, Violation
from compress.graph.rewrite import NewLayer, calls, consumers, rewrite
from compress.graph.selection import Selection
from compress.metrics.tflite_file import TFLiteFile
from compress.strategies.least_squares import Moments, matrix_of, solve
from compress.strategies.options import refuse_without_effect
from compress.strategies.repair import linear_output, outputs_of
from compress.strategies.strategy import STRICT, Context, Strategy

layers = tf_keras.layers

_RIDGE = 1e-3
"""Of the weights behind a global average, towards what gives the same on maps that are even; of the inputs' squares."""
_ELEMENTWISE = (
    *(layers.Dropout, layers.ReLU, layers.LeakyReLU, layers.ELU, layers.Activation, layers.GaussianNoise),
    layers.BatchNormalization,
)


@dataclasses.dataclass(frozen=True)
class GlobalHead(Guarantee):
    """No Flatten fixes the size of the maps: ``pools``: layer of the head -> the global average beside it."""

    pools: Mapping[str, str]

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that it binds."""
        return frozenset(self.pools) | frozenset(self.pools.values())

    def describe(self) -> str:
        """Say that the head reads maps of any size."""
        return f"{', '.join(sorted(self.pools))} read maps of any size"

    def check(self, model: tf_keras.Model) -> list[Violation]:
        """Look for the averages."""
        pools = {layer.name for layer in model.layers if isinstance(layer, layers.GlobalAveragePooling2D)}
        return [
            Violation(name, f"the global average {pool} is gone")
            for name, pool in self.pools.items()
            if pool not in pools
        ]

    def check_file(self, file: TFLiteFile) -> list[Violation]:
        """Look for the operators of the head's layers."""
        return [Violation(name, "the file does not run it") for name in self.pools if file.operator_of(name) is None]


@dataclass(frozen=True, config=STRICT)
class ConvolutionalHead(Strategy):
    """Replace Flatten and the Dense layers behind it by what runs on images of any size, then recover.

    The model itself keeps its input shape; ``python -m compress.deploy.export model.keras --size 64x64`` exports it for
    another one.

    Args:
        form: ``convolution``: the first Dense layer becomes a convolution over the whole map, those behind it are
            1 x 1, and a global average ends the head; the outputs stay the same. ``pooling``: a global average takes
            the place of Flatten, and the Dense layer behind it reads one number for each channel: far fewer weights.
        images: unlabelled calibration images, on which the weights behind the average (``pooling``) are solved for.
    """

    form: Literal["convolution", "pooling"] = "convolution"
    images: Annotated[int, Ge(1), Le(100_000)] = 500

    effects = frozenset({Effect.TRAIN, Effect.REPLACE})
    establishes = GlobalHead

    def __post_init__(self) -> None:
        """Refuse images where nothing is solved for."""
        refuse_without_effect(self, [(self.form == "pooling", ["images"], "form=pooling")])

    def targets(self, model: tf_keras.Model, selection: Selection) -> frozenset[str]:
        """Only the heads that can be replaced."""
        names = selection.names(model)
        heads = (head for head in _heads(model) if not isinstance(head, Skipped))
        return frozenset(layer.name for head in heads for layer in head.path if head.dense.name in names)

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Replace every head, solve if asked to, recover."""
        model, names = candidate.model, context.selection.names(candidate.model)
        found = _heads(model)
        skipped = [head for head in found if isinstance(head, Skipped)]
        heads = [head for head in found if not isinstance(head, Skipped) and head.dense.name in names]
        if not heads:
            raise context.nothing_done("a Flatten of maps with a Dense layer behind it", skipped)
        replacements: dict[str, list[NewLayer]] = {}
        for head in heads:
            replacements |= head.convolutions() if self.form == "convolution" else self._pooled(head, model, context)
        pools = {head.dense.name: head.pool for head in heads}
        result = candidate.evolve(model=rewrite(model, replacements), skipped=context.skip(skipped))
        result = result.replaced({name: [new.layer.name for new in chain] for name, chain in replacements.items()})
        return context.recover(result.with_guarantee(GlobalHead(context.stage, pools)))

    def _pooled(self, head: _Head, model: tf_keras.Model, context: Context) -> dict[str, list[NewLayer]]:
        samples = context.calibration_samples(self.images)
        before = outputs_of(tf_keras.Model(model.inputs, head.dense.input), samples)
        pooled = before.reshape(len(before), -1, head.shape[-1]).mean(1, dtype=np.float64)
        matrix = pooled_least_squares(head.dense, pooled, linear_output(head.dense, before))
        config = head.dense.get_config()
        weights = [matrix[:-1].astype(np.float32), *([matrix[-1].astype(np.float32)] if head.dense.use_bias else [])]
        pool = NewLayer(layers.GlobalAveragePooling2D(name=head.pool))
        return {
            head.path[0].name: [],
            head.dense.name: [pool, NewLayer(layers.Dense.from_config(config), tuple(weights))],
        }


def pooled_least_squares(dense: tf_keras.layers.Dense, pooled: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the matrix [channels + 1, units] that makes of ``pooled`` [n, channels] what is nearest to ``wanted``.

    It is drawn towards the sums of the Dense layer's weights over the map, which are right for even maps.
    """
    matrix = matrix_of(dense)
    even = matrix[:-1].reshape(-1, pooled.shape[1], dense.units).sum(0)
    rows = np.hstack([pooled, np.ones((len(pooled), 1))])
    if not dense.use_bias:
        rows[:, -1] = 0
    gram = rows.T @ rows / len(rows)
    gram[-1, -1] = 1.0
    return solve(Moments(gram, rows.T @ wanted / len(rows)), np.vstack([even, matrix[-1:]]), _RIDGE)


@dataclasses.dataclass(frozen=True)
class _Head:
    """A Flatten of maps of ``shape`` [h, w, c], and what follows it one by one until the last Dense layer."""

    path: Sequence[tf_keras.layers.Layer]
    shape: tuple[int, int, int]

    @property
    def dense(self) -> tf_keras.layers.Dense:
        """The Dense layer that reads the map."""
        return next(layer for layer in self.path if isinstance(layer, layers.Dense))

    @property
    def pool(self) -> str:
        """Name of the global average."""
        return f"{self.dense.name}_pool"

    def convolutions(self) -> dict[str, list[NewLayer]]:
        """Return what takes the places of the layers: the same on a map of this size."""
        found: dict[str, list[NewLayer]] = {self.path[0].name: []}
        kernel_size = self.shape[:2]
        for layer in self.path[1:]:
            if isinstance(layer, layers.BatchNormalization):
                config = {**layer.get_config(), "axis": -1}
                found[layer.name] = [NewLayer(type(layer).from_config(config), tuple(layer.get_weights()))]
            if isinstance(layer, layers.Dense):
                last = layer is self.path[-1]
                found[layer.name] = self._convolution(layer, kernel_size, last=last)
                kernel_size = (1, 1)
        return found

    def _convolution(self, dense: tf_keras.layers.Dense, size: tuple[int, int], *, last: bool) -> list[NewLayer]:
        kernel, *bias = dense.get_weights()
        # A softmax is over the classes of the image, not of each place.
        behind = last and dense.activation is tf_keras.activations.softmax
        convolution = layers.Conv2D(
            dense.units,
            size,
            use_bias=dense.use_bias,
            activation=None if behind else dense.activation,
            kernel_regularizer=dense.kernel_regularizer,
            name=dense.name,
        )
        chain = [NewLayer(convolution, (kernel.reshape(*size, -1, dense.units), *bias))]
        if last:
            chain.append(NewLayer(layers.GlobalAveragePooling2D(name=self.pool)))
        if behind:
            chain.append(NewLayer(layers.Activation("softmax", name=f"{dense.name}_softmax")))
        return chain


def _heads(model: tf_keras.Model) -> list[_Head | Skipped]:
    """Return the heads of the model, and the Flatten layers that begin none."""
    following, times = consumers(model), calls(model)
    outputs = {tensor.node.layer.name for tensor in model.outputs}
    flattens = [layer for layer in model.layers if isinstance(layer, layers.Flatten)]
    return [_head(flatten, following, times, outputs) for flatten in flattens]


def _head(
    flatten: Any, following: Mapping[str, list[Any]], times: Mapping[str, int], outputs: set[str]
) -> _Head | Skipped:
    if times[flatten.name] > 1:
        return Skipped(flatten.name, "called more than once")
    shape = tuple(flatten.input_shape[1:])
    if len(shape) != 3 or None in shape or flatten.data_format != "channels_last":
        return Skipped(flatten.name, f"it reads {shape}, no map of height, width and channels")
    path = [flatten]
    while path[-1].name not in outputs and len(following[path[-1].name]) == 1:
        (layer,) = following[path[-1].name]
        before_dense = not any(isinstance(one, layers.Dense) for one in path)
        normalises_map = isinstance(layer, layers.BatchNormalization) and before_dense
        fits = type(layer) is layers.Dense or (isinstance(layer, _ELEMENTWISE) and not normalises_map)
        softmax = getattr(path[-1], "activation", None) is tf_keras.activations.softmax
        if not fits or softmax or times[layer.name] > 1:
            break
        path.append(layer)
    while path and not isinstance(path[-1], layers.Dense):
        path.pop()
    if not path:
        return Skipped(flatten.name, "no Dense layer reads it alone, through layers that treat each number by itself")
    return _Head(path, shape)
