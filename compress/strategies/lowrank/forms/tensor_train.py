"""A convolution as 1 x 1, k x 1, 1 x k, 1 x 1: a tensor train.

Source: Oseledets, Tensor-Train Decomposition (SIAM J. Sci. Comput. 33(5), 2011).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tf_keras

from compress.strategies.lowrank.form import Decomposition, Form, Widths, sampled


class TensorTrain(Form):
    """The kernel as a train of channels read, rows, columns and filters; all ranks are cut to the same share."""

    name, formula = "tensor_train", "cp,ypq,xqs,sf->yxcf"

    def misfit(self, layer: tf_keras.layers.Layer) -> str | None:
        """Convolutions with several rows and columns."""
        if not isinstance(layer, tf_keras.layers.Conv2D):
            return "it is no convolution"
        return None if min(layer.kernel.shape[:2]) > 1 else "its kernel has one row or one column"

    def highest(self, shape: Sequence[int]) -> int:
        """As many as there are channels read, which is where the first core ends."""
        return shape[2]

    def widths(self, shape: Sequence[int], ranks: np.ndarray) -> Widths:
        """The other ranks in proportion to the first, no higher than their neighbours allow."""
        height, width, channels, filters = shape
        share = ranks / channels
        first = np.minimum(ranks, height * width * filters)
        last = np.minimum(np.maximum(1, np.rint(share * filters)).astype(int), height * width * channels)
        middle = np.maximum(1, np.rint(share * min(height * channels, width * filters))).astype(int)
        middle = np.minimum(middle, np.minimum(height * first, width * last))
        return {"p": first, "q": middle, "s": np.minimum(last, width * middle)}

    def decompose(self, kernel: np.ndarray, most: int) -> Decomposition:
        """Singular value decompositions one after the other, by tensorly."""
        from tensorly.decomposition import tensor_train

        tensor = kernel.astype(np.float64).transpose(2, 0, 1, 3)

        def factors(rank: int) -> list[np.ndarray]:
            widths = self.widths(kernel.shape, np.array([rank]))
            cores = tensor_train(tensor, [1, *(int(widths[letter][0]) for letter in "pqs"), 1])
            first, rows, columns, last = (np.asarray(core) for core in cores)
            return [first[0], rows.transpose(1, 0, 2), columns.transpose(1, 0, 2), last[..., 0]]

        return sampled(self, kernel, most, factors)
