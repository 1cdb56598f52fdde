"""Block-Toeplitz matrices: in each block every diagonal has one value.

Source: Sindhwani, Sainath, Kumar: Structured Transforms for Small-Footprint Deep Learning (arXiv 1510.01722).
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import tf_keras
from annotated_types import Ge
from pydantic.dataclasses import dataclass
from scipy.sparse import csr_array

from compress.strategies.sharing.structured import Matrix, Structured, blocks_of
from compress.strategies.strategy import STRICT

layers = tf_keras.layers


@dataclass(frozen=True, config=STRICT)
class BlockToeplitz(Structured):
    """Dense layers of Toeplitz blocks of ``block`` x ``block``: about half as many times fewer weights.

    The product is a convolution, and the file runs it as such: that saves weights, no multiply-adds.
    """

    block: Annotated[int, Ge(3)] = 8

    def project(self, matrix: np.ndarray) -> Matrix | str:
        """Average each diagonal of each block: the nearest such matrix in least squares."""
        blocks = blocks_of(matrix, self.block)
        if isinstance(blocks, str):
            return blocks
        rows, columns, size, _ = blocks.shape
        source, target = np.indices((size, size))
        diagonal = (source - target + size - 1).ravel()
        counts = np.bincount(diagonal)
        averaging = csr_array((1 / counts[diagonal], (diagonal, np.arange(size * size))))
        means = (averaging @ blocks.reshape(rows * columns, size * size).T).reshape(2 * size - 1, rows, columns)
        chain: list[tuple[tf_keras.layers.Layer, list[np.ndarray]]] = [
            (layers.Reshape((rows, size)), []),
            (layers.Permute((2, 1)), []),
            (layers.ZeroPadding1D(size - 1), []),
            (layers.Conv1D(columns, 2 * size - 1, use_bias=False), [means.astype(np.float32)]),
            (layers.Permute((2, 1)), []),
            (layers.Reshape((columns * size,)), []),
        ]
        return Matrix(chain, means.size)
