"""A convolution as a depthwise k x k and a 1 x 1 one.

Source: Howard et al., MobileNets (arXiv 1704.04861, section 3.1), for the form. The start nearest to the weights is,
for each input channel, the best rank-``depth_multiplier`` product of spatial filters and channel weights, by singular
value decomposition; nearest to the outputs, both factors are solved for in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tf_keras

from compress.graph.kernels import Kernel
from compress.graph.rewrite import NewLayer
from compress.strategies.compact.alternation import descended_first, solved_last
from compress.strategies.compact.form import Form, Parts, bias_of
from compress.strategies.compact.separable_form import SeparableForm
from compress.strategies.goal import Goal, roots

_FORMULA = "yxcm,cmf->yxcf"
_SWEEPS, _LATER_SWEEPS = 4, 1


@dataclass(frozen=True)
class Separable(Form):
    """Parts: the depthwise kernel [h, w, c, m], the pointwise kernel [c, m, f]."""

    depth_multiplier: int = 1
    name = "separable"

    def misfit(self, layer: tf_keras.layers.Conv2D) -> str | None:
        """What a depthwise convolution has no counterpart of, and what would not be cheaper."""
        if layer.strides[0] != layer.strides[1]:
            return f"strides {layer.strides} differ; a depthwise convolution has one stride"
        if layer.strides[0] > 1 and max(layer.dilation_rate) > 1:
            return "strided and dilated at once"
        places = layer.kernel_size[0] * layer.kernel_size[1]
        if self.depth_multiplier > places:
            return f"depth multiplier {self.depth_multiplier} above its {places} filter positions"
        return None

    def macs(self, kernel: Kernel) -> float:
        """Both parts are applied at the places that the layer writes."""
        height, width, channels, filters = kernel.value.shape
        return kernel.macs_per_weight * channels * self.depth_multiplier * (height * width + filters)

    def nearest(self, goal: Goal, start: Parts | None = None) -> Parts:
        """By formula for the weights; for outputs both in turn."""
        height, width, channels, filters = goal.kernel.shape
        m = self.depth_multiplier
        if goal.inputs is None:
            depthwise, pointwise, _ = separable_approximation(goal.kernel, m)
            return depthwise, pointwise.reshape(channels, m, filters)
        first, last = start or self._whitened(goal)
        everything = [(np.arange(filters), np.arange(channels * m))]
        for sweep in range(_LATER_SWEEPS if start else _SWEEPS):
            if start or sweep:
                first = descended_first(_FORMULA, goal, first, last)
            before = np.einsum("yxcm,cd->yxcdm", first, np.eye(channels)).reshape(height * width * channels, -1)
            last = solved_last(goal, before, everything).reshape(channels, m, filters)
        return first, last

    def _whitened(self, goal: Goal) -> Parts:
        """Return the best start if different channels were not correlated."""
        height, width, channels, filters = goal.kernel.shape
        assert goal.inputs is not None
        places, m = height * width, self.depth_multiplier
        moments = np.einsum("pcqc->cpq", goal.inputs.reshape(places, channels, places, channels))
        turned = goal.kernel.reshape(places, channels, filters).transpose(1, 0, 2)
        found = [roots(matrix) for matrix in moments]
        root, inverse = (np.stack(side) for side in zip(*found, strict=True))
        left, values, right = np.linalg.svd(root @ turned, full_matrices=False)
        m = min(m, values.shape[1])
        depthwise = np.zeros((channels, places, self.depth_multiplier))
        depthwise[..., :m] = (inverse @ left[:, :, :m]) * values[:, None, :m]
        pointwise = np.zeros((channels, self.depth_multiplier, filters))
        pointwise[:, :m] = right[:, :m]
        return depthwise.transpose(1, 0, 2).reshape(height, width, channels, -1), pointwise

    def kernel(self, parts: Parts) -> np.ndarray:
        """The product."""
        return np.einsum(_FORMULA, *parts, optimize=True)

    def build(self, layer: tf_keras.layers.Conv2D, parts: Parts) -> list[NewLayer]:
        """The pointwise part keeps the old layer's name, bias and activation."""
        depthwise, pointwise = parts
        first = tf_keras.layers.DepthwiseConv2D(
            layer.kernel_size,
            strides=layer.strides,
            padding=layer.padding,
            dilation_rate=layer.dilation_rate,
            depth_multiplier=depthwise.shape[3],
            use_bias=False,
            name=self.added(layer.name)[0],
        )
        one_pixel = {"kernel_size": (1, 1), "strides": (1, 1), "padding": "valid", "dilation_rate": (1, 1)}
        last = tf_keras.layers.Conv2D.from_config(layer.get_config() | one_pixel)
        return [
            NewLayer(first, (depthwise,)),
            NewLayer(last, (pointwise.reshape(1, 1, -1, pointwise.shape[-1]), *bias_of(layer))),
        ]

    def added(self, name: str) -> list[str]:
        """The depthwise part."""
        return [f"{name}_depthwise"]

    def guarantee(self, stage: str, names: Sequence[str]) -> SeparableForm:
        """There is a depthwise part."""
        return SeparableForm(stage, {name: self.added(name)[0] for name in names})


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
