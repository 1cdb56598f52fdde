"""Half of the filters, each of which gives itself and its negative to the ReLU.

Sources: Shang et al., CReLU (arXiv 1603.05201), who found that early filters come in pairs of opposite ones; Kim et
al., PVANET (arXiv 1608.08021), who scale and shift both of a pair. Pair and scale are one depthwise convolution of one
pixel that makes two channels of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tf_keras

from compress.graph.kernels import Kernel
from compress.graph.rewrite import NewLayer
from compress.strategies.compact.form import Form, Order, Parts, bias_of
from compress.strategies.compact.guarantees import PairedForm
from compress.strategies.goal import Goal
from compress.words import counted


@dataclass(frozen=True)
class CRelu(Form):
    """Parts: the kernel [h, w, c, f / 2] of one of each pair, and the scales [f]; pairs lie side by side."""

    name = "crelu"
    before_relu = True

    def misfit(self, layer: tf_keras.layers.Conv2D) -> str | None:
        """Filters go in pairs."""
        return f"{counted(layer.filters, 'filter is no pair', 'filters are not pairs')}" if layer.filters % 2 else None

    def macs(self, kernel: Kernel) -> float:
        """Half of the filters, and one product for each."""
        return kernel.macs / 2 + kernel.macs_per_weight * kernel.value.shape[3]

    def order(self, kernel: np.ndarray, inputs: Mapping[str, np.ndarray]) -> Order:
        """Have filters side by side that are nearly opposite."""
        matrix = (kernel * np.sqrt(inputs["whole"])[:, None]).reshape(-1, kernel.shape[3])
        return Order(filters=opposites(matrix))

    def nearest(self, goal: Goal, start: Parts | None = None) -> Parts:
        """For each pair the common kernel, by a singular value decomposition in the metric of the inputs."""
        weighted = goal.kernel if goal.inputs is None else (goal.inputs @ self._matrix(goal.kernel))
        first, second = (self._matrix(goal.kernel)[:, place::2] for place in (0, 1))
        others = [self._matrix(weighted)[:, place::2] for place in (0, 1)]
        gram = np.array([[np.sum(one * other, 0) for other in others] for one in (first, second)])
        _, vectors = np.linalg.eigh((gram + gram.swapaxes(0, 1)).transpose(2, 0, 1) / 2)
        scales = vectors[:, :, -1]
        # The larger scale of each pair is 1.
        largest = np.take_along_axis(scales, np.argmax(np.abs(scales), 1)[:, None], 1)
        common = (first * scales[:, 0] + second * scales[:, 1]) * largest[:, 0]
        shape = (*goal.kernel.shape[:3], len(scales))
        return common.reshape(shape), (scales / largest).reshape(-1)

    @staticmethod
    def _matrix(kernel: np.ndarray) -> np.ndarray:
        return kernel.reshape(-1, kernel.shape[-1])

    def kernel(self, parts: Parts) -> np.ndarray:
        """Each pair's common kernel, scaled."""
        common, scales = parts
        return np.repeat(common, 2, -1) * scales

    def build(self, layer: tf_keras.layers.Conv2D, parts: Parts) -> list[NewLayer]:
        """What scales keeps the old layer's name, bias and activation."""
        common, scales = parts
        half = layer.get_config() | {
            "filters": layer.filters // 2,
            "use_bias": False,
            "activation": "linear",
            "name": self.added(layer.name)[0],
        }
        pairs = tf_keras.layers.DepthwiseConv2D(
            1, depth_multiplier=2, use_bias=layer.use_bias, activation=layer.activation, name=layer.name
        )
        return [
            NewLayer(tf_keras.layers.Conv2D.from_config(half), (common,)),
            NewLayer(pairs, (scales.reshape(1, 1, -1, 2), *bias_of(layer))),
        ]

    def added(self, name: str) -> list[str]:
        """The filters."""
        return [f"{name}_half"]

    def guarantee(self, stage: str, names: Sequence[str]) -> PairedForm:
        """There are half as many filters as channels."""
        return PairedForm(stage, {name: self.added(name)[0] for name in names})


def opposites(matrix: np.ndarray) -> np.ndarray:
    """Return an order of the columns in which each two are opposite, the most opposite of those left first."""
    unit = matrix / np.maximum(np.linalg.norm(matrix, axis=0), 1e-30)
    cosines = unit.T @ unit
    np.fill_diagonal(cosines, np.inf)
    order: list[int] = []
    for _ in range(matrix.shape[1] // 2):
        pair = np.unravel_index(int(np.argmin(cosines)), cosines.shape)
        order += [int(place) for place in pair]
        cosines[list(pair)], cosines[:, list(pair)] = np.inf, np.inf
    return np.array(order)
