"""Tensors stored sparsely: against a tree built one index at a time, and against TFLite's own converter."""

from __future__ import annotations

import flatbuffers
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import given
from hypothesis import strategies as st
from tensorflow.lite.python import schema_py_generated as schema

from compress.errors import CompressError
from compress.metrics.sparse_tensor import expand
from compress.metrics.tflite_file import TFLiteFile

layers = tf_keras.layers
KINDS = {
    np.uint8: (schema.SparseIndexVector.Uint8Vector, schema.Uint8VectorT),
    np.uint16: (schema.SparseIndexVector.Uint16Vector, schema.Uint16VectorT),
    np.int32: (schema.SparseIndexVector.Int32Vector, schema.Int32VectorT),
}


def packed(sparsity: schema.SparsityParametersT) -> schema.SparsityParameters:
    builder = flatbuffers.Builder(256)
    builder.Finish(sparsity.Pack(builder))
    return schema.SparsityParameters.GetRootAs(builder.Output(), 0)


def vector(level: schema.DimensionMetadataT, segments: list[int], indices: list[int], kind: type) -> None:
    level.arraySegmentsType, made = KINDS[kind]
    level.arraySegments = made(values=np.array(segments, kind))
    level.arrayIndicesType, made = KINDS[kind]
    level.arrayIndices = made(values=np.array(indices, kind))


def encode(dense: np.ndarray, block: dict[int, int], order: list[int], compressed: list[bool], kind: type):
    """The definition, followed node by node: a level is dense, or lists the children that hold anything."""
    outer = [size // block.get(d, 1) for d, size in enumerate(dense.shape)]
    split = [n for d, size in enumerate(outer) for n in ((size, block[d]) if d in block else (size,))]
    axes = [(d, inner) for d in range(dense.ndim) for inner in ((False, True) if d in block else (False,))]
    wanted = [(d, False) for d in range(dense.ndim)] + [(d, True) for d in block]
    nodes = [dense.reshape(split).transpose([axes.index(wanted[level]) for level in order])]
    levels = []
    for sparse in compressed:
        level = schema.DimensionMetadataT()
        if sparse:
            level.format = schema.DimensionType.SPARSE_CSR
            kept = [[i for i in range(len(node)) if node[i].any()] for node in nodes]
            vector(level, np.cumsum([0, *map(len, kept)]).tolist(), [i for row in kept for i in row], kind)
            nodes = [node[i] for node, row in zip(nodes, kept, strict=True) for i in row]
        else:
            level.denseSize = nodes[0].shape[0] if nodes else 0
            nodes = [child for node in nodes for child in node]
        levels.append(level)
    return np.array(nodes, dense.dtype), schema.SparsityParametersT(
        traversalOrder=np.array(order, np.int32),
        blockMap=np.array(list(block), np.int32) if block else None,
        dimMetadata=levels,
    )


@given(st.data())
def test_any_order_any_blocks_any_compressed_levels(draw):
    shape = tuple(draw.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3)))
    block = {d: draw.draw(st.sampled_from([n for n in (1, 2, 3) if shape[d] % n == 0])) for d in range(len(shape))}
    block = {d: n for d, n in block.items() if draw.draw(st.booleans())}
    order = [*draw.draw(st.permutations(range(len(shape)))), *range(len(shape), len(shape) + len(block))]
    compressed = [draw.draw(st.booleans()) for _ in shape] + [False] * len(block)
    rng = np.random.default_rng(draw.draw(st.integers(0, 2**32)))
    dense = rng.integers(-127, 128, shape).astype(np.int8) * (rng.random(shape) < draw.draw(st.floats(0, 1)))
    # A dense level under no node has no length to write down.
    dense.flat[0] = 1
    values, sparsity = encode(dense, block, order, compressed, draw.draw(st.sampled_from(list(KINDS))))
    np.testing.assert_array_equal(expand(packed(sparsity), values, shape), dense)


def test_a_tensor_of_zeros_holds_no_value():
    values, sparsity = encode(np.zeros((3, 4), np.float32), {}, [0, 1], [False, True], np.uint8)
    assert values.size == 0
    np.testing.assert_array_equal(expand(packed(sparsity), values, (3, 4)), np.zeros((3, 4)))


def damaged(change) -> schema.SparsityParameters:
    _, sparsity = encode(np.eye(4, dtype=np.float32), {}, [0, 1], [False, True], np.int32)
    change(sparsity, sparsity.dimMetadata)
    return packed(sparsity)


@pytest.mark.parametrize(
    "change",
    [
        lambda s, levels: setattr(levels[0], "denseSize", 2**31 - 1),
        lambda s, levels: setattr(levels[0], "denseSize", 3),
        lambda s, levels: vector(levels[1], [0, 1, 2, 3, 5], [0, 1, 2, 3], np.int32),
        lambda s, levels: vector(levels[1], [0, 3, 2, 3, 4], [0, 1, 2, 3], np.int32),
        lambda s, levels: vector(levels[1], [0, 1, 2, 4], [0, 1, 2, 3], np.int32),
        lambda s, levels: vector(levels[1], [0, 1, 2, 3, 4], [0, 1, 2, 4], np.int32),
        lambda s, levels: vector(levels[1], [0, 1, 2, 3, 4], [0, 1, 2, -1], np.int32),
        lambda s, levels: vector(levels[1], [0, 1, 2, 3, 3], [0, 1, 2], np.int32),
        lambda s, levels: vector(levels[1], [0, 1, 2, 3, 20], [0] * 20, np.int32),
        lambda s, levels: setattr(s, "traversalOrder", np.array([0, 0], np.int32)),
        lambda s, levels: setattr(s, "traversalOrder", np.array([0, 1, 2], np.int32)),
        lambda s, levels: setattr(s, "blockMap", np.array([7], np.int32)),
        lambda s, levels: levels.pop(),
    ],
)
def test_levels_that_contradict_the_tensor_are_refused(change):
    with pytest.raises(ValueError, match=r"level|blocks|values"):
        expand(damaged(change), np.ones(4, np.float32), (4, 4))


def test_a_shape_that_no_file_can_hold_is_refused_before_it_is_allocated():
    for shape in ((2**31 - 1, 2**31 - 1), (-4, -4), (4, 0)):
        with pytest.raises(ValueError, match="shape"):
            expand(damaged(lambda s, levels: None), np.ones(4, np.float32), shape)


def converted(kernel: np.ndarray) -> bytes:
    image = tf_keras.Input(kernel.shape[:-1])
    model = tf_keras.Model(image, layers.Dense(kernel.shape[-1], name="layer")(image))
    model.set_weights([kernel, np.ones(kernel.shape[-1], np.float32)])
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.EXPERIMENTAL_SPARSITY]
    return converter.convert()


@pytest.mark.parametrize("block", [1, 4])
def test_what_the_converter_writes_sparsely_is_read(block):
    rng = np.random.default_rng(0)
    mask = np.repeat(rng.random((300 // block, 8)) < 0.1, block, axis=0)
    kernel = (rng.normal(size=(300, 8)) * mask).astype(np.float32)
    file = TFLiteFile(converted(kernel))
    assert file.sparse_kernels == 1
    # Zeros in blocks are multiplied as they are stored; the others are expanded first.
    assert [op.name for op in file.operators] == ["DENSIFY", "FULLY_CONNECTED"][block == 4 :]
    np.testing.assert_array_equal(file.kernel_of("layer", kernel.shape), kernel)
    assert file.macs() == kernel.size
    # The image and the answer; the expanded kernel is no activation.
    assert file.peak_memory_bytes() == 4 * (300 + 8)


def test_a_damaged_sparse_file_is_refused_or_read_and_nothing_else():
    kernel = (np.arange(64).reshape(8, 8) * np.eye(8)).astype(np.float32)
    content = converted(kernel)
    rng = np.random.default_rng(0)
    refused = 0
    for place in rng.integers(0, len(content), 300):
        changed = bytearray(content)
        changed[place] ^= int(rng.integers(1, 256))
        try:
            TFLiteFile(bytes(changed))
        except CompressError:
            refused += 1
    assert refused
