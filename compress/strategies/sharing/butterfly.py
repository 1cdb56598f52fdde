"""Butterfly matrices: as the fast Fourier transform, a product of few sparse factors that mix pairs.

Source: Dao, Gu, Eichhorn, Rudra, Re (arXiv 1903.05895); the projection, one factor after the other by best
approximations of rank one: Le, Zheng, Riccietti, Gribonval (arXiv 2110.01230).
"""

from __future__ import annotations

import numpy as np
import tf_keras
from pydantic.dataclasses import dataclass

from compress.strategies.sharing.structured import Matrix, Structured
from compress.strategies.strategy import STRICT

layers = tf_keras.layers

Chain = list[tuple[tf_keras.layers.Layer, list[np.ndarray]]]


@dataclass(frozen=True, config=STRICT)
class Butterfly(Structured):
    """Dense layers that are butterfly matrices: 2 n log2(n) numbers for n x n, n being filled up to a power of two.

    Both weights and multiply-adds are saved, many of them; few trained matrices are near a butterfly, so it asks for
    long recovery.
    """

    def project(self, matrix: np.ndarray) -> Matrix | str:
        """Split off one factor after the other."""
        inputs, outputs = matrix.shape
        size = 1 << (max(inputs, outputs) - 1).bit_length()
        if size < 4:
            return f"{inputs} x {outputs} is too small for a butterfly"
        square = np.zeros((size, size))
        square[:inputs, :outputs] = matrix
        chain: Chain = []
        if inputs < size:
            chain += [(layers.Reshape((inputs, 1)), []), (layers.ZeroPadding1D((0, size - inputs)), [])]
        rest = square[None]
        groups, half = 1, size // 2
        while half:
            mixing, rest = _split_off(rest)
            chain += [
                (layers.Reshape((groups, 2, half)), []),
                (layers.Permute((2, 1, 3)), []),
                (layers.Reshape((2, 1, groups * half)), []),
                # Each channel of two places becomes two numbers: the pairs' mixing.
                (layers.DepthwiseConv2D((2, 1), depth_multiplier=2, use_bias=False), [mixing]),
                (layers.Reshape((groups, half, 2)), []),
                (layers.Permute((1, 3, 2)), []),
            ]
            groups, half = 2 * groups, half // 2
        # What is left are the factors' signs and sizes, one number for each output.
        chain[-3][1][0] *= rest.reshape(groups // 2, 1, 2).transpose(1, 0, 2).reshape(1, 1, groups // 2, 2)
        chain += [(layers.Reshape((size, 1)), [])]
        if outputs < size:
            chain += [(layers.Cropping1D((0, size - outputs)), [])]
        chain += [(layers.Reshape((outputs,)), [])]
        return Matrix(chain, 2 * size * (size.bit_length() - 1))


def _split_off(matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split the first factor off square matrices [g, n, n].

    Rows k and k + n/2, cut into halves, are multiples of one row each: the first row of what is left of each half.

    Returns:
        The kernel [2, 1, g n/2, 2] that mixes the pairs, and what is left, [2 g, n/2, n/2].
    """
    groups, size, _ = matrices.shape
    half = size // 2
    # [g, pair's two rows, k, output half, column] -> [g, k, output half, pair's two rows, column].
    pairs = matrices.reshape(groups, 2, half, 2, half).transpose(0, 2, 3, 1, 4)
    vectors, values, rows = np.linalg.svd(pairs, full_matrices=False)
    root = np.sqrt(values[..., :1])
    mixing = vectors[..., 0] * root
    left = (rows[..., 0, :] * root).transpose(0, 2, 1, 3).reshape(2 * groups, half, half)
    # The kernel's first axis is the place in the pair, its last one the half that is written.
    kernel = mixing.transpose(3, 0, 1, 2).reshape(2, 1, groups * half, 2)
    return kernel.astype(np.float32), left
