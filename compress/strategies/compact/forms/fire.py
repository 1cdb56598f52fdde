"""A convolution as 1 x 1 to few channels, then 1 x 1 to half of the filters beside k x k to the others.

Source: Iandola et al., SqueezeNet (arXiv 1602.07360), whose squeeze layer has a ReLU; here it has none, so that the
start is a least-squares problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tf_keras

from compress.graph.kernels import Kernel
from compress.graph.rewrite import NewLayer
from compress.strategies.compact.alternation import descended_first, solved_last
from compress.strategies.compact.form import Form, Order, Parts, apart, keeps_size
from compress.strategies.compact.guarantees import FireForm
from compress.strategies.goal import Goal, roots

_FORMULA = "cs,yxsf->yxcf"
_SWEEPS, _LATER_SWEEPS = 4, 1


@dataclass(frozen=True)
class Fire(Form):
    """Parts: the squeeze kernel [c, s], the expand kernel [h, w, s, f]; the first filters have its middle only."""

    squeeze: float = 0.5
    name = "fire"

    def misfit(self, layer: tf_keras.layers.Conv2D) -> str | None:
        """Kernels with a middle, of more than one pixel."""
        if max(layer.kernel_size) == 1:
            return "its kernel is one pixel"
        return "a single filter" if layer.filters < 2 else keeps_size(layer) or apart(layer)

    def squeezed(self, shape: Sequence[int]) -> int:
        """Return the channels between squeeze and expand."""
        return max(1, round(self.squeeze * min(shape[2:])))

    def macs(self, kernel: Kernel) -> float:
        """Squeeze, and expand with one pixel and with all."""
        height, width, channels, filters = shape = kernel.value.shape
        small = filters // 2
        weights = self.squeezed(shape) * (channels + small + height * width * (filters - small))
        return kernel.macs_per_weight * weights

    def order(self, kernel: np.ndarray, inputs: Mapping[str, np.ndarray]) -> Order:
        """Have the filters first that are nearly one pixel."""
        height, width, channels, filters = kernel.shape
        around = np.sum(kernel**2, (0, 1)) - kernel[height // 2, width // 2] ** 2
        whole = np.broadcast_to(np.arange(filters) >= filters // 2, (channels, filters))
        return Order(around * inputs["whole"][:, None], whole)

    def nearest(self, goal: Goal, start: Parts | None = None) -> Parts:
        """Both in turn; the expand kernels are exact beside the squeeze kernel."""
        height, width, _, filters = shape = goal.kernel.shape
        first, last = start or (self._principal(goal, self.squeezed(shape)), np.zeros(0))
        s = first.shape[1]
        middle = np.arange(height * width * s).reshape(height, width, s)[height // 2, width // 2]
        small = filters // 2
        blocks = [(np.arange(small), middle), (np.arange(small, filters), np.arange(height * width * s))]
        for sweep in range(_LATER_SWEEPS if start else _SWEEPS):
            if start or sweep:
                first = descended_first(_FORMULA, goal, first, last)
            before = np.kron(np.eye(height * width), first)
            last = solved_last(goal, before, blocks).reshape(height, width, s, filters)
        return first, last

    @staticmethod
    def _principal(goal: Goal, most: int) -> np.ndarray:
        """Return the squeeze kernel that would be best if all filters had all pixels and these were not correlated."""
        height, width, channels, _ = goal.kernel.shape
        root = inverse = np.eye(channels)
        if goal.inputs is not None:
            moments = goal.inputs.reshape((height * width, channels) * 2)
            root, inverse = roots(np.einsum("pcpd->cd", moments))
        left, _, _ = np.linalg.svd(root @ np.moveaxis(goal.kernel, 2, 0).reshape(channels, -1), full_matrices=False)
        return inverse @ left[:, :most]

    def kernel(self, parts: Parts) -> np.ndarray:
        """The product."""
        return np.einsum(_FORMULA, *parts, optimize=True)

    def build(self, layer: tf_keras.layers.Conv2D, parts: Parts) -> list[NewLayer]:
        """The k x k part keeps the old layer's name."""
        squeeze, expand = parts
        kinds, filters, small = tf_keras.layers, layer.filters, layer.filters // 2
        height, width = layer.kernel_size
        names = self.added(layer.name)
        image = tf_keras.Input(layer.input_shape[1:])
        first = kinds.Conv2D(squeeze.shape[1], 1, use_bias=False, name=names[0])
        point = kinds.Conv2D(small, 1, use_bias=layer.use_bias, activation=layer.activation, name=names[1])
        large = kinds.Conv2D.from_config(layer.get_config() | {"filters": filters - small})
        value = first(image)
        joined = kinds.Concatenate(name=names[2])([point(value), large(value)])
        fragment = tf_keras.Model(image, joined, name=f"{layer.name}_fire")
        bias = np.asarray(layer.bias) if layer.use_bias else np.zeros(filters)
        weights = {
            first: (squeeze[None, None], None),
            point: (expand[height // 2, width // 2, :, :small][None, None], bias[:small]),
            large: (expand[..., small:], bias[small:]),
        }
        for new, (kernel, own) in weights.items():
            new.set_weights([kernel, own] if new.use_bias else [kernel])
        return [NewLayer(fragment)]

    def added(self, name: str) -> list[str]:
        """Squeeze, the one-pixel part of expand, and what joins it with the other."""
        return [f"{name}_{part}" for part in ("squeeze", "point", "concat")]

    def guarantee(self, stage: str, names: Sequence[str]) -> FireForm:
        """A squeeze layer comes before two expand layers."""
        return FireForm(stage, {name: self.added(name)[0] for name in names})
