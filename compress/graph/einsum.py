"""Einstein sums as one matrix product: ``tf_keras`` cannot load a model that calls ``tf.einsum``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import tensorflow as tf


def einsum(equation: str, left: Any, right: Any) -> Any:
    """Return the sum of products of two tensors by transpositions, reshapes and one ``tf.matmul``.

    Raises:
        ValueError: if the equation has another form (``...``, a label twice or summed in one tensor only), or several
            sizes that are laid out anew are open.
    """
    form = re.fullmatch(r"(\w*),(\w*)->(\w*)", equation.replace(" ", ""))
    one, two, out = form.groups() if form else ("", "", "")
    batch = [label for label in out if label in one and label in two]
    summed = [label for label in one if label in two and label not in out]
    rows = [label for label in one if label not in two]
    columns = [label for label in two if label not in one]
    written = [*batch, *rows, *columns]
    if form is None or sorted(written) != sorted(out) or any(len(set(part)) < len(part) for part in (one, two)):
        raise ValueError(f"the equation {equation}")
    size = {label: n for part, x in ((one, left), (two, right)) for label, n in zip(part, x.shape, strict=True)}
    first = _laid_out(_ordered(left, one, [*batch, *rows, *summed]), size, [*([b] for b in batch), rows, summed])
    second = _laid_out(
        _ordered(right, two, [*batch, *summed, *columns]), size, [*([b] for b in batch), summed, columns]
    )
    product = tf.matmul(first, second)
    if len(rows) != 1 or len(columns) != 1:
        product = tf.reshape(product, _known([size[label] for label in written]))
    return _ordered(product, written, out)


def _ordered(x: Any, labels: Sequence[str], wanted: Sequence[str]) -> Any:
    order = [labels.index(label) for label in wanted]
    return x if order == sorted(order) else tf.transpose(x, order)


def _laid_out(x: Any, size: dict[str, int | None], axes: Sequence[Sequence[str]]) -> Any:
    """Return ``x`` with the labels of each of ``axes`` in one axis."""
    if all(len(labels) == 1 for labels in axes):
        return x
    sizes: list[int | None] = []
    for labels in axes:
        known: int | None = 1
        for label in labels:
            part = size[label]
            known = None if known is None or part is None else known * part
        sizes.append(known)
    return tf.reshape(x, _known(sizes))


def _known(sizes: Sequence[int | None]) -> list[int]:
    if sizes.count(None) > 1:
        raise ValueError(f"several open sizes, {tuple(sizes)}")
    return [-1 if size is None else size for size in sizes]
