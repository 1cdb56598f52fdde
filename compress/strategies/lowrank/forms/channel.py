"""A convolution as k x k to few channels, then 1 x 1.

Sources: Denton et al. (arXiv 1404.0736); Zhang et al. (arXiv 1505.06798), whose principal components of the outputs
this form finds when it is fitted to outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tf_keras

from compress.strategies.lowrank.form import Decomposition, Form
from compress.strategies.lowrank.matrices import product


class Channel(Form):
    """The kernel as a matrix of inputs by filters."""

    name, formula, automatic = "channel", "yxcr,rf->yxcf", True

    def misfit(self, layer: tf_keras.layers.Layer) -> str | None:
        """Every convolution."""
        return None if isinstance(layer, tf_keras.layers.Conv2D) else "it is no convolution"

    def highest(self, shape: Sequence[int]) -> int:
        """The shorter side of the matrix."""
        return min(int(np.prod(shape[:-1])), shape[-1])

    def decompose(self, kernel: np.ndarray, most: int) -> Decomposition:
        """Singular value decomposition."""
        found = product(kernel.reshape(-1, kernel.shape[-1]), most)
        return Decomposition(
            lambda: found.errors,
            lambda r: [found.left[:, :r].reshape(*kernel.shape[:-1], r), found.right[:r]],
            found.spectrum,
        )
