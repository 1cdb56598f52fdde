"""The TFLite converter: made for a Keras model, its complaints turned into errors for people."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import tensorflow as tf
import tf_keras

from compress.candidate import Candidate, Scheme
from compress.data.source import Data
from compress.errors import CompressError
from compress.graph.kernels import kernel_attributes
from compress.graph.norms import with_norms_as_convolutions
from compress.metrics.tflite_file import TFLiteFile
from compress.quiet import stderr_aside
from compress.words import counted

_OVERFLOWN = 1e37
"""The converter writes the largest float for an infinite limit."""
_NOT_WIDE = {"SQUARED_DIFFERENCE": "which stops or crashes it", "SUM": "whose results are wrong by half"}
"""Operator -> what becomes of it in LiteRT 2.3 with 16-bit activations."""


def make_converter(model: tf_keras.Model, *, select_tf_ops: bool = False) -> tf.lite.TFLiteConverter:
    """Return a converter of the model for one sample at a time.

    With ``select_tf_ops`` it writes operators of TensorFlow itself where LiteRT has none.

    Raises:
        CompressError: if a size of the input is not known.
    """
    shape = (1, *model.inputs[0].shape[1:])
    if any(size is None for size in shape):
        raise CompressError(
            "export",
            expected="a model whose input sizes are all known",
            received=f"an input of shape {model.inputs[0].shape}",
            fix="Build the model with a fixed input shape.",
        )
    # A function of its own: from_keras_model would leave the batch open, which costs operators and speed.
    call = tf.function(lambda image: model(image, training=False))
    signature = call.get_concrete_function(tf.TensorSpec(shape, tf.float32, name="image"))
    # The converter saves what holds the weights. Of a Keras model it would trace each layer: the very same
    # file in four to nine times the time.
    holder = tf.Module()
    holder.weights = model.weights
    converter = tf.lite.TFLiteConverter.from_concrete_functions([signature], holder)
    if select_tf_ops:
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS, tf.lite.OpsSet.SELECT_TF_OPS]
    return converter


def integer_form(candidate: Candidate) -> tf_keras.Model:
    """Return the model that is converted for integers: the candidate's, or one that is the same to float precision."""
    # One step for all channels would spoil what a convolution multiplies them with.
    return candidate.model if one_scale_per_tensor(candidate) else with_norms_as_convolutions(candidate.model)


def one_scale_per_tensor(candidate: Candidate) -> bool:
    """Say whether a guarantee needs integer weights to share one scale per tensor."""
    return any(guarantee.one_scale_per_tensor for guarantee in candidate.guarantees)


def check_loops(model: tf_keras.Model, *, wide: bool = False) -> None:
    """Refuse recurrent layers that the converter cannot write in integers.

    A plain LSTM becomes one operator, which LiteRT does not run with 16-bit activations (``wide``), an unrolled layer
    many. Others become loops, on which the converter crashes when
    it calibrates them; two LSTMs of a bidirectional layer give wrong numbers in integers (measured: 50 % off).

    Raises:
        CompressError: naming the layer.
    """
    for layer in model.layers:
        both_ways = any(isinstance(inner, tf_keras.layers.Bidirectional) for inner in layer._flatten_layers())
        for inner in layer._flatten_layers():
            if not isinstance(inner, tf_keras.layers.RNN) or getattr(inner, "unroll", False):
                continue
            plain = isinstance(inner, tf_keras.layers.LSTM) and getattr(inner, "_could_use_gpu_kernel", False)
            if wide and plain:
                raise CompressError(
                    f"export as int16, layer {layer.name}",
                    expected="layers that LiteRT has 16-bit operators for",
                    received=type(inner).__name__,
                    fix="Write scheme=int8, or build it with unroll=True and the same weights.",
                )
            if both_ways or not plain or inner.return_state:
                raise CompressError(
                    f"export in integers, layer {layer.name}",
                    expected="plain LSTMs that run one way and return no state, or unrolled layers",
                    received=f"{'Bidirectional ' * both_ways}{type(inner).__name__}"
                    f"{' with return_state' * inner.return_state}",
                    fix="Build it with unroll=True and the same weights, or quantize with scheme=dynamic.",
                )


def check_wide(content: bytes, model: tf_keras.Model) -> None:
    """Refuse a file with operators that the converter writes with 16-bit activations and LiteRT does not run so.

    Raises:
        CompressError: naming the layer.
    """
    file = TFLiteFile(content)
    for operator in file.operators:
        output = file.tensors[operator.outputs[0]]
        if operator.name in _NOT_WIDE and output.dtype == np.int16:
            raise CompressError(
                f"export as int16, layer {layer_of(output.name, model) or output.name}",
                expected="operators that LiteRT computes with 16-bit activations",
                received=f"{operator.name}, {_NOT_WIDE[operator.name]}",
                fix="Write scheme=int8 or scheme=dynamic, or put a layer in its place that does the same otherwise.",
            )


@contextmanager
def complaints_explained(scheme: Scheme, model: tf_keras.Model | None = None) -> Iterator[None]:
    """Turn what the converter raises into a :class:`CompressError`, and keep what it prints aside.

    Layers whose operations LiteRT does not have are named if the ``model`` is given.
    """
    try:
        with warnings.catch_warnings(), stderr_aside(show_on_failure=False):
            warnings.simplefilter("ignore")
            yield
    except CompressError:
        raise
    except Exception as error:
        # The converter raises many types; each of them means that it refuses the model.
        unknown = sorted(set(re.findall(r"'tf\.(\w+)' op is neither", str(error))))
        if unknown and model is not None:
            raise CompressError(
                f"export as {scheme}, layer {', '.join(_layers_with(unknown, model)) or '?'}",
                expected="operations that LiteRT has",
                received=", ".join(f"tf.{name}" for name in unknown),
                fix="Put layers in their place that do the same with other operations, or end the model before them."
                + _fallback(model),
            ) from error
        raise CompressError(
            f"export as {scheme}",
            expected="a model that the TFLite converter accepts",
            received=_reason(error),
            fix="Replace the layer that is named, or leave it out of the model that is exported."
            if scheme == "float32"
            else "Choose another storage (quantize with scheme=dynamic), or replace the layer that is named.",
        ) from error


def _fallback(model: tf_keras.Model) -> str:
    """Say what a file with operators of TensorFlow itself would cost, measured on this model; empty: there is none."""
    try:
        with stderr_aside(show_on_failure=False):
            size = len(make_converter(model, select_tf_ops=True).convert())
    except Exception:
        # As above: the converter refuses the model in this way, too, which is no news.
        return ""
    return (
        f" With TensorFlow's own operators it would be a file of {size:,} bytes (python -m compress.deploy.export "
        "my.keras -o my.tflite --select-tf-ops), which cannot be measured here: it needs a runtime with the Flex "
        "delegate, as tensorflow-lite-select-tf-ops is for Android, and no microcontroller has one."
    )


def calibration_samples(candidate: Candidate, data: Data, images: int) -> Iterator[list[np.ndarray]]:
    """Yield samples [1, ...] that ranges are calibrated on, always the same ones.

    They are the candidate's own if it has any, else some of the training part.
    """
    source = data.train.x if candidate.samples is None else candidate.samples
    for index in np.random.default_rng(0).permutation(len(source))[:images]:
        yield [source[index : index + 1].astype(np.float32)]


def check_calibration(samples: Iterable[Sequence[np.ndarray]]) -> None:
    """Refuse samples that ranges cannot be taken from.

    Raises:
        CompressError: if there are none, if one of their numbers is not finite, or if all of them are equal.
    """
    low, high, finite, count = np.inf, -np.inf, True, 0
    for (sample,) in samples:
        count += 1
        finite = finite and bool(np.isfinite(sample).all())
        low, high = min(low, float(sample.min())), max(high, float(sample.max()))
    if count and finite and low < high:
        return
    raise CompressError(
        "calibration",
        expected="samples of finite numbers, not all equal, to take the ranges of activations from",
        received="no sample"
        if not count
        else f"{counted(count, 'sample')} of nothing but {low:g}"
        if finite
        else f"NaN or infinite values in {counted(count, 'sample')}",
        fix="Bring training images like those that the model will see, or, for a model with batch norms, calibrate "
        "without data: calibrate_on=synthetic.",
    )


def refuse_overflow(layer: str, low: float, high: float) -> None:
    """Refuse a layer whose outputs on the calibration samples, from ``low`` to ``high``, are not finite.

    Raises:
        CompressError: naming the layer.
    """
    if not (abs(low) < _OVERFLOWN and abs(high) < _OVERFLOWN):
        raise CompressError(
            f"calibration, layer {layer}",
            expected="finite activations, which integers can stand for",
            received=f"a range from {low:g} to {high:g}",
            fix="The network overflows on its own inputs: check its weights and what the data hold; or bring the model "
            "from before its training diverged.",
        )


def _layers_with(operations: Sequence[str], model: tf_keras.Model) -> list[str]:
    """Return the layers in whose graphs there are operations of these types."""
    shape = (1, *model.inputs[0].shape[1:])
    call = tf.function(lambda image: model(image, training=False))
    graph = call.get_concrete_function(tf.TensorSpec(shape, tf.float32)).graph
    found = [layer_of(op.name, model) for op in graph.get_operations() if op.type in operations]
    return list(dict.fromkeys(name for name in found if name))


def layer_of(tensor: str, model: tf_keras.Model) -> str:
    """Return the layer whose weights made a tensor ``model/layer/operation;...``, else one that it is named after.

    Empty if it names none.
    """
    segments = [f"/{segment}/" for segment in tensor.split(";")]
    # What is fused into an operator stands behind it: the last layer says what the tensor is.
    weighted = [layer for layer in model.layers if kernel_attributes(layer)]
    named = (
        layer.name for layer in (*weighted, *model.layers[::-1]) if any(f"/{layer.name}/" in text for text in segments)
    )
    return next(named, "")


def _reason(error: Exception) -> str:
    """Return what the converter says without the traces of its compiler."""
    text = re.sub(r"(loc|callsite|fused)\S*|<unknown>\S*|error:|note:", " ", str(error))
    return " ".join(text.split())[:300] or type(error).__name__
