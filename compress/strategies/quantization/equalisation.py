"""Cross-layer equalisation: channels trade scale between two layers, so that one step suits them all.

Source: Nagel et al., Data-Free Quantization (arXiv 1906.04721, section 4.1, equation 11).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import tf_keras

from compress.graph.kernels import Kernel, kernels
from compress.graph.rewrite import calls, consumers, copy_model

_ROUNDS = 20
_PASSING = (
    tf_keras.layers.Dropout,
    tf_keras.layers.ZeroPadding2D,
    tf_keras.layers.MaxPooling2D,
    tf_keras.layers.AveragePooling2D,
    tf_keras.layers.GlobalAveragePooling2D,
)
_MOST = 1e4


def equalise(model: tf_keras.Model, bound: Collection[str] = ()) -> tf_keras.Model:
    """Return a copy whose outputs are equal, and whose layers are scaled alike.

    Args:
        model: a flat functional model, its batch norms folded.
        bound: layers whose weights must stay as they are.
    """
    result = copy_model(model)
    table, pairs = {kernel.layer.name: kernel for kernel in kernels(result)}, trading_pairs(result, bound)
    for _ in range(_ROUNDS):
        moved = max((_trade(table[first], table[second]) for first, second in pairs), default=0.0)
        if moved < 1e-3:
            break
    return result


def trading_pairs(model: tf_keras.Model, bound: Collection[str] = ()) -> list[tuple[str, str]]:
    """Return the layers that can trade scale; arguments as for :func:`equalise`.

    A pair is a convolution or Dense and the one that alone reads it, with nothing between them but ReLUs and layers
    that treat channels alike and zero as zero.
    """
    table, times = {kernel.layer.name: kernel for kernel in kernels(model)}, calls(model)
    found = []
    for name, kernel in table.items():
        reader = _reader(model, kernel, table)
        if reader is not None and times[name] == times[reader] == 1 and not {name, reader} & set(bound):
            found.append((name, reader))
    return found


def _reader(model: tf_keras.Model, kernel: Kernel, table: dict[str, Kernel]) -> str | None:
    """Return the layer that alone reads the kernel's outputs, channel for channel; None if there is none."""
    following = consumers(model)
    ends = {tensor.node.layer.name for tensor in model.outputs}
    layer = kernel.layer
    if not (_trades(kernel) and (_is_linear(layer) or _is_relu(layer))):
        return None
    while layer.name not in ends and len(following[layer.name]) == 1:
        (layer,) = following[layer.name]
        if len(layer.inbound_nodes) != 1 or len(layer.inbound_nodes[0].keras_inputs) != 1:
            return None
        if layer.name in table:
            return layer.name if _trades(table[layer.name]) else None
        if not (isinstance(layer, _PASSING) or _is_relu(layer)):
            return None
    return None


def _trades(kernel: Kernel) -> bool:
    """Say whether each output and each input of the kernel is a channel of its own."""
    kinds = tf_keras.layers
    layer = kernel.layer
    if isinstance(layer, kinds.DepthwiseConv2D):
        return bool(layer.depth_multiplier == 1)
    plain = isinstance(layer, kinds.Conv2D) and not isinstance(layer, kinds.Conv2DTranspose) and layer.groups == 1
    return plain or (isinstance(layer, kinds.Dense) and len(layer.input_shape) == 2)


def _is_linear(layer: tf_keras.layers.Layer) -> bool:
    return getattr(layer, "activation", None) is tf_keras.activations.linear


def _is_relu(layer: tf_keras.layers.Layer) -> bool:
    if isinstance(layer, tf_keras.layers.ReLU):
        return layer.max_value is None and layer.threshold == 0
    return getattr(layer, "activation", None) is tf_keras.activations.relu


def _trade(first: Kernel, second: Kernel) -> float:
    """Make the largest weights of each channel equal on both sides; return how far the scales were from one."""
    one, other = first.value, second.value
    given = np.abs(one).max(first.inner_axes).reshape(-1)
    taken = np.abs(other).max(tuple(axis for axis in range(-other.ndim, 0) if axis != -2)).reshape(-1)
    usable = (given > 0) & (taken > 0)
    scale = np.where(usable, np.sqrt(given / np.where(usable, taken, 1.0)), 1.0)
    scale = np.clip(scale, 1 / _MOST, _MOST)
    axis = -2 if first.attribute == "depthwise_kernel" else -1
    outer = [-1 if a == axis else 1 for a in range(-one.ndim, 0)]
    getattr(first.layer, first.attribute).assign(one / scale.reshape(outer))
    if first.layer.use_bias:
        first.layer.bias.assign(np.asarray(first.layer.bias) / scale)
    inner = [-1 if a == -2 else 1 for a in range(-other.ndim, 0)]
    getattr(second.layer, second.attribute).assign(other * scale.reshape(inner))
    return float(np.abs(np.log(scale)).max())
