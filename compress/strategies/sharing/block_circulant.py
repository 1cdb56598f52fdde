"""Block-circulant matrices: in each block every row is the one before, turned by one.

Source: Cheng, Yu, Feris, Kumar, Choudhary, Chang (arXiv 1502.03436); Ding et al., CirCNN (arXiv 1708.08917).
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import tf_keras
from annotated_types import Ge
from pydantic.dataclasses import dataclass

from compress.strategies.sharing.structured import Matrix, Structured, blocks_of
from compress.strategies.strategy import STRICT

layers = tf_keras.layers


@dataclass(frozen=True, config=STRICT)
class BlockCirculant(Structured):
    """Dense layers of circulant blocks of ``block`` x ``block``: as many times fewer weights.

    The product is a convolution along the circle, and the file runs it as such: that saves weights, no multiply-adds.
    """

    block: Annotated[int, Ge(2)] = 4

    def project(self, matrix: np.ndarray) -> Matrix | str:
        """Average the entries that a circulant block has in common: the nearest one in least squares."""
        blocks = blocks_of(matrix, self.block)
        if isinstance(blocks, str):
            return blocks
        rows, columns, size, _ = blocks.shape
        turn, place = np.indices((size, size))
        circle = blocks[:, :, (place + turn) % size, place].mean(-1)
        chain: list[tuple[tf_keras.layers.Layer, list[np.ndarray]]] = [
            # The circle twice over: a convolution reads past its end.
            (layers.RepeatVector(2), []),
            (layers.Reshape((2, rows, size)), []),
            (layers.Permute((1, 3, 2)), []),
            (layers.Reshape((2 * size, rows)), []),
            (layers.Cropping1D((0, 1)), []),
            (layers.Conv1D(columns, size, use_bias=False), [circle.transpose(2, 0, 1)]),
            (layers.Permute((2, 1)), []),
            (layers.Reshape((columns * size,)), []),
        ]
        return Matrix(chain, circle.size)
