"""Which kernels a sharing strategy works on, and why it leaves the others alone."""

from __future__ import annotations

from collections.abc import Callable, Collection

import tf_keras

from compress.candidate import Skipped
from compress.graph.fold import merged_on_export
from compress.graph.kernels import Kernel, kernels, without_kernel


def choose_kernels(
    model: tf_keras.Model, names: Collection[str], verb: str, obstacle: Callable[[Kernel], Skipped | None]
) -> tuple[list[Kernel], list[Skipped]]:
    """Return the kernels of the selected layers that values can be shared in, and the layers left alone.

    Args:
        model: with its batch norms folded.
        names: of the selected layers.
        verb: what is done to weights, as in "are not clustered".
        obstacle: says why the strategy itself leaves a kernel alone; None if it does not.
    """
    merged = merged_on_export(model)
    chosen: list[Kernel] = []
    skipped = [
        Skipped(layer.name, f"weights of {type(layer).__name__} layers are not {verb}")
        for layer in without_kernel(model)
        if layer.name in names
    ]
    for kernel in kernels(model):
        name = kernel.layer.name
        if name not in names:
            continue
        if name in merged:
            skipped.append(Skipped(name, "the export merges a normalisation next to it into its kernel"))
        elif (reason := obstacle(kernel)) is not None:
            skipped.append(reason)
        else:
            chosen.append(kernel)
    return chosen, skipped
