"""A convolution as k x 1, then 1 x k.

Sources: Jaderberg et al. (arXiv 1405.3866, scheme 2); Tai et al. (arXiv 1511.06067), who give the optimum as an SVD.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tf_keras

from compress.strategies.lowrank.form import Decomposition, Form
from compress.strategies.lowrank.matrices import product


class Spatial(Form):
    """The kernel as a matrix of (rows, channels read) by (columns, channels written)."""

    name, formula, automatic = "spatial", "ycr,xrf->yxcf", True

    def misfit(self, layer: tf_keras.layers.Layer) -> str | None:
        """Convolutions with several rows and columns."""
        if not isinstance(layer, tf_keras.layers.Conv2D):
            return "it is no convolution"
        return None if min(layer.kernel.shape[:2]) > 1 else "its kernel has one row or one column"

    def highest(self, shape: Sequence[int]) -> int:
        """The shorter side of the matrix."""
        height, width, channels, filters = shape
        return min(height * channels, width * filters)

    def decompose(self, kernel: np.ndarray, most: int) -> Decomposition:
        """Singular value decomposition."""
        height, width, channels, filters = kernel.shape
        found = product(kernel.transpose(0, 2, 1, 3).reshape(height * channels, width * filters), most)

        def factors(rank: int) -> list[np.ndarray]:
            rows = found.right[:rank].reshape(rank, width, filters).transpose(1, 0, 2)
            return [found.left[:, :rank].reshape(height, channels, rank), rows]

        return Decomposition(lambda: found.errors, factors, found.spectrum)
