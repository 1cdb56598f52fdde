"""A TensorFlow graph that came without Keras layers, as one layer whose weights cannot be changed."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Literal

import tensorflow as tf
import tf_keras
from tensorflow.core.framework import function_pb2
from tensorflow.core.protobuf import meta_graph_pb2
from tensorflow.python.saved_model.function_deserialization import load_function_def_library

from compress.errors import CompressError

Capture = Literal["parameter", "state", "constant"]
"""What a function reads besides its input: a variable that training could change, any other one, or a value."""

_TENSOR_OPERATIONS = """
Abs Acos Acosh Add AddN AddV2 All Any ArgMax ArgMin Asin Asinh Assert Atan Atan2 Atanh AvgPool AvgPool3D BatchMatMul
BatchMatMulV2 BatchMatMulV3 BatchToSpaceND BiasAdd BroadcastArgs BroadcastTo Cast Ceil CheckNumerics ConcatV2 Const
Conv2D Conv2DBackpropInput Conv3D Conv3DBackpropInputV2 Cos Cosh Cumprod Cumsum DepthToSpace DepthwiseConv2dNative Div
DivNoNan Einsum Elu EnsureShape Equal Erf Erfc Exp ExpandDims Expm1 FakeQuantWithMinMaxArgs FakeQuantWithMinMaxVars
FakeQuantWithMinMaxVarsPerChannel Fill Floor FloorDiv FloorMod FusedBatchNorm FusedBatchNormV3 Gather GatherNd
GatherV2 Greater GreaterEqual Identity IdentityN If Imag InvertPermutation IsFinite IsInf IsNan L2Loss LRN LeakyRelu
Less LessEqual LinSpace Log Log1p LogSoftmax LogicalAnd LogicalNot LogicalOr MatMul MatrixBandPart MatrixDiagV3
MatrixSetDiagV3 Max MaxPool MaxPool3D Maximum Mean Min Minimum MirrorPad Mul MulNoNan Neg NoOp NotEqual OneHot
OnesLike Pack Pad PadV2 PartitionedCall Placeholder PlaceholderWithDefault Pow PreventGradient Prod Range Rank
ReadVariableOp Real RealDiv Reciprocal Relu Relu6 Reshape ResizeBilinear ResizeNearestNeighbor ResourceGather
ResourceGatherNd ReverseV2 Rint Round Rsqrt ScatterNd Select SelectV2 Selu Shape ShapeN Sigmoid Sign Sin Sinh Size
Slice Softmax Softplus Softsign SpaceToBatchND SpaceToDepth Split SplitV Sqrt Square SquaredDifference Squeeze
StatefulPartitionedCall StatelessIf StatelessWhile StopGradient StridedSlice Sub Sum Tan Tanh TensorListElementShape
TensorListFromTensor TensorListGetItem TensorListLength TensorListReserve TensorListSetItem TensorListStack
TensorScatterUpdate Tile TopKV2 Transpose TruncateDiv Unpack Where While Xlogy ZerosLike
"""
"""Operations that compute tensors from tensors; all others (files, Python, tables, random numbers) are refused."""


class SavedGraph(tf_keras.layers.Layer):
    """Computes what a function of a TensorFlow graph computes; what the function captures are the layer's weights.

    The function is held in the layer's configuration, so that the layer can be copied, saved and loaded like any other.
    It is looked through before it is made, wherever it comes from.

    Args:
        graph: base64 of a ``MetaGraphDef`` with a library of functions and their signatures.
        function: name of the function: of the layer's input, then of ``captures``.
        output_size: shape of its one output, None where it is not known.
        captures: (shape, type, :data:`Capture`) of everything that the function reads besides its input.
        kwargs: as any layer.

    Raises:
        CompressError: if the function holds an operation that does more than to compute tensors.
    """

    def __init__(
        self,
        graph: str,
        function: str,
        output_size: Sequence[int | None],
        captures: Sequence[tuple[Sequence[int], str, Capture]],
        **kwargs: Any,
    ) -> None:
        super().__init__(**{**kwargs, "trainable": False, "dtype": "float32"})
        self._config = {
            "graph": graph,
            "function": function,
            "output_size": list(output_size),
            "captures": [list(item) for item in captures],
        }
        parts = meta_graph_pb2.MetaGraphDef.FromString(base64.b64decode(graph))
        require_tensor_operations(parts.graph_def.library, f"layer {self.name}")
        # TensorFlow names the functions anew: two models may use the same names.
        self._function = load_function_def_library(parts.graph_def.library, parts.object_graph_def)[function]
        self._by_reference = [kind != "constant" for *_, kind in captures]
        self.captured = [
            self.add_weight(f"capture_{index}", tuple(shape), dtype, "zeros", trainable=kind == "parameter")
            for index, (shape, dtype, kind) in enumerate(captures)
        ]
        self._run = tf.function(self._outputs_of, autograph=False)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Run the function on ``inputs``."""
        return self._run(inputs)

    def _outputs_of(self, inputs: tf.Tensor) -> tf.Tensor:
        given = [tf.cast(inputs, self._function.inputs[0].dtype)]
        for variable, by_reference in zip(self.captured, self._by_reference, strict=True):
            value = tf.convert_to_tensor(variable)
            given.append(variable.handle if by_reference else value)
        (output,) = tf.nest.flatten(self._function._call_flat(given, []))
        output.set_shape(self._config["output_size"])
        return tf.cast(output, tf.float32)

    def get_config(self) -> dict[str, Any]:
        """Return what makes the layer again."""
        return {**super().get_config(), **self._config}


def has_layers(model: tf_keras.Model) -> bool:
    """Say whether the model consists of Keras layers, which can be changed one by one."""
    return not any(isinstance(layer, SavedGraph) for layer in model.layers)


def require_tensor_operations(functions: function_pb2.FunctionDefLibrary, where: str) -> None:
    """Refuse functions that could read or write files, run Python, or keep a state.

    Raises:
        CompressError: naming the first operation.
    """
    allowed = frozenset(_TENSOR_OPERATIONS.split())
    for function in functions.function:
        for node in function.node_def:
            if node.op not in allowed:
                raise CompressError(
                    where,
                    expected="a graph of operations that only compute tensors from tensors",
                    received=f"the operation {node.op} ({node.name})",
                    fix="Export the part of the model between its input tensor and its scores, without reading files, "
                    "tables, random numbers or Python functions.",
                )
