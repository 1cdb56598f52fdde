"""A convolution in groups that read different channels, behind a channel shuffle.

Source: Zhang et al., ShuffleNet (arXiv 1707.01083). The shuffle stands before the convolution, so that a batch norm
behind it still merges into its kernel. Which channels form a group is chosen by the strategy, which lays the
channels of the network in another order first. LiteRT has kernels for grouped convolutions, of floats and of integers:
of 64 channels and more they take the time that their multiply-adds say (measured), of few channels no less than before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tf_keras

from compress.graph.kernels import Kernel
from compress.graph.rewrite import NewLayer
from compress.strategies.compact.form import Form, Order, Parts, bias_of
from compress.strategies.compact.guarantees import GroupedForm
from compress.strategies.goal import Goal


@dataclass(frozen=True)
class Grouped(Form):
    """Parts: the kernel [h, w, c / groups, f] of the grouped convolution."""

    groups: int = 2
    shuffle: bool = True
    name = "grouped"

    def misfit(self, layer: tf_keras.layers.Conv2D) -> str | None:
        """Groups are equally large; a shuffle must know the size of the map."""
        channels, filters = layer.kernel.shape[2:]
        for count, what in ((channels, "input channels"), (filters, "filters")):
            if count % self.groups:
                return f"{self.groups} groups do not divide its {count} {what}"
        if self.shuffle and None in layer.input_shape[1:3]:
            return "a shuffle needs maps of a known size"
        return None

    def macs(self, kernel: Kernel) -> float:
        """Each filter reads one group."""
        return kernel.macs / self.groups

    def read(self, channels: int) -> np.ndarray:
        """Return the group that reads each channel."""
        places = np.arange(channels)
        return places % self.groups if self.shuffle else places // (channels // self.groups)

    def written(self, filters: int) -> np.ndarray:
        """Return the group of each filter."""
        return np.arange(filters) // (filters // self.groups)

    def order(self, kernel: np.ndarray, inputs: Mapping[str, np.ndarray]) -> Order:
        """Have as much energy as can be within groups."""
        whole = self.read(kernel.shape[2])[:, None] == self.written(kernel.shape[3])
        return Order(np.sum(kernel**2, (0, 1)) * inputs["whole"][:, None], whole)

    def nearest(self, goal: Goal, start: Parts | None = None) -> Parts:
        """For each group by itself: what is left of the weights, or least squares."""
        *_, channels, filters = goal.kernel.shape
        read, written = self.read(channels), self.written(filters)
        found = np.zeros((*goal.kernel.shape[:2], channels // self.groups, filters))
        rows = np.arange(goal.kernel[..., 0].size).reshape(goal.kernel.shape[:-1])
        matrix = goal.kernel.reshape(-1, filters)
        for group in range(self.groups):
            left, own = rows[:, :, read == group], written == group
            solution = matrix[left.ravel()][:, own]
            if goal.inputs is not None:
                gram = goal.inputs[left.ravel()]
                solution = np.linalg.solve(gram[:, left.ravel()], gram @ matrix[:, own])
            found[..., own] = solution.reshape(*left.shape, -1)
        return (found,)

    def kernel(self, parts: Parts) -> np.ndarray:
        """Zeros where a filter does not read."""
        (given,) = parts
        height, width, size, filters = given.shape
        read, written = self.read(size * self.groups), self.written(filters)
        found = np.zeros((height, width, size * self.groups, filters), given.dtype)
        for group in range(self.groups):
            own = written == group
            found[np.ix_(range(height), range(width), read == group, own)] = given[..., own]
        return found

    def build(self, layer: tf_keras.layers.Conv2D, parts: Parts) -> list[NewLayer]:
        """The convolution keeps the old layer's name, bias and activation."""
        convolution = tf_keras.layers.Conv2D.from_config(layer.get_config() | {"groups": self.groups})
        last = NewLayer(convolution, (parts[0], *bias_of(layer)))
        if not self.shuffle:
            return [last]
        height, width, channels = layer.input_shape[1:]
        kinds, names = tf_keras.layers, self.added(layer.name)
        shuffled = [
            kinds.Reshape((height, width, channels // self.groups, self.groups), name=names[0]),
            kinds.Permute((1, 2, 4, 3), name=names[1]),
            kinds.Reshape((height, width, channels), name=names[2]),
        ]
        return [*(NewLayer(shuffling) for shuffling in shuffled), last]

    def added(self, name: str) -> list[str]:
        """The shuffle."""
        return [f"{name}_{part}" for part in ("split", "shuffle", "join")] if self.shuffle else []

    def guarantee(self, stage: str, names: Sequence[str]) -> GroupedForm:
        """It has so many groups."""
        return GroupedForm(stage, dict.fromkeys(names, self.groups))
