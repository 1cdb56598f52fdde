"""A convolution as 1 x 1, depthwise k x k, 1 x 1: a sum of products of vectors (canonical polyadic decomposition).

Sources: Lebedev et al. (arXiv 1412.6553); Astrid and Lee (arXiv 1701.07148), who keep the k x k places as one axis.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import tf_keras

from compress.strategies.lowrank.form import Decomposition, Form, sampled

_ITERATIONS = 60
_RIDGE = 1e-10
"""Of the least squares, for a kernel of norm 1: with fewer directions than the rank they have no single solution."""


class Cp(Form):
    """The kernel as a tensor of channels read, places and filters."""

    name, formula = "cp", "cr,yxr,rf->yxcf"

    def misfit(self, layer: tf_keras.layers.Layer) -> str | None:
        """Convolutions of more than one pixel with strides that a depthwise one can have."""
        if not isinstance(layer, tf_keras.layers.Conv2D):
            return "it is no convolution"
        if max(layer.kernel.shape[:2]) == 1:
            return "its kernel is one pixel"
        return None if len(set(layer.strides)) == 1 else "a depthwise convolution has the same stride along both axes"

    def highest(self, shape: Sequence[int]) -> int:
        """The product of the two shortest of the three axes: no tensor has a higher rank."""
        shortest = sorted((int(np.prod(shape[:-2])), *shape[-2:]))
        return shortest[0] * shortest[1]

    def decompose(self, kernel: np.ndarray, most: int) -> Decomposition:
        """Alternating least squares of tensorly."""
        from tensorly.decomposition import parafac

        height, width, channels, filters = kernel.shape
        scale = max(float(np.linalg.norm(kernel)), np.finfo(np.float32).tiny)
        tensor = (kernel / scale).astype(np.float64).reshape(height * width, channels, filters)

        def factors(rank: int) -> list[np.ndarray]:
            if not tensor.any():
                return [np.zeros((channels, rank)), np.zeros((height, width, rank)), np.zeros((rank, filters))]
            with warnings.catch_warnings():
                # Beyond the length of an axis it starts from random vectors, which is fine.
                warnings.filterwarnings("ignore", "Trying to compute SVD", UserWarning)
                weights, (places, reading, writing) = parafac(
                    tensor, rank, n_iter_max=_ITERATIONS, init="svd", tol=1e-6, random_state=0, l2_reg=_RIDGE
                )
            return [scale * reading * weights, places.reshape(height, width, rank), writing.T]

        return sampled(self, kernel, most, factors)
