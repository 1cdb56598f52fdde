"""What each layer of a stage's model has and costs."""

from __future__ import annotations

import tf_keras

from compress.candidate import Coder, Numbers
from compress.deploy.packing import packed_bytes

_LAYER_CODERS: tuple[Coder, ...] = ("none", "huffman", "ans")


def layer_table(model: tf_keras.Model) -> dict[str, dict[str, int]]:
    """Return for every layer with kernels: output channels, weights (no biases), non-zero weights, multiply-adds.

    And about how many bytes its kernels take in a packed file of float weights, by coder.
    """
    from compress.graph.kernels import kernel_attributes, kernels
    from compress.graph.rewrite import positions

    channels = {
        layer.name: int(shapes[0][-1] or 0) for layer, _, shapes in positions(model) if kernel_attributes(layer)
    }
    table: dict[str, dict[str, int]] = {}
    for kernel in kernels(model):
        name = kernel.layer.name
        row = table.setdefault(name, {"channels": channels[name], "params": 0, "nonzero": 0, "macs": 0})
        row["params"] += kernel.size
        row["nonzero"] += int((kernel.value != 0).sum())
        row["macs"] += kernel.macs
        for coder in _LAYER_CODERS:
            key = f"packed_{coder}"
            row[key] = row.get(key, 0) + packed_bytes(kernel.value, coder)
    return table


def whole_table(name: str, numbers: Numbers) -> dict[str, dict[str, int]]:
    """Return such a table with one row, of a model that has no layers to look at."""
    return {name: {"params": numbers.params, "nonzero": numbers.nonzero_params, "macs": numbers.macs}}
