"""Small files for boards, good ones and bad ones."""

from __future__ import annotations

from pathlib import Path

import flatbuffers
import numpy as np
import tf_keras
from tensorflow.lite.python import schema_py_generated as schema

from compress.candidate import Artifact, Calibration, Candidate, Storage
from compress.data.source import Split, make_data
from compress.deploy.flatbuffer import add_buffer, parse, serialize
from compress.deploy.sparse import store_sparsely
from compress.deploy.tflite import export

layers = tf_keras.layers


def convolutions(path: Path, filters: int = 2, scheme: str = "float32") -> Artifact:
    """Write a file of two convolutions and a mean."""
    image = tf_keras.Input((16, 16, filters), name="image")
    x = layers.Conv2D(filters, 3, padding="same")(image)
    model = tf_keras.Model(image, layers.GlobalAveragePooling2D()(layers.Conv2D(filters, 3, padding="same")(x)))
    part = Split(np.random.default_rng(0).normal(size=(8, 16, 16, filters)).astype(np.float32), np.arange(8) % 2)
    return export(Candidate(model, storage=Storage(scheme, Calibration(4))), make_data("random", part, part), path)


def residual_blocks(path: Path, blocks: int) -> Artifact:
    """Write an int8 file, with floats before and after, of many additions one after the other."""
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((16, 16, 8), name="image")
    x = image
    for _ in range(blocks):
        x = layers.Add()([x, layers.Conv2D(8, 3, padding="same")(layers.ReLU()(x))])
    model = tf_keras.Model(image, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))
    part = Split(np.random.default_rng(0).normal(size=(8, 16, 16, 8)).astype(np.float32), np.arange(8) % 2)
    return export(Candidate(model, storage=Storage("int8", Calibration(4))), make_data("random", part, part), path)


def dense(path: Path) -> Artifact:
    """Write an int8 file of two fully connected layers."""
    values = tf_keras.Input((32,), name="values")
    model = tf_keras.Model(values, layers.Dense(16, name="second")(layers.Dense(64, "relu", name="first")(values)))
    part = Split(np.random.default_rng(0).normal(size=(8, 32)).astype(np.float32), np.arange(8) % 2)
    return export(Candidate(model, storage=Storage("int8", Calibration(4))), make_data("random", part, part), path)


def with_sparse_kernels(good: Path, path: Path) -> Artifact:
    """Write a copy of an int8 file whose kernels have many zeros and are stored without them."""
    model = parse(good.read_bytes())
    for tensor in model.subgraphs[0].tensors:
        buffer = model.buffers[tensor.buffer]
        if buffer.data is not None and tensor.shape.size == 4:
            kept = np.random.default_rng(0).random(len(buffer.data)) < 0.1
            buffer.data = np.where(kept, np.array(buffer.data), 0).astype(np.uint8)
    sparse = store_sparsely(serialize(model))
    assert sparse is not None
    path.write_bytes(sparse)
    return Artifact(path, Storage("int8", Calibration(4)))


def with_packed_kernels(good: Path, path: Path) -> Artifact:
    """Write a copy of an int8 file whose kernels are cut to four bits and stored two to a byte."""
    model = parse(good.read_bytes())
    for tensor in model.subgraphs[0].tensors:
        buffer = model.buffers[tensor.buffer]
        if buffer.data is not None and tensor.shape.size >= 2:
            levels = np.clip(np.array(buffer.data).view(np.int8), -7, 7) & 15
            tensor.type, tensor.buffer = schema.TensorType.INT4, add_buffer(model, levels[0::2] | levels[1::2] << 4)
    path.write_bytes(serialize(model))
    return Artifact(path, Storage("int8", Calibration(4)))


def with_unknown_operator(good: Path, path: Path) -> Artifact:
    """Write a copy in which an operator that nobody knows stands in the place of the convolutions."""
    model = schema.ModelT.InitFromPackedBuf(good.read_bytes(), 0)
    for code in model.operatorCodes:
        if code.builtinCode == schema.BuiltinOperator.CONV_2D:
            code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.CUSTOM
            code.customCode = "Mystery"
    for op in model.subgraphs[0].operators:
        if model.operatorCodes[op.opcodeIndex].builtinCode == schema.BuiltinOperator.CUSTOM:
            op.builtinOptions, op.builtinOptionsType = None, schema.BuiltinOptions.NONE
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return Artifact(path, Storage())
