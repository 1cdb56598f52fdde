"""Dense layers of low displacement rank, which takes in Toeplitz-like matrices: few numbers for a large matrix.

Sources: Sindhwani, Sainath, Kumar: Structured Transforms for Small-Footprint Deep Learning (arXiv 1510.01722); Thomas
et al., Learning Compressed Transforms with Low Displacement Rank (arXiv 1810.02309).
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import tf_keras
from annotated_types import Ge
from pydantic.dataclasses import dataclass

from compress.strategies.sharing.displacement import nearest_pairs
from compress.strategies.sharing.structured import Matrix, Structured
from compress.strategies.strategy import STRICT

layers = tf_keras.layers

Chain = list[tuple[tf_keras.layers.Layer, list[np.ndarray]]]


@dataclass(frozen=True, config=STRICT)
class LowDisplacement(Structured):
    """Dense layers that are sums of ``rank`` products of a circulant and a skew-circulant matrix.

    A matrix that is not square is cut into square blocks along its longer side, which is filled up with zeros. A block
    of n x n takes 2 n rank numbers, as many as a product of two matrices of that rank. Both products are convolutions
    along a circle, and the file runs them as such: 2 rank times the multiply-adds of the dense layer. Few trained
    matrices are near to such sums: those of the large dense layers looked at here are about as near to a plain product
    of as many numbers (``lowrank``), which saves multiply-adds, too. So it asks for long recovery, or training anew.
    """

    rank: Annotated[int, Ge(1)] = 2

    def project(self, matrix: np.ndarray) -> Matrix | str:
        """Approximate each square block by alternating least squares."""
        inputs, outputs = matrix.shape
        size = min(inputs, outputs)
        count = -(-max(inputs, outputs) // size)
        numbers = 2 * size * self.rank * count
        if size < 2:
            return f"{inputs} x {outputs} is a vector"
        if self.rank >= size:
            return f"{size} x {size} blocks have no more than rank {size}"
        filled = np.zeros((size * count, size))
        filled[: max(inputs, outputs)] = matrix if inputs >= outputs else matrix.T
        blocks = filled.reshape(count, size, size)
        if inputs < outputs:
            blocks = blocks.transpose(0, 2, 1)
        pairs = [nearest_pairs(block, self.rank) for block in blocks]
        # A number stands in `size` places, so its gradient is as many times that of a weight. Written larger by the
        # root of that, and divided out between the two convolutions, each moves the matrix as far as a weight would.
        circulant, skew = (
            (np.sqrt(size) * np.stack(vectors, 1)).astype(np.float32)
            for vectors in ([pair.circulant for pair in pairs], [pair.skew for pair in pairs])
        )
        # Kernels [place on the circle, block, rank].
        if inputs >= outputs:
            chain = [*_filled_up(inputs, size * count), *_summed_blocks(circulant, skew)]
        else:
            chain = [*_blocks_side_by_side(circulant, skew), *_cut_off(size * count, outputs)]
        return Matrix(chain, numbers)


def _summed_blocks(circulant: np.ndarray, skew: np.ndarray) -> Chain:
    """Multiply each part of the input with its block, and sum: from [blocks * size] to [size]."""
    size, count, rank = circulant.shape
    return [
        (layers.RepeatVector(2), []),
        (layers.Reshape((2, count, size)), []),
        (layers.Permute((1, 3, 2)), []),
        (layers.Reshape((2 * size, 1, count)), []),
        (layers.Cropping2D(((0, 1), (0, 0))), []),
        (layers.DepthwiseConv2D((size, 1), depth_multiplier=rank, use_bias=False), [circulant[:, None]]),
        *_twice_with_signs(size, count * rank),
        (layers.Conv1D(1, size, use_bias=False), [skew.reshape(size, count * rank, 1)]),
        (layers.Reshape((size,)), []),
    ]


def _blocks_side_by_side(circulant: np.ndarray, skew: np.ndarray) -> Chain:
    """Multiply the input with each block: from [size] to [blocks * size]."""
    size, count, rank = circulant.shape
    chain: Chain = [
        (layers.RepeatVector(2), []),
        (layers.Reshape((2 * size, 1)), []),
        (layers.Cropping1D((0, 1)), []),
        (layers.Conv1D(count * rank, size, use_bias=False), [circulant.reshape(size, 1, count * rank)]),
        *_twice_with_signs(size, count * rank),
        (layers.Reshape((2 * size - 1, 1, count * rank)), []),
        # What follows is a mean, where a sum is meant.
        (layers.DepthwiseConv2D((size, 1), use_bias=False), [rank * skew.reshape(size, 1, count * rank, 1)]),
        (layers.Reshape((size, count * rank, 1)), []),
    ]
    if rank > 1:
        chain += [(layers.AveragePooling2D((1, rank)), [])]
    return [
        *chain,
        (layers.Reshape((size, count)), []),
        (layers.Permute((2, 1)), []),
        (layers.Reshape((count * size,)), []),
    ]


def _twice_with_signs(size: int, channels: int) -> Chain:
    """Put the negative of a circle behind it, as a skew-circulant convolution reads on: to [2 * size - 1, channels].

    Both are divided by ``size``, by which the kernels together are too large.
    """
    return [
        (layers.Reshape((size * channels,)), []),
        (layers.RepeatVector(2), []),
        (layers.Permute((2, 1)), []),
        (layers.Rescaling([1.0 / size, -1.0 / size]), []),
        (layers.Permute((2, 1)), []),
        (layers.Reshape((2 * size, channels)), []),
        (layers.Cropping1D((0, 1)), []),
    ]


def _filled_up(inputs: int, size: int) -> Chain:
    if inputs == size:
        return []
    return [
        (layers.Reshape((inputs, 1)), []),
        (layers.ZeroPadding1D((0, size - inputs)), []),
        (layers.Reshape((size,)), []),
    ]


def _cut_off(size: int, outputs: int) -> Chain:
    if outputs == size:
        return []
    return [
        (layers.Reshape((size, 1)), []),
        (layers.Cropping1D((0, size - outputs)), []),
        (layers.Reshape((outputs,)), []),
    ]
