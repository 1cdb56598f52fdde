"""A convolution as 1 x 1 to few channels, k x k among them, 1 x 1 to the filters: Tucker-2.

Source: Kim et al. (arXiv 1511.06530).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tf_keras

from compress.strategies.lowrank.form import Decomposition, Form, Spectrum, Widths

_ITERATIONS = 10


class Tucker(Form):
    """Both channel axes are cut to the same share; the rank is that of the filters."""

    name, formula, automatic = "tucker", "cp,yxpq,qf->yxcf", True

    def misfit(self, layer: tf_keras.layers.Layer) -> str | None:
        """Convolutions of more than one pixel."""
        if not isinstance(layer, tf_keras.layers.Conv2D):
            return "it is no convolution"
        return None if max(layer.kernel.shape[:2]) > 1 else "its kernel is one pixel"

    def highest(self, shape: Sequence[int]) -> int:
        """As many as there are filters."""
        return shape[-1]

    def widths(self, shape: Sequence[int], ranks: np.ndarray) -> Widths:
        """Channels read in proportion to the filters, no more than the core can tell apart."""
        reading = np.maximum(1, np.rint(ranks * shape[-2] / shape[-1])).astype(int)
        return {"p": np.minimum(reading, shape[0] * shape[1] * ranks), "q": ranks}

    def decompose(self, kernel: np.ndarray, most: int) -> Decomposition:
        """Errors as of the higher-order SVD, a little above those of the factors, which tensorly iterates on."""
        from tensorly.decomposition import partial_tucker

        kernel = kernel.astype(np.float64)
        bases = []
        for axis in (2, 3):
            unfolded = np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1)
            values, vectors = np.linalg.eigh(unfolded @ unfolded.T)
            bases.append(vectors[:, ::-1])
            roots = np.sqrt(np.maximum(values[::-1], 0.0))
            spectrum = Spectrum(roots, (unfolded.shape[0], unfolded.shape[1]), float(np.sum(roots**2)))
        turned = np.einsum("yxcf,cp,fq->yxpq", kernel, *bases, optimize=True)
        kept = np.cumsum(np.cumsum(np.sum(turned**2, (0, 1)), 0), 1)
        ranks = np.arange(1, most + 1)
        energy = float(kept[-1, -1]) or 1.0
        errors = np.maximum(1.0 - kept[self.widths(kernel.shape, ranks)["p"] - 1, ranks - 1] / energy, 0.0)

        def factors(rank: int) -> list[np.ndarray]:
            wanted = [int(self.widths(kernel.shape, np.array([rank]))[letter][0]) for letter in "pq"]
            (core, (reading, writing)), _ = partial_tucker(kernel, wanted, modes=[2, 3], n_iter_max=_ITERATIONS)
            return [reading, core, writing.T]

        return Decomposition(lambda: errors, factors, spectrum)
