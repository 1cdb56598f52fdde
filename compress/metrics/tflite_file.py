"""Reads a ``.tflite`` file without running it: operators, tensors, weights by layer, memory."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from compress.errors import CompressError
from compress.metrics.sparse_tensor import expand

_DTYPES: dict[int, np.dtype] = {
    schema.TensorType.FLOAT32: np.dtype(np.float32),
    schema.TensorType.FLOAT16: np.dtype(np.float16),
    schema.TensorType.FLOAT64: np.dtype(np.float64),
    schema.TensorType.INT8: np.dtype(np.int8),
    schema.TensorType.INT4: np.dtype(np.int8),
    schema.TensorType.UINT8: np.dtype(np.uint8),
    schema.TensorType.INT16: np.dtype(np.int16),
    schema.TensorType.INT32: np.dtype(np.int32),
    schema.TensorType.INT64: np.dtype(np.int64),
    schema.TensorType.BOOL: np.dtype(np.bool_),
}
_PACKED_BITS = {schema.TensorType.INT4: 4}
_OPERATOR_NAMES = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
_WEIGHT_OPERATORS = {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV", "CONV_3D"}
_EXPANSIONS = ("DENSIFY", "DEQUANTIZE")
_TOLERANCE = 1e-4
"""Between a kernel and what the file has of it, as a share of the largest weight."""
_KERNEL_SUFFIXES = (
    "Conv2D",
    "Conv1D",
    "MatMul",
    "Tensordot",
    "depthwise",
    "separable_conv2d",
    "conv2d_transpose",
    "conv1d_transpose",
    "Conv3D",
)


def stored_dtype(code: int) -> np.dtype | None:
    """Return the type that a tensor of the schema's type ``code`` is stored in; None if it is not known here."""
    return _DTYPES.get(code)


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file. ``data`` is None for activations; ``scales`` is empty for floats.

    ``sparse``: the file holds its values other than zero only; ``data`` has all of them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    data: np.ndarray | None
    scales: np.ndarray
    zero_point: int = 0
    """The integer that stands for zero, if there is one scale for the whole tensor."""
    axis: int = 0
    """The axis that has a scale for each index, if there are several."""
    bits: int = 32
    """Of each value as stored."""
    sparse: bool = False

    @property
    def values(self) -> np.ndarray | None:
        """What the stored numbers stand for."""
        if self.data is None or not self.scales.size:
            return self.data
        spread = [1] * len(self.shape)
        if len(self.scales) > 1:
            spread[self.axis] = -1
        return np.asarray((self.data.astype(np.float32) - self.zero_point) * self.scales.reshape(spread))

    @property
    def bytes(self) -> int:
        """Size in memory for the shape as written (batch 1)."""
        return int(np.prod(np.abs(self.shape), dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class Operator:
    """An operator of the file with the indices of the tensors that it reads and writes."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class KernelPlace:
    """Where a file has the kernel of a layer: the operator that reads it, and the indices of the tensors."""

    operator: str
    kernel: int
    bias: int | None
    shape: tuple[int, ...]

    @classmethod
    def of(cls, operator: Operator, kernel: Tensor) -> KernelPlace:
        """Return the place of the kernel that an operator reads."""
        bias = 3 if operator.name == "TRANSPOSE_CONV" else 2
        has_bias = len(operator.inputs) > bias and operator.inputs[bias] >= 0
        return cls(operator.name, operator.inputs[1], operator.inputs[bias] if has_bias else None, kernel.shape)

    @property
    def channel_axis(self) -> int:
        """The axis of the outputs in the file."""
        return {"DEPTHWISE_CONV_2D": 3, "CONV_3D": 4}.get(self.operator, 0)

    def to_keras(self, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return what the file stores in the layout of the Keras kernel, of ``shape``."""
        if self.operator in ("CONV_3D", "DEPTHWISE_CONV_2D"):
            return stored.reshape(shape)
        if self.operator == "TRANSPOSE_CONV":
            return np.asarray(stored.transpose(1, 2, 0, 3).reshape(shape))
        return np.asarray(np.moveaxis(stored, 0, -1).reshape(shape))

    def to_file(self, kernel: np.ndarray) -> np.ndarray:
        """Return values in the layout of the Keras kernel in that of the file."""
        if self.operator in ("CONV_3D", "DEPTHWISE_CONV_2D"):
            return kernel.reshape(self.shape)
        if self.operator == "TRANSPOSE_CONV":
            # Outputs come before inputs; a convolution along one axis has no height.
            return np.moveaxis(kernel, -2, 0).reshape(self.shape)
        return np.moveaxis(kernel, -1, 0).reshape(self.shape)

    def factors(self, kernel: np.ndarray, written: np.ndarray) -> np.ndarray | None:
        """Return what each channel of a Keras kernel has been multiplied by to become what the file has written.

        The converter multiplies whole channels with what stands beside the layer, a rescaled input or a batch norm.
        None if it is another kernel.
        """
        one, other = (
            np.moveaxis(values, self.channel_axis, 0).reshape(self.shape[self.channel_axis], -1)
            for values in (self.to_file(kernel), written)
        )
        squares = (one.astype(np.float64) ** 2).sum(1)
        products = (one.astype(np.float64) * other).sum(1)
        found = np.divide(products, squares, out=np.ones_like(squares), where=squares > 0)
        close = np.abs(other - found[:, None] * one).max() <= _TOLERANCE * np.abs(other).max()
        return found if close else None


class TFLiteFile:
    """The main subgraph of a ``.tflite`` file.

    Raises:
        CompressError: if the bytes are not a TFLite flatbuffer.
    """

    def __init__(self, content: bytes, name: str = "model.tflite") -> None:
        if len(content) < 8 or content[4:8] != b"TFL3":
            raise CompressError(
                name,
                expected="a TFLite file (its bytes 4 to 8 are 'TFL3')",
                received=f"{len(content)} bytes that begin with {content[:8]!r}",
                fix="Export the model again.",
            )
        self.content = content
        try:
            self._model = schema.Model.GetRootAs(content, 0)
            graph = self._model.Subgraphs(0)
            self.tensors = [self._tensor(graph.Tensors(i)) for i in range(graph.TensorsLength())]
            self.operators = [self._operator(graph.Operators(i)) for i in range(graph.OperatorsLength())]
            self.inputs = tuple(int(i) for i in graph.InputsAsNumpy())
            self.outputs = tuple(int(i) for i in graph.OutputsAsNumpy())
        except (struct.error, ValueError, TypeError, IndexError, AttributeError) as error:
            # What the flatbuffers reader raises when an offset points outside the bytes.
            raise CompressError(
                name, expected="a whole TFLite file", received=f"a damaged one ({error})", fix="Export the model again."
            ) from error

    @classmethod
    def read(cls, path: Path) -> TFLiteFile:
        """Read a file from disk."""
        return cls(path.read_bytes(), str(path))

    def _tensor(self, raw: schema.Tensor) -> Tensor:
        dtype = _DTYPES.get(raw.Type(), np.dtype(np.uint8))
        shape = tuple(int(v) for v in raw.ShapeAsNumpy()) if raw.ShapeLength() else ()
        buffer = self._model.Buffers(raw.Buffer())
        data = None
        sparsity = raw.Sparsity()
        bits = _PACKED_BITS.get(raw.Type())
        if bits and buffer.DataLength():
            flat = _unpack(buffer.DataAsNumpy(), bits, int(np.prod(shape, dtype=np.int64)))
        else:
            flat = buffer.DataAsNumpy().view(dtype) if buffer.DataLength() else np.zeros(0, dtype)
        if sparsity is not None:
            data = expand(sparsity, flat, shape)
        elif flat.size:
            data = flat.reshape(shape) if flat.size == np.prod(shape, dtype=np.int64) else flat
        quantization = raw.Quantization()
        scales = quantization.ScaleAsNumpy() if quantization is not None and quantization.ScaleLength() else np.zeros(0)
        zero_point = int(quantization.ZeroPoint(0)) if quantization is not None and len(scales) == 1 else 0
        return Tensor(
            raw.Name().decode(),
            shape,
            dtype,
            data,
            scales,
            zero_point,
            axis=quantization.QuantizedDimension() if quantization is not None else 0,
            bits=bits or 8 * dtype.itemsize,
            sparse=sparsity is not None,
        )

    def _operator(self, raw: schema.Operator) -> Operator:
        code = self._model.OperatorCodes(raw.OpcodeIndex())
        builtin = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        return Operator(
            _OPERATOR_NAMES.get(builtin, f"BUILTIN_{builtin}"),
            tuple(int(i) for i in raw.InputsAsNumpy()) if raw.InputsLength() else (),
            tuple(int(i) for i in raw.OutputsAsNumpy()) if raw.OutputsLength() else (),
        )

    @cached_property
    def foreign_operators(self) -> tuple[str, ...]:
        """Names of operators that are not the format's own, or newer than this program."""
        codes = [self._model.OperatorCodes(i) for i in range(self._model.OperatorCodesLength())]
        custom = {(code.CustomCode() or b"CUSTOM").decode(errors="replace") for code in codes if _is_custom(code)}
        return (*sorted(custom), *sorted({op.name for op in self.operators if op.name.startswith("BUILTIN_")}))

    @cached_property
    def _producer(self) -> dict[int, Operator]:
        return {tensor: op for op in self.operators for tensor in op.outputs}

    def stored(self, index: int) -> Tensor:
        """Return the tensor as stored: what a DEQUANTIZE or DENSIFY of a constant reads."""
        for _ in _EXPANSIONS:
            op = self._producer.get(index)
            if self.tensors[index].data is not None or op is None or op.name not in _EXPANSIONS:
                break
            index = op.inputs[0]
        return self.tensors[index]

    def integers_of(self, index: int) -> Tensor | None:
        """Return the activation of integers that a DEQUANTIZE turns into the tensor; None if nothing does."""
        op = self._producer.get(index)
        if op is None or op.name != "DEQUANTIZE" or self.tensors[op.inputs[0]].dtype.kind not in "iu":
            return None
        return self.tensors[op.inputs[0]]

    @cached_property
    def weighted(self) -> list[tuple[Operator, Tensor]]:
        """The operators that multiply by constant weights, each with the weight tensor as stored."""
        pairs = ((op, self.stored(op.inputs[1])) for op in self.operators if op.name in _WEIGHT_OPERATORS)
        return [(op, tensor) for op, tensor in pairs if tensor.data is not None]

    @property
    def packed_kernels(self) -> list[str]:
        """Names of the weights that are stored two to a byte or more, which not every runtime reads."""
        return [tensor.name for _, tensor in self.weighted if tensor.bits < 8]

    def holds(self, dtype: np.dtype, least: int) -> bool:
        """Say whether any subgraph stores a tensor of at least ``least`` numbers of this type."""
        graphs = [self._model.Subgraphs(i) for i in range(self._model.SubgraphsLength())]
        tensors = (graph.Tensors(i) for graph in graphs for i in range(graph.TensorsLength()))
        return any(
            _DTYPES.get(tensor.Type()) == dtype
            and tensor.ShapeLength()
            and int(np.prod(tensor.ShapeAsNumpy())) >= least
            and self._model.Buffers(tensor.Buffer()).DataLength()
            for tensor in tensors
        )

    @property
    def sparse_kernels(self) -> int:
        """Number of kernels that are stored sparsely."""
        return len({id(tensor) for _, tensor in self.weighted if tensor.sparse})

    def kernel_of(self, layer: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """Return the stored kernel of a Keras layer in the layout of its Keras kernel.

        Integers stay integers. None if the file does not name the layer, or its weights are of another size.
        """
        place = self.kernel_place(layer, shape)
        return None if place is None else place.to_keras(np.asarray(self.stored(place.kernel).data), shape)

    def weights_of(self, layer: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """Return what the stored kernel of a Keras layer stands for; as :meth:`kernel_of`, integers times scales."""
        place = self.kernel_place(layer, shape)
        return None if place is None else place.to_keras(np.asarray(self.stored(place.kernel).values), shape)

    def kernel_place(self, layer: str, shape: tuple[int, ...]) -> KernelPlace | None:
        """Return where the kernel of a Keras layer is, or None if the file has none of its name and size."""
        return next(iter(self.kernel_places_of(layer, shape)), None)

    def kernel_places_of(self, layer: str, shape: tuple[int, ...]) -> list[KernelPlace]:
        """Return where kernels of a Keras layer's name and size are: one for each call, maybe others'.

        The converter names tensors after the layers whose operations were fused into them.
        """
        size = int(np.prod(shape, dtype=np.int64))
        # A separable layer has two kernels under one name.
        found = [(op, tensor) for op, tensor in self._matches(layer) if np.asarray(tensor.data).size == size]
        if not found:
            # The converter gives the kernel of a grouped convolution no layer's name.
            nameless = [p for p in self.weighted if "/" not in p[1].name and np.asarray(p[1].data).size == size]
            found = nameless if len(nameless) == 1 else []
        return [KernelPlace.of(*pair) for pair in found]

    @property
    def kernel_places(self) -> list[KernelPlace]:
        """Where all kernels are."""
        return [KernelPlace.of(op, tensor) for op, tensor in self.weighted]

    def _matches(self, layer: str) -> list[tuple[Operator, Tensor]]:
        return [
            (op, tensor)
            for op, tensor in self.weighted
            if _names(tensor.name, layer) or any(_names(self.tensors[i].name, layer) for i in op.outputs)
        ]

    def operator_of(self, layer: str) -> str | None:
        """Return the operator that multiplies by the layer's kernel; None if the file does not name it."""
        found = self._matches(layer)
        return found[0][0].name if found else None

    def written_by(self, layer: str) -> list[str]:
        """Return the names of the tensors that the operators with the layer's weights write."""
        return [self.tensors[index].name for op in self.operators_of(layer) for index in op.outputs]

    def operators_of(self, layer: str) -> list[Operator]:
        """Return the operators that multiply by weights of the layer."""
        return [op for op, _ in self._matches(layer)]

    def is_depthwise(self, layer: str) -> bool:
        """Say whether the layer's operator multiplies each filter with one input channel only.

        The converter writes a depthwise convolution of a single channel as an ordinary one.
        """
        found = self._matches(layer)
        if not found:
            return False
        operator, weights = found[0]
        return operator.name == "DEPTHWISE_CONV_2D" or (operator.name == "CONV_2D" and weights.shape[-1] == 1)

    @cached_property
    def groups(self) -> list[int]:
        """Into how many groups each convolution divides its input channels, the undivided left out."""
        pairs = ((self.tensors[op.inputs[0]].shape[-1], w.shape[-1]) for op, w in self.weighted if op.name == "CONV_2D")
        return [channels // read for channels, read in pairs if channels > read]

    def output_channels_of(self, layer: str) -> int | None:
        """Return how many channels the layer's last operator writes; None if the file does not name it."""
        # A separable convolution is two operators: what the second writes leaves the layer.
        found = self._matches(layer)
        return self.tensors[found[-1][0].outputs[0]].shape[-1] if found else None

    @cached_property
    def parameters(self) -> list[Tensor]:
        """The weights, biases and other numbers that are stored, without single numbers, shapes and indices."""
        stored = (tensor for tensor in self.tensors if tensor.data is not None and tensor.shape)
        return [tensor for tensor in stored if tensor.dtype.kind == "f" or tensor.scales.size]

    def count_params(self) -> int:
        """Return how many numbers the parameters have."""
        return int(sum(np.prod(tensor.shape) for tensor in self.parameters))

    def count_nonzero_params(self) -> int:
        """Return how many of these do not stand for zero."""
        return int(sum(np.count_nonzero(np.asarray(t.data) != t.zero_point) for t in self.parameters))

    def macs(self) -> int:
        """Return the multiply-adds of one run, counted on the operators of the file."""
        return sum(self.macs_of(op, weight) for op, weight in self.weighted)

    def macs_of(self, op: Operator, weight: Tensor) -> int:
        """Return the multiply-adds of an operator that multiplies by ``weight``."""
        # A transposed convolution multiplies at each place of what it reads, the others at each that they write.
        places = op.inputs[2] if op.name == "TRANSPOSE_CONV" else op.outputs[0]
        return int(np.prod(weight.shape)) * int(np.prod(self.tensors[places].shape[:-1]))

    def peak_memory_bytes(self) -> int:
        """Return the most bytes of activations alive at once, operators run in the order of the file.

        A tensor lives from the operator that writes it to the last one that reads it; what a runtime
        adds on top (im2col buffers, alignment) is not counted.
        """
        count = len(self.operators)
        size = np.zeros(len(self.tensors), np.int64)
        birth = np.full(len(self.tensors), count, np.int64)
        death = np.full(len(self.tensors), -1, np.int64)
        for index in self.inputs:
            birth[index] = 0
        constant_outputs = {
            t
            for op in self.operators
            if op.name in _EXPANSIONS and self.stored(op.outputs[0]).data is not None
            for t in op.outputs
        }
        for step, op in enumerate(self.operators):
            for index in (*op.inputs, *op.outputs):
                if index >= 0 and self.tensors[index].data is None and index not in constant_outputs:
                    size[index] = self.tensors[index].bytes
                    birth[index] = min(birth[index], step)
                    death[index] = max(death[index], step)
        for index in self.outputs:
            death[index] = count - 1
        change = np.zeros(count + 1, np.int64)
        alive = death >= birth
        np.add.at(change, birth[alive], size[alive])
        np.add.at(change, death[alive] + 1, -size[alive])
        return int(np.cumsum(change).max(initial=0))


def _is_custom(code: schema.OperatorCode) -> bool:
    return max(code.BuiltinCode(), code.DeprecatedBuiltinCode()) == schema.BuiltinOperator.CUSTOM


def _names(tensor_name: str, layer: str) -> bool:
    """Say whether a tensor's name contains ``<layer>/<kernel operation>`` as whole parts."""
    parts = [segment.rstrip("0123456789").split("/") for segment in tensor_name.split(";")]
    plain = [segment.split("/") for segment in tensor_name.split(";")]
    wanted = layer.split("/")
    for segment in (*parts, *plain):
        for start in range(len(segment) - len(wanted)):
            if segment[start : start + len(wanted)] == wanted and segment[start + len(wanted)].startswith(
                _KERNEL_SUFFIXES
            ):
                return True
    return False


def _unpack(stored: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return ``count`` signed integers of 4 bits, the first of each byte in its lower half, as int8 [count]."""
    halves = np.stack([stored & 15, stored >> bits], -1).reshape(-1)[:count].astype(np.int8)
    return np.where(halves > 7, halves - 16, halves).astype(np.int8)
