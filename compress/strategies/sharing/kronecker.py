"""Kronecker products: a large matrix out of two small ones, or a sum of such products.

Source: Van Loan and Pitsianis, "Approximation with Kronecker Products" (1993); Zhou and Wu (arXiv 1507.05775).
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import tf_keras
from annotated_types import Ge
from pydantic.dataclasses import dataclass

from compress.strategies.sharing.structured import Matrix, Structured
from compress.strategies.strategy import STRICT

layers = tf_keras.layers


@dataclass(frozen=True, config=STRICT)
class Kronecker(Structured):
    """Dense layers that are sums of ``rank`` Kronecker products of two matrices, as square as the layer's shape allows.

    Both weights and multiply-adds are saved.
    """

    rank: Annotated[int, Ge(1)] = 4

    def project(self, matrix: np.ndarray) -> Matrix | str:
        """Take the leading singular vectors of the rearranged matrix: the nearest such sum in least squares."""
        inputs, outputs = matrix.shape
        options = [(a, c) for a in _divisors(inputs) for c in _divisors(outputs)]
        options = [(a, c) for a, c in options if 1 < a * c < inputs * outputs]
        if not options:
            return f"{inputs} x {outputs} is no product of two sizes"
        # The fewest numbers; of several such, the squarest: a row times a column is of rank one only.
        first, second = min(
            options,
            key=lambda o: (
                o[0] * o[1] + (inputs // o[0]) * (outputs // o[1]),
                max(o[0], inputs // o[0]) + max(o[1], outputs // o[1]),
            ),
        )
        left, right = (first, second), (inputs // first, outputs // second)
        rank = min(self.rank, first * second, right[0] * right[1])
        rearranged = matrix.reshape(left[0], right[0], left[1], right[1]).transpose(0, 2, 1, 3)
        flat = rearranged.reshape(left[0] * left[1], -1).astype(np.float64)
        vectors, values, others = np.linalg.svd(flat, full_matrices=False)
        root = np.sqrt(values[:rank])
        outer = (vectors[:, :rank] * root).reshape(*left, rank).transpose(0, 2, 1)
        inner = (others[:rank].T * root).reshape(*right, rank)
        chain: list[tuple[tf_keras.layers.Layer, list[np.ndarray]]] = [
            (layers.Reshape((left[0], right[0])), []),
            (layers.Dense(right[1] * rank, use_bias=False), [inner.reshape(right[0], -1).astype(np.float32)]),
            (layers.Reshape((left[0], right[1], rank)), []),
            (layers.Permute((2, 1, 3)), []),
            (layers.Reshape((right[1], left[0] * rank)), []),
            (layers.Dense(left[1], use_bias=False), [outer.reshape(left[0] * rank, -1).astype(np.float32)]),
            (layers.Permute((2, 1)), []),
            (layers.Reshape((outputs,)), []),
        ]
        return Matrix(chain, outer.size + inner.size)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
