"""Writes weights that lie on grids into a ``.tflite`` file: the very levels, packed where they are small."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

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


def write_grids(
    content: bytes, floats: bytes, kernels: Mapping[str, tuple[np.ndarray, Grid]], *, packed: bool = True
) -> bytes:
    """Return the file with the levels of the grids in place of what the converter has rounded to.

    Args:
        content: a file with integer weights; the output channels of each have scales of their own.
        floats: the float file that it was made from.
        kernels: weight name -> its value, which lies on the grid, and the grid.
        packed: whether levels of four bits and fewer are stored two to a byte, where LiteRT reads them so.

    Raises:
        CompressError: naming a layer whose kernel is not found among the file's.
    """
    file, model = TFLiteFile(content), parse(content)
    tensors = model.subgraphs[0].tensors
    ratios: dict[int, np.ndarray] = {}
    rescaled: set[int] = set()
    found = list(_on_grids(TFLiteFile(floats), file, kernels))
    for place, values in found:
        if place.kernel not in ratios:
            weight = tensors[place.kernel]
            before = np.asarray(weight.quantization.scale, np.float64)
            biases = {other.bias for other, _ in found if other.kernel == place.kernel and other.bias is not None}
            values = values.with_room([_integers(model, tensors[bias]) for bias in biases], before, place.channel_axis)
            written = values.stored(model, place, packed=packed)
            ratios[place.kernel] = values.scales / before
            weight.type, weight.buffer, weight.quantization = written.type, written.buffer, written.quantization
        # Calls of one layer may share the kernel and have biases of their own: these depend on the inputs' scales.
        if place.bias is not None and place.bias not in rescaled:
            rescaled.add(place.bias)
            _rescale(model, tensors[place.bias], ratios[place.kernel])
    return serialize(model)


def expand_from_grids(
    content: bytes,
    kernels: Mapping[str, tuple[np.ndarray, Grid]],
    *,
    per_tensor: bool,
    spared: Collection[str],
    packed: bool = True,
) -> bytes:
    """Return the float file with its kernels stored as levels, which are expanded before they are used.

    Args:
        content: a file of floats.
        kernels: weight name -> its value, which lies on the grid, and the grid; other kernels of 1,024 weights and more
            are rounded to the nearest of 8 bits.
        per_tensor: round each other kernel to one grid instead of one for each output.
        spared: layers whose kernels stay as they are.
        packed: as for :func:`write_grids`.

    Raises:
        CompressError: as :func:`write_grids`.
    """
    file, model = TFLiteFile(content), parse(content)
    known = {place.kernel: values for place, values in _on_grids(file, file, kernels)}
    left = {op.inputs[1] for layer in spared for op in file.operators_of(layer)}
    for place in {place.kernel: place for place in file.kernel_places}.values():
        kernel = np.asarray(file.tensors[place.kernel].data)
        if place.kernel in left or (kernel.size < _LEAST and place.kernel not in known):
            continue
        values = known.get(place.kernel) or _nearest(kernel, place, per_tensor=per_tensor)
        expand(
            model,
            place.kernel,
            values.stored(model, place, packed=packed),
            schema.BuiltinOperator.DEQUANTIZE,
            schema.DequantizeOptionsT(),
        )
    return serialize(model)


@dataclass(frozen=True)
class _Levels:
    """A kernel in the layout of the file: whole numbers, and what each stands for in each channel [c] (or [1])."""

    levels: np.ndarray
    scales: np.ndarray
    bits: int

    def with_room(self, biases: Iterable[np.ndarray], before: np.ndarray, axis: int) -> _Levels:
        """Return the same, but for channels (along ``axis``) whose biases would not fit in steps this small.

        These get the converter's scales, ``before``, which leave room for the ``biases``, integers in its steps:
        next to such a bias the weights are nothing. Of a channel of zeros any scale is right.
        """
        used = self.levels.any(tuple(other for other in range(self.levels.ndim) if other != axis))
        ratios = np.maximum(self.scales / before, np.finfo(np.float64).tiny)
        fits = [np.abs(bias.astype(np.float64)) / ratios <= np.iinfo(bias.dtype).max for bias in biases]
        keeps = np.logical_and.reduce([used, *fits])
        spread = np.where(keeps, 1.0, ratios).reshape([-1 if other == axis else 1 for other in range(self.levels.ndim)])
        levels = np.rint(self.levels * spread).astype(np.int8)
        return replace(self, levels=levels, scales=np.where(keeps, self.scales, before))

    def stored(self, model: schema.ModelT, place: KernelPlace, *, packed: bool) -> schema.TensorT:
        """Return a tensor of the file for it; its buffer is in the model already."""
        packed = packed and self.bits <= 4 and place.operator in _PACKED
        return schema.TensorT(
            type=schema.TensorType.INT4 if packed else schema.TensorType.INT8,
            buffer=add_buffer(model, _pack(self.levels) if packed else self.levels),
            quantization=schema.QuantizationParametersT(
                scale=self.scales.astype(np.float32),
                zeroPoint=np.zeros(len(self.scales), np.int64),
                quantizedDimension=place.channel_axis,
            ),
        )


def _on_grids(
    floats: TFLiteFile, file: TFLiteFile, kernels: Mapping[str, tuple[np.ndarray, Grid]]
) -> Iterator[tuple[KernelPlace, _Levels]]:
    """Yield where the kernels are in the file, each call's, and their levels."""
    for name, (kernel, grid) in kernels.items():
        layer = name.rpartition("/")[0]
        places = zip(*(source.kernel_places_of(layer, kernel.shape) for source in (file, floats)), strict=False)
        pairs = [(place, np.asarray(floats.tensors[before.kernel].data)) for place, before in places]
        if not pairs:
            raise _lost(layer, kernel, "none")
        found = [(place, values) for place, data in pairs if (values := _read(place, data, kernel, grid)) is not None]
        if not found:
            raise _lost(layer, kernel, "others, into which the converter has merged a normalisation of its inputs")
        yield from found


def _read(place: KernelPlace, written: np.ndarray, kernel: np.ndarray, grid: Grid) -> _Levels | None:
    """Return the levels of what the float file has for a kernel; None if it is another."""
    own = np.moveaxis(place.to_file(kernel), place.channel_axis, 0)
    steps = np.moveaxis(place.to_file(np.broadcast_to(grid.steps, kernel.shape)), place.channel_axis, 0)
    factors = place.factors(kernel, written)
    if factors is None:
        return None
    levels = np.rint(np.divide(own, steps, out=np.zeros_like(own), where=steps > 0)) * np.sign(factors).reshape(
        -1, *[1] * (own.ndim - 1)
    )
    scales = steps.reshape(len(own), -1)[:, 0] * np.maximum(np.abs(factors), 1e-12)
    return _Levels(np.moveaxis(levels.astype(np.int8), 0, place.channel_axis), scales, grid.bits)


def _lost(layer: str, kernel: np.ndarray, received: str) -> CompressError:
    return CompressError(
        f"export of layer {layer}",
        expected=f"its weights of shape {kernel.shape} under its name in the file",
        received=received,
        fix="Leave the layer out of the stage that rounds it: skip=[{name: " + layer + "}].",
    )


def _nearest(kernel: np.ndarray, place: KernelPlace, *, per_tensor: bool) -> _Levels:
    others = tuple(axis for axis in range(kernel.ndim) if per_tensor or axis != place.channel_axis)
    steps = np.maximum(np.abs(kernel).max(others, keepdims=True), 1e-12) / 127
    return _Levels(np.rint(kernel / steps).astype(np.int8), steps.reshape(-1), 8)


def _pack(levels: np.ndarray) -> np.ndarray:
    """Return two levels of four bits in each byte, the first one in its lower half."""
    flat = levels.reshape(-1)
    flat = np.append(flat, np.zeros(len(flat) % 2, np.int8)) & 15
    return (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8)


def _integers(model: schema.ModelT, bias: schema.TensorT) -> np.ndarray:
    return model.buffers[bias.buffer].data.view(np.int64 if bias.type == schema.TensorType.INT64 else np.int32)


def _rescale(model: schema.ModelT, bias: schema.TensorT, ratios: np.ndarray) -> None:
    """Write a bias anew whose scale, that of the input times that of the kernel, has changed by ``ratios``."""
    values = _integers(model, bias)
    bias.buffer = add_buffer(model, np.rint(values / ratios).astype(values.dtype))
    bias.quantization.scale = (np.asarray(bias.quantization.scale) * ratios).astype(np.float32)
    bias.quantization.zeroPoint = np.zeros(len(ratios), np.int64)
