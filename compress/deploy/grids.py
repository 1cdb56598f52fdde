"""Writes weights that lie on grids into a ``.tflite`` file: the very levels, packed where they are small."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from tensorflow.lite.python import schema_py_generated as schema

from compress.candidate import Grid
from compress.deploy.flatbuffer import add_buffer, expand, parse, serialize
from compress.errors import CompressError
from compress.metrics.tflite_file import KernelPlace, TFLiteFile

_PACKED = {"CONV_2D", "FULLY_CONNECTED"}
"""Operators whose kernels LiteRT reads in four bits."""
_LEAST = 1024
"""Smaller kernels stay floats, as the converter's own do."""


def write_grids(content: bytes, kernels: Mapping[str, tuple[np.ndarray, Grid]]) -> bytes:
    """Return the file with the levels of the grids in place of what the converter has rounded to.

    Args:
        content: a file with integer weights; the output channels of each have scales of their own.
        kernels: layer name -> its kernel, whose values lie on the grid, and the grid.

    Raises:
        CompressError: naming a layer whose kernel is not found among the file's.
    """
    file, model = TFLiteFile(content), parse(content)
    tensors = model.subgraphs[0].tensors
    for layer, (kernel, grid) in kernels.items():
        place = file.kernel_place(layer, kernel.shape)
        if place is None or file.tensors[place.kernel].dtype != np.int8:
            raise CompressError(
                f"export of layer {layer}",
                expected=f"integer weights of shape {kernel.shape} under its name in the file",
                received="none",
                fix="Leave the layer out: strategy.quantize.skip=[{name: " + layer + "}].",
            )
        steps = place.to_file(np.broadcast_to(grid.steps, kernel.shape))
        written = _stored(model, place, place.to_file(kernel), steps, grid.bits)
        weight = tensors[place.kernel]
        ratios = written.quantization.scale / np.asarray(weight.quantization.scale, np.float64)
        weight.type, weight.buffer, weight.quantization = written.type, written.buffer, written.quantization
        if place.bias is not None:
            _rescale(model, tensors[place.bias], ratios)
    return serialize(model)


def expand_from_grids(
    content: bytes, kernels: Mapping[str, tuple[np.ndarray, Grid]], *, per_tensor: bool, floats: Collection[str]
) -> bytes:
    """Return the float file with its kernels stored as levels, which are expanded before they are used.

    Args:
        content: a file of floats.
        kernels: layer name -> its kernel, whose values lie on the grid, and the grid; other kernels of 1,024 weights
            and more are rounded to the nearest of 8 bits.
        per_tensor: round each other kernel to one grid instead of one for each output.
        floats: layers whose kernels stay as they are.
    """
    file, model = TFLiteFile(content), parse(content)
    grids = {
        place.kernel: (place.to_file(np.broadcast_to(grid.steps, kernel.shape)), grid.bits)
        for layer, (kernel, grid) in kernels.items()
        if (place := file.kernel_place(layer, kernel.shape)) is not None
    }
    spared = {op.inputs[1] for layer in floats for op in file.operators_of(layer)}
    for place in {place.kernel: place for place in file.kernel_places}.values():
        values = np.asarray(file.tensors[place.kernel].data)
        if place.kernel in spared or (values.size < _LEAST and place.kernel not in grids):
            continue
        others = tuple(axis for axis in range(values.ndim) if per_tensor or axis != place.channel_axis)
        nearest = np.maximum(np.abs(values).max(others, keepdims=True), 1e-12) / 127
        steps, bits = grids.get(place.kernel, (np.broadcast_to(nearest, values.shape), 8))
        stored = _stored(model, place, values, steps, bits)
        if per_tensor and place.kernel not in grids:
            stored.quantization.scale, stored.quantization.zeroPoint = stored.quantization.scale[:1], [0]
        expand(model, place.kernel, stored, schema.BuiltinOperator.DEQUANTIZE, schema.DequantizeOptionsT())
    return serialize(model)


def _stored(
    model: schema.ModelT, place: KernelPlace, values: np.ndarray, steps: np.ndarray, bits: int
) -> schema.TensorT:
    """Return a tensor of integers for ``values`` in the layout of the file; its buffer is in the model already."""
    levels = np.rint(values / steps).astype(np.int8)
    scales = np.moveaxis(steps, place.channel_axis, 0).reshape(steps.shape[place.channel_axis], -1)[:, 0]
    packed = bits <= 4 and place.operator in _PACKED
    return schema.TensorT(
        type=schema.TensorType.INT4 if packed else schema.TensorType.INT8,
        buffer=add_buffer(model, _pack(levels) if packed else levels),
        quantization=schema.QuantizationParametersT(
            scale=scales.astype(np.float32),
            zeroPoint=np.zeros(len(scales), np.int64),
            quantizedDimension=place.channel_axis,
        ),
    )


def _pack(levels: np.ndarray) -> np.ndarray:
    """Return two levels of four bits in each byte, the first one in its lower half."""
    flat = levels.reshape(-1)
    flat = np.append(flat, np.zeros(len(flat) % 2, np.int8)) & 15
    return (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8)


def _rescale(model: schema.ModelT, bias: schema.TensorT, ratios: np.ndarray) -> None:
    """Write a bias anew whose scale, that of the input times that of the kernel, has changed by ``ratios``."""
    kind = np.int64 if bias.type == schema.TensorType.INT64 else np.int32
    values = model.buffers[bias.buffer].data.view(kind) / ratios
    limits = np.iinfo(kind)
    bias.buffer = add_buffer(model, np.clip(np.rint(values), limits.min, limits.max).astype(kind))
    bias.quantization.scale = (np.asarray(bias.quantization.scale) * ratios).astype(np.float32)
