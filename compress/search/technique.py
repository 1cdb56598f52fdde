"""A technique of a search: a strategy, one field of it, and the values that a layer may have there."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import tf_keras

from compress.candidate import Effect
from compress.graph.kernels import Kernel, kernels
from compress.graph.selection import Rule, Selection
from compress.pipeline.stage import Stage
from compress.strategies.strategy import Strategy
from compress.training import Recovery

UNTRAINED = Recovery(method="none", epochs=0.0)
Value = int | float


class Kind(IntEnum):
    """What a technique changes, in the order in which stages follow each other. A layer has one of each at most."""

    STRUCTURE = 0
    """Fewer or other layers and channels."""
    ZEROS = 1
    VALUES = 2
    """Few distinct values; or how the file writes them."""


@dataclass(frozen=True)
class Technique:
    """A strategy for each level.

    Args:
        name: of the strategy in ``conf/strategy``.
        field: what is varied.
        levels: value of the field -> the strategy.
        trained: the same for a strategy that realises the levels where there is training; empty: the first ones do.
        code: digest of the strategies' code.
    """

    name: str
    field: str
    levels: Mapping[Value, Strategy]
    trained: Mapping[Value, Strategy]
    code: str

    @property
    def strategy(self) -> Strategy:
        """One of its strategies."""
        return next(iter(self.levels.values()))

    @property
    def kind(self) -> Kind:
        """What it changes."""
        effects = self.strategy.effects
        if effects & {Effect.CUT, Effect.REPLACE}:
            return Kind.STRUCTURE
        return Kind.ZEROS if Effect.ZERO in effects else Kind.VALUES

    def config(self, value: Value) -> list[Any]:
        """Return what decides the outcome of a level, as plain values."""
        strategy = self.levels[value]
        return [self.name, self.code, dataclasses.asdict(strategy)]  # type: ignore[call-overload]

    def trained_config(self, value: Value) -> list[Any]:
        """Return what decides the outcome of a level where there is training, as plain values."""
        return [dataclasses.asdict(self.trained[value])] if self.trained else []  # type: ignore[call-overload]

    def label(self, value: Value) -> str:
        """Name a level, e.g. ``quantize bits 4``."""
        return f"{self.name} {self.field} {value:g}"

    def stages(self, chosen: Mapping[Value, Collection[str]], *, trains: bool) -> list[Stage]:
        """Return stages that bring layers to their levels: one for all where the strategy has ``layer_<field>``.

        Args:
            chosen: value of the field -> names of layers.
            trains: whether there is training.
        """
        levels = self.trained if trains and self.trained else self.levels
        single = f"layer_{self.field}"
        found: list[Stage] = []
        if chosen and single in {item.name for item in dataclasses.fields(levels[next(iter(chosen))])}:  # type: ignore[arg-type]
            widest = max(chosen, key=lambda value: (len(chosen[value]), value))
            rules = {re.escape(layer): value for value, layers in chosen.items() if value != widest for layer in layers}
            # Other fields of the technique may not go together with rules for layers: then a stage for each level.
            with contextlib.suppress(ValueError):
                strategy = dataclasses.replace(levels[widest], **({single: rules} if rules else {}))  # type: ignore[type-var]
                return [stage(self.name, strategy, [layer for layers in chosen.values() for layer in layers])]
        for value, layers in chosen.items():
            suffix = str(len(found) + 1) if found else ""
            found.append(stage(f"{self.name}{suffix}", levels[value], layers))
        return found


def stage(name: str, strategy: Strategy, layers: Collection[str]) -> Stage:
    """Return the stage of a strategy on these layers, without training."""
    rules = tuple(Rule(name=re.escape(layer)) for layer in sorted(layers))
    return Stage(name, strategy, Selection(only=rules, where=f"stage {name}"), UNTRAINED)


def origin_of(name: str, originals: Sequence[str]) -> str | None:
    """Return the original layer that a layer came from, by its name: ``conv1`` of ``conv1`` and ``conv1_reduce``."""
    matches = [layer for layer in originals if name == layer or name.startswith(f"{layer}_")]
    return max(matches, key=len, default=None)


def kernels_by_origin(model: tf_keras.Model, originals: Sequence[str]) -> dict[str, list[Kernel]]:
    """Return the kernels that stand in the place of each original layer."""
    found: dict[str, list[Kernel]] = {name: [] for name in originals}
    for kernel in kernels(model):
        origin = origin_of(kernel.layer.name, originals)
        if origin is not None:
            found[origin].append(kernel)
    return found


def weighted_layers(model: tf_keras.Model) -> dict[str, int]:
    """Return the layers with kernels and their multiply-adds."""
    found: dict[str, int] = {}
    for kernel in kernels(model):
        found[kernel.layer.name] = found.get(kernel.layer.name, 0) + kernel.macs
    return found


def layers_by_resolution(model: tf_keras.Model, share: float = 0.1) -> list[list[str]]:
    """Return the layers with kernels in groups, those first whose kernels are applied at most positions.

    Neighbouring resolutions go together until they make ``share`` of the model's multiply-adds: what fewer of them save
    is lost in the noise of a board.
    """
    macs = weighted_layers(model)
    positions = {kernel.layer.name: kernel.macs_per_weight for kernel in kernels(model)}
    found: list[list[str]] = []
    full = True
    for resolution in sorted(set(positions.values()), reverse=True):
        if full:
            found.append([])
        found[-1] += [name for name in macs if positions[name] == resolution]
        full = sum(macs[name] for name in found[-1]) >= share * sum(macs.values())
    if len(found) > 1 and not full:
        found[-2:] = [found[-2] + found[-1]]
    return found


def same_shapes(one: tf_keras.Model, other: tf_keras.Model) -> bool:
    """Say whether two models have the same layers with weights of the same shapes."""

    def shapes(model: tf_keras.Model) -> list[tuple[str, list[tuple[int, ...]]]]:
        return [(layer.name, [tuple(np.shape(w)) for w in layer.weights]) for layer in model.layers]

    return shapes(one) == shapes(other)
