"""A convolution with a share of the channels at half the resolution, within the layer.

Source: Chen et al., Drop an Octave (arXiv 1904.05049). There, maps of half the size pass from layer to layer; here the
layer stands alone: it reads and writes whole maps, averages what it reads, and repeats what it writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
import tf_keras

from compress.graph.kernels import Kernel
from compress.graph.rewrite import NewLayer
from compress.graph.walk import Step
from compress.strategies.compact.form import Form, Order, Parts, Solver, apart, keeps_size
from compress.strategies.compact.guarantees import OctaveForm
from compress.strategies.goal import Goal
from compress.strategies.least_squares import matrix_of, moments, rows_of
from compress.strategies.repair import RIDGE, Repair, linear_output


@dataclass(frozen=True)
class Octave(Form):
    """Parts: a kernel [h, w, c, f]; the last ``alpha`` of inputs and filters are at half the resolution."""

    alpha: float = 0.5
    name = "octave"

    def high(self, count: int) -> int:
        """Return how many of so many channels stay at the whole resolution."""
        return count - round(self.alpha * count)

    def misfit(self, layer: tf_keras.layers.Conv2D) -> str | None:
        """Maps that can be halved, and channels on both sides."""
        if reason := keeps_size(layer) or apart(layer):
            return reason
        if set(layer.dilation_rate) != {1}:
            return "it is dilated"
        height, width = layer.input_shape[1:3]
        if None in (height, width) or height % 2 or width % 2:
            return f"its maps are {height or '?'} x {width or '?'}; halving them needs even sizes"
        for count, what in zip(layer.kernel.shape[2:], ("input channels", "filters"), strict=True):
            if not 0 < self.high(count) < count:
                return f"alpha {self.alpha:g} of its {count} {what} leaves none at one of the resolutions"
        return None

    def macs(self, kernel: Kernel) -> float:
        """What is whole on both sides costs as before, all else a quarter."""
        *_, channels, filters = kernel.value.shape
        share = self.high(channels) * self.high(filters) / (channels * filters)
        return kernel.macs * (share + (1 - share) / 4)

    def order(self, kernel: np.ndarray, inputs: Mapping[str, np.ndarray]) -> Order:
        """Have those at half the resolution that lose least."""
        high = np.arange(kernel.shape[2]) < self.high(kernel.shape[2])
        whole = high[:, None] & (np.arange(kernel.shape[3]) < self.high(kernel.shape[3]))
        return Order(_lost(kernel) * inputs["fine"][:, None], whole)

    def nearest(self, goal: Goal, start: Parts | None = None) -> Parts:
        """What is whole stays; the rest is best for inputs of which nothing is known."""
        kernel = np.array(goal.kernel)
        coarse = halved(kernel)
        high, filters = self.high(kernel.shape[2]), self.high(kernel.shape[3])
        kernel[:, :, high:], kernel[..., filters:] = coarse[:, :, high:], coarse[..., filters:]
        return (kernel,)

    def kernel(self, parts: Parts) -> np.ndarray:
        """The same, as the stand-in reads it."""
        return parts[0]

    def loss(self, goal: Goal, parts: Parts) -> float:
        """Of inputs of which nothing is known."""
        high, filters = self.high(goal.kernel.shape[2]), self.high(goal.kernel.shape[3])
        lost = _lost(goal.kernel)
        return float((lost.sum() - lost[:high, :filters].sum()) / max(float(np.sum(goal.kernel**2)), 1e-30))

    def build(self, layer: tf_keras.layers.Conv2D, parts: Parts) -> list[NewLayer]:
        """The part that is whole on both sides keeps the old layer's name."""
        (kernel,) = parts
        kinds, names = tf_keras.layers, self.added(layer.name)
        high, filters = self.high(kernel.shape[2]), self.high(kernel.shape[3])
        bias = np.asarray(layer.bias) if layer.use_bias else np.zeros(layer.filters)
        plain = layer.get_config() | {"activation": "linear"}

        def part(name: str, count: int, *, biased: bool) -> tf_keras.layers.Conv2D:
            config = {"name": name, "filters": count, "use_bias": biased and layer.use_bias}
            return kinds.Conv2D.from_config(plain | config)

        own = part(layer.name, filters, biased=True)
        rising, low = part(names[1], filters, biased=False), part(names[2], layer.filters - filters, biased=True)
        image = tf_keras.Input(layer.input_shape[1:])
        pooled = kinds.AveragePooling2D(2, name=names[0])(image)
        raised = kinds.UpSampling2D(2, name=names[3])(rising(pooled[..., high:]))
        whole = kinds.Add(name=names[4])([own(image[..., :high]), raised])
        value = kinds.Concatenate(name=names[6])([whole, kinds.UpSampling2D(2, name=names[5])(low(pooled))])
        if layer.activation is not tf_keras.activations.linear:
            value = kinds.Activation(layer.activation, name=f"{layer.name}_activation")(value)
        fragment = tf_keras.Model(image, value, name=f"{layer.name}_octave")
        weights = {
            own: (kernel[:, :, :high, :filters], bias[:filters]),
            rising: (kernel[:, :, high:, :filters], bias[:0]),
            low: (kernel[..., filters:], bias[filters:]),
        }
        for new, (values, shift) in weights.items():
            new.set_weights([values, shift] if new.use_bias else [values])
        return [NewLayer(fragment)]

    def added(self, name: str) -> list[str]:
        """Halving, the convolutions at half the resolution, and what brings them back."""
        parts = ("pool", "rising", "low", "raise", "add", "repeat", "concat", "activation")
        return [f"{name}_{part}" for part in parts]

    def guarantee(self, stage: str, names: Sequence[str]) -> OctaveForm:
        """There is a part at half the resolution."""
        return OctaveForm(stage, {name: self.added(name)[2] for name in names})

    def stand_in(self, layer: tf_keras.layers.Conv2D) -> tf_keras.layers.Conv2D:
        """The layer with a method of its own."""
        return OctaveConv(self, **layer.get_config())

    def solver(self, repair: Repair, step: Step) -> Solver:
        """Least squares at each resolution."""
        return _OctaveSolver(self, repair, step)


class OctaveConv(tf_keras.layers.Conv2D):
    """Stands for the layers of the form as long as a network is walked through."""

    def __init__(self, form: Octave, **config: object) -> None:
        super().__init__(**config)
        self.form = form

    def convolution_op(self, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """Convolve at two resolutions."""
        high, filters = self.form.high(kernel.shape[2]), self.form.high(kernel.shape[3])
        pooled = _pooled(inputs)
        whole = _convolved(inputs[..., :high], kernel[:, :, :high, :filters])
        rising = _convolved(pooled[..., high:], kernel[:, :, high:, :filters])
        low = _convolved(pooled, kernel[..., filters:])
        return tf.concat([whole + _repeated(rising), _repeated(low)], -1)


class _OctaveSolver(Solver):
    """The filters of each resolution by themselves, on what they read."""

    def __init__(self, form: Octave, repair: Repair, step: Step) -> None:
        self._form, self._repair, self._step = form, repair, step
        layer = step.node.layer
        self._start = matrix_of(layer)
        self._start[:-1] = form.nearest(Goal(np.asarray(layer.kernel)))[0].reshape(-1, layer.filters)

    def solve(self, target: np.ndarray | None) -> np.ndarray:
        """Return the kernels of both resolutions as one."""
        layer, repair, form = self._step.node.layer, self._repair, self._form
        x = self._step.changed_inputs[0]
        wanted = linear_output(layer, self._step.inputs[0]) if target is None else target
        known = repair.importance.get(layer.name)
        places = np.ones(wanted.shape[:-1], np.float32) if known is None else known.places
        high, filters = form.high(layer.kernel.shape[2]), form.high(layer.filters)

        def mixed(layer: tf_keras.layers.Layer, x: np.ndarray) -> tf.Tensor:
            parts = (tf.constant(x[..., :high]), _pooled(x)[..., high:])
            own, raised = (_by_place(rows_of(layer, part), layer) for part in parts)
            return tf.concat([own, _repeated(raised)], -1)

        pooled, wanted_low, places_low = (np.asarray(_pooled(v)) for v in (x, wanted[..., filters:], places[..., None]))
        halves = (
            moments(layer, x, wanted[..., :filters], places, rows=mixed),
            moments(layer, pooled, wanted_low, places_low),
        )
        starts = self._start[:, :filters], self._start[:, filters:]
        found = [repair.solved(layer.name, half, start, RIDGE) for half, start in zip(halves, starts, strict=True)]
        matrix = np.concatenate(found, 1)
        self.parts = (matrix[:-1].reshape(layer.kernel.shape),)
        return matrix


def halved(kernel: np.ndarray) -> np.ndarray:
    """Return the kernel for averages of two by two pixels: least squares for inputs of which nothing is known.

    A pixel is the first or the second of its pair; what falls on a pair is summed, and both cases are averaged.
    """
    first, second = (_pairs(size) for size in kernel.shape[:2])
    return np.einsum("yY,xX,YXcf->yxcf", first, second, kernel)


def _pairs(size: int) -> np.ndarray:
    offsets = np.arange(size) - size // 2
    pairs = (offsets + np.array([[0], [1]])) // 2
    return np.mean(pairs[:, None, :] == offsets[None, :, None], 0)


def _lost(kernel: np.ndarray) -> np.ndarray:
    """Return the energy [c, f] that no kernel at half the resolution gives of inputs of which nothing is known."""
    return np.sum(kernel**2, (0, 1)) - np.sum(halved(kernel) ** 2, (0, 1)) / 4


def _by_place(rows: tf.Tensor, layer: tf_keras.layers.Conv2D) -> tf.Tensor:
    """Return patches [n, h, w, places, channels], as a kernel has them."""
    places = layer.kernel_size[0] * layer.kernel_size[1]
    return tf.reshape(rows, [*rows.shape[:3], places, rows.shape[-1] // places])


def _convolved(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    return tf.nn.conv2d(x, kernel, 1, "SAME")


def _pooled(x: tf.Tensor | np.ndarray) -> tf.Tensor:
    return tf.nn.avg_pool2d(x, 2, 2, "VALID")


def _repeated(x: tf.Tensor) -> tf.Tensor:
    return tf.repeat(tf.repeat(x, 2, 1), 2, 2)
