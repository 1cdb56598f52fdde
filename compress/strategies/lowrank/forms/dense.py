"""A Dense layer as two: its matrix by singular value decomposition. Source: Denton et al. (arXiv 1404.0736)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tf_keras

from compress.strategies.lowrank.form import Decomposition, Form
from compress.strategies.lowrank.matrices import product


class DenseProduct(Form):
    """Inputs to ``rank`` channels, then to the outputs."""

    name, formula, automatic = "dense", "cr,rf->cf", True

    def misfit(self, layer: tf_keras.layers.Layer) -> str | None:
        """Only Dense layers."""
        return None if isinstance(layer, tf_keras.layers.Dense) else "it is no Dense layer"

    def highest(self, shape: Sequence[int]) -> int:
        """The shorter side."""
        return min(shape)

    def decompose(self, kernel: np.ndarray, most: int) -> Decomposition:
        """Singular value decomposition."""
        found = product(kernel, most)
        return Decomposition(lambda: found.errors, lambda r: [found.left[:, :r], found.right[:r]], found.spectrum)
