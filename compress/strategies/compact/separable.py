"""Compact filters: an ordinary convolution becomes a depthwise and a pointwise one.

Source: Howard et al., MobileNets (arXiv 1704.04861, section 3.1), for the form. The start is the least-squares
approximation of the old kernel in that form: for each input channel the best rank-``depth_multiplier`` product of
spatial filters and channel weights, by singular value decomposition.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import numpy as np
import tf_keras
from annotated_types import Ge, Gt, Lt
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate, Effect, Skipped
from compress.errors import CompressError
from compress.graph.kernels import kernels
from compress.graph.rewrite import NewLayer, calls, rewrite
from compress.graph.selection import Selection
from compress.strategies.compact.separable_form import SeparableForm
from compress.strategies.strategy import STRICT, Context, Strategy


@dataclass(frozen=True, config=STRICT)
class Compact(Strategy):
    """Replace Conv2D layers by depthwise-separable ones where that saves multiply-adds, then recover.

    ``depth_multiplier``: spatial filters for each input channel. ``macs``: replace, the least damaging saving first,
    until this share of the model's multiply-adds is left; all that pay if null.
    """

    depth_multiplier: Annotated[int, Ge(1)] = 1
    macs: Annotated[float, Gt(0), Lt(1)] | None = None

    effects = frozenset({Effect.TRAIN, Effect.REPLACE})
    establishes = SeparableForm

    def targets(self, model: tf_keras.Model, selection: Selection) -> frozenset[str]:
        """Only the Conv2D layers that can be replaced."""
        names = selection.names(model)
        return frozenset(
            layer.name
            for layer in model.layers
            if layer.name in names and isinstance(layer, tf_keras.layers.Conv2D) and self._obstacle(layer) is None
        )

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Replace, then recover."""
        model = candidate.model
        names, times = context.selection.names(model), calls(model)
        done = {name for g in candidate.guarantees if isinstance(g, SeparableForm) for name in g.layers}
        taken = {layer.name for layer in model.layers}
        skipped: list[Skipped] = []
        options: list[_Option] = []
        for kernel in kernels(model):
            layer = kernel.layer
            if layer.name in names and isinstance(layer, (tf_keras.layers.Conv1D, tf_keras.layers.Conv3D)):
                skipped.append(Skipped(layer.name, f"{type(layer).__name__} layers are not made separable"))
            if layer.name not in names or not isinstance(layer, tf_keras.layers.Conv2D):
                continue
            if isinstance(layer, tf_keras.layers.DepthwiseConv2D) or layer.name in done:
                skipped.append(Skipped(layer.name, "already separable", True))
                continue
            if f"{layer.name}_depthwise" in taken:
                skipped.append(Skipped(layer.name, f"the name {layer.name}_depthwise is taken"))
                continue
            reason = self._obstacle(layer) or ("called more than once" if times[layer.name] > 1 else None)
            if reason is not None:
                skipped.append(Skipped(layer.name, reason))
                continue
            depthwise, pointwise, error = separable_approximation(kernel.value, self.depth_multiplier)
            positions = kernel.macs // kernel.size
            saved = kernel.macs - positions * (depthwise.size + pointwise.size)
            options.append(_Option(layer, depthwise, pointwise, error, saved))
        chosen = self._within_budget(options, sum(k.macs for k in kernels(model)), context.stage)
        left = {option.layer.name for option in options} - {option.layer.name for option in chosen}
        skipped += [Skipped(name, "not needed for the budget", True) for name in sorted(left)]
        if not chosen:
            if done:
                return candidate.evolve(model=rewrite(model), skipped=context.skip(skipped))
            raise context.nothing_done("a Conv2D for which a separable one is cheaper", skipped)
        pairs = {option.layer.name: f"{option.layer.name}_depthwise" for option in chosen}
        compacted = rewrite(model, {option.layer.name: option.layers() for option in chosen})
        result = candidate.evolve(model=compacted, skipped=context.skip(skipped))
        result = result.replaced({name: [depthwise] for name, depthwise in pairs.items()})
        return context.recover(result.with_guarantee(SeparableForm(context.stage, pairs)))

    def _obstacle(self, layer: tf_keras.layers.Conv2D) -> str | None:
        """Say why the layer cannot or need not be replaced."""
        if isinstance(layer, (tf_keras.layers.DepthwiseConv2D, tf_keras.layers.Conv2DTranspose)):
            return "not an ordinary convolution"
        height, width, channels, filters = layer.kernel.shape
        if layer.groups > 1:
            return "a grouped convolution"
        if layer.data_format != "channels_last":
            return "channels first"
        if layer.strides[0] != layer.strides[1]:
            return f"strides {layer.strides} differ; a depthwise convolution has one stride"
        if layer.strides[0] > 1 and max(layer.dilation_rate) > 1:
            return "strided and dilated at once"
        multiplier = self.depth_multiplier
        if multiplier > height * width:
            return f"depth multiplier {multiplier} above its {height * width} filter positions"
        if (
            height * width * channels * multiplier + channels * multiplier * filters
            >= layer.kernel.shape.num_elements()
        ):
            return "a separable one would not be cheaper"
        return None

    def _within_budget(self, options: list[_Option], total: int, stage: str) -> list[_Option]:
        if self.macs is None:
            return options
        needed = total * (1 - self.macs)
        if sum(option.saved for option in options) < needed:
            reachable = 1 - sum(option.saved for option in options) / total
            raise CompressError(
                f"strategy.{stage}.macs",
                expected=f"at least {reachable:.3f}, what replacing every layer that pays leaves",
                received=f"{self.macs:g}",
                fix=f"Raise strategy.{stage}.macs or lower strategy.{stage}.depth_multiplier.",
            )
        ranked = sorted(options, key=lambda option: (option.error / option.saved, option.layer.name))
        savings = np.cumsum([option.saved for option in ranked])
        return ranked[: int(np.searchsorted(savings, needed)) + 1]


def separable_approximation(kernel: np.ndarray, depth_multiplier: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the separable convolution nearest to ``kernel`` [h, w, in, out] in the least-squares sense.

    Returns:
        The depthwise kernel [h, w, in, m], the pointwise kernel [1, 1, in * m, out], and the squared error relative
        to the squared norm of ``kernel``.
    """
    height, width, channels, filters = kernel.shape
    per_channel = kernel.transpose(2, 0, 1, 3).reshape(channels, height * width, filters).astype(np.float64)
    left, values, right = np.linalg.svd(per_channel, full_matrices=False)
    m = min(depth_multiplier, values.shape[1])
    root = np.sqrt(values[:, :m])
    depthwise = (left[:, :, :m] * root[:, None]).reshape(channels, height, width, m).transpose(1, 2, 0, 3)
    pointwise = (root[:, :, None] * right[:, :m]).reshape(1, 1, channels * m, filters)
    energy = float((values**2).sum())
    error = float((values[:, m:] ** 2).sum()) / energy if energy else 0.0
    return depthwise.astype(kernel.dtype), pointwise.astype(kernel.dtype), error


@dataclasses.dataclass(frozen=True)
class _Option:
    """One possible replacement: relative squared error and multiply-adds saved."""

    layer: tf_keras.layers.Conv2D
    depthwise: np.ndarray
    pointwise: np.ndarray
    error: float
    saved: int

    def layers(self) -> list[NewLayer]:
        """Return the chain; the pointwise part keeps the old layer's name, bias and activation."""
        old = self.layer
        depthwise = tf_keras.layers.DepthwiseConv2D(
            old.kernel_size,
            strides=old.strides,
            padding=old.padding,
            dilation_rate=old.dilation_rate,
            depth_multiplier=self.depthwise.shape[3],
            use_bias=False,
            name=f"{old.name}_depthwise",
        )
        config = old.get_config()
        config.update(kernel_size=(1, 1), strides=(1, 1), padding="valid", dilation_rate=(1, 1))
        bias = (np.asarray(old.bias),) if old.use_bias else ()
        return [
            NewLayer(depthwise, (self.depthwise,)),
            NewLayer(tf_keras.layers.Conv2D.from_config(config), (self.pointwise, *bias)),
        ]
