"""Names for kernels that the converter has written under none: those of grouped convolutions."""

from __future__ import annotations

from collections import Counter

import numpy as np
import tf_keras

from compress.deploy.flatbuffer import parse, serialize
from compress.graph.kernels import Kernel, kernels
from compress.metrics.tflite_file import KernelPlace, TFLiteFile

_TOLERANCE = 1e-4


def with_kernels_named(content: bytes, model: tf_keras.Model) -> bytes:
    """Return the float file of a model with a layer's name on each kernel that it can be told of by its values.

    Only where a file has several kernels of one size without a name: one alone is found without.

    Args:
        content: the file, its weights still floats.
        model: what it was made from.
    """
    file = TFLiteFile(content)
    shapes = Counter(kernel.value.shape for kernel in kernels(model) if _grouped(kernel))
    lost = [
        kernel
        for kernel in kernels(model)
        if shapes[kernel.value.shape] > 1 and not file.kernel_places_of(kernel.layer.name, kernel.value.shape)
    ]
    nameless = {
        op.inputs[1]: KernelPlace.of(op, tensor)
        for op, tensor in file.weighted
        if "/" not in tensor.name and tensor.dtype == np.float32
    }
    if not lost or not nameless:
        return content
    changed = parse(content)
    for kernel in lost:
        found = next((i for i, place in nameless.items() if _same(file, i, place, kernel.value)), None)
        if found is not None:
            del nameless[found]
            changed.subgraphs[0].tensors[found].name = f"{kernel.layer.name}/Conv2D".encode()
    return serialize(changed)


def _grouped(kernel: Kernel) -> bool:
    return getattr(kernel.layer, "groups", 1) > 1


def _same(file: TFLiteFile, index: int, place: KernelPlace, kernel: np.ndarray) -> bool:
    """Say whether the file holds this kernel there, each channel maybe multiplied by a number."""
    written = np.asarray(file.tensors[index].data)
    if written.size != kernel.size:
        return False
    one, other = (
        np.moveaxis(values, place.channel_axis, 0).reshape(place.shape[place.channel_axis], -1).astype(np.float64)
        for values in (place.to_file(kernel), written)
    )
    squares = (one**2).sum(1)
    factors = np.where(squares > 0, (one * other).sum(1) / np.maximum(squares, 1e-30), 0.0)
    return bool(np.abs(other - factors[:, None] * one).max() <= _TOLERANCE * np.abs(other).max())
