"""Names for kernels that the converter has written under none: those of grouped convolutions."""

from __future__ import annotations

from collections import Counter

import numpy as np
import tf_keras

from compress.deploy.flatbuffer import parse, serialize
from compress.graph.kernels import Kernel, kernels
from compress.metrics.tflite_file import KernelPlace, TFLiteFile


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
        value = kernel.value
        found = next(
            (
                index
                for index, place in nameless.items()
                if np.prod(place.shape) == value.size
                and place.factors(value, np.asarray(file.tensors[index].data)) is not None
            ),
            None,
        )
        if found is not None:
            del nameless[found]
            changed.subgraphs[0].tensors[found].name = f"{kernel.layer.name}/Conv2D".encode()
    return serialize(changed)


def _grouped(kernel: Kernel) -> bool:
    return getattr(kernel.layer, "groups", 1) > 1
