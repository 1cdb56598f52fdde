"""Latency as the cost: what each layer, and each form of it at some ranks, takes on the board, measured alone."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import tf_keras

from compress.candidate import Candidate
from compress.errors import CompressError
from compress.graph.rewrite import NewLayer
from compress.progress import progress
from compress.strategies.lowrank.allocation import allocate, cheapest
from compress.strategies.lowrank.chain import build
from compress.strategies.lowrank.form import Form
from compress.strategies.lowrank.units import Choice, Curve, Unit
from compress.strategies.strategy import Context

_POINTS = 3
_ATTEMPTS = 5
_NEAR = 0.005


class Timer:
    """Measures files of a few layers; layers that are alike are measured once."""

    def __init__(self, candidate: Candidate, context: Context) -> None:
        self._context = context
        storage = replace(candidate.storage, float_layers=(), ranges={})
        self._base = Candidate(candidate.model, storage=storage)
        self._known: dict[str, float] = {}

    def of_file(self, candidate: Candidate) -> float:
        """Return the median milliseconds of a candidate's file."""
        with tempfile.TemporaryDirectory(prefix=".measured-") as folder:
            artifact = self._context.export(candidate, Path(folder, "model.tflite"))
            return self._context.median_latency(artifact, "macs")

    def of_layers(self, shape: Sequence[int | None], chain: Sequence[NewLayer]) -> float:
        """Return that of a chain of layers that reads an input of this shape, [samples, ...]."""
        configs = [{**new.layer.get_config(), "name": ""} for new in chain]
        key = json.dumps([list(shape), configs], sort_keys=True, default=str)
        if key not in self._known:
            image = tf_keras.Input(tuple(shape[1:]))
            x = image
            for new in chain:
                x = new.layer(x)
            model = tf_keras.Model(image, x)
            for new in chain:
                new.layer.set_weights(list(new.weights))
            sizes = [size or 1 for size in shape[1:]]
            samples = np.random.default_rng(0).normal(size=(16, *sizes)).astype(np.float32)
            self._known[key] = self.of_file(self._base.evolve(model=model, samples=samples))
        return self._known[key]


def timed(units: Sequence[Unit], timer: Timer) -> list[Unit]:
    """Return the units with costs in milliseconds; their curves are cut to what has one."""
    found = []
    with progress("latency of each layer") as shown:
        for number, unit in enumerate(units, start=1):
            layer = unit.kernel.layer
            shape = layer.input_shape
            as_it_is = build(unit.forms[0], layer, unit.chain) if unit.chain else [_alone(layer)]
            curves = [replace(curve, cost=_costs(unit, curve, shape, timer)) for curve in unit.curves]
            found.append(replace(unit, cost=timer.of_layers(shape, as_it_is), curves=tuple(curves)))
            shown.advance(number, len(units), unit.name)
    return found


def _alone(layer: tf_keras.layers.Layer) -> NewLayer:
    return NewLayer(layer.__class__.from_config(layer.get_config()), tuple(layer.get_weights()))


def _costs(unit: Unit, curve: Curve, shape: Sequence[int | None], timer: Timer) -> np.ndarray:
    most = len(curve.cost)
    ranks = np.unique(np.rint(np.linspace(1, most, _POINTS)).astype(int)) if most else np.zeros(0, int)
    times = [timer.of_layers(shape, random_chain(unit, curve.form, int(rank))) for rank in ranks]
    # Noise must not make a higher rank the faster one.
    return np.maximum.accumulate(np.interp(np.arange(1, most + 1), ranks, times)) if most else curve.cost


def random_chain(unit: Unit, form: Form, rank: int) -> list[NewLayer]:
    """Return layers as of a factorization, for their time: their weights are arbitrary."""
    shape = unit.kernel.value.shape
    sizes = dict(zip(form.letters, shape, strict=True))
    sizes |= {letter: int(width[0]) for letter, width in form.widths(shape, np.array([rank])).items()}
    rng = np.random.default_rng(0)
    factors = [rng.normal(size=[sizes[letter] for letter in term]).astype(np.float32) * 0.1 for term in form.terms]
    return build(form, unit.kernel.layer, factors)


def allocate_measured(
    units: Sequence[Unit],
    keep: float,
    total: float,
    share_of: Callable[[Sequence[Choice | None]], float],
    context: Context,
) -> tuple[list[Choice | None], float]:
    """Return the choices whose whole file takes at most ``keep`` of the time, and the share that it takes.

    Args:
        units: with costs in milliseconds.
        keep: the share of the latency that may remain.
        total: milliseconds of the whole model's file.
        share_of: measures the file of some choices, as a share of the model's.
        context: of the stage.

    Raises:
        CompressError: if even what is fastest takes longer, saying what was measured.
    """
    fastest = cheapest(units)
    least = share_of(fastest)
    if least > keep:
        raise CompressError(
            f"strategy.{context.stage}.latency",
            expected=f"at least {least:.3f}, measured with rank 1 in every layer where that is faster on the board",
            received=f"{keep:g}",
            fix=f"Raise strategy.{context.stage}.latency, or take channels away instead (prune_channels).",
        )
    goal, best = keep, (fastest, least)
    for _ in range(_ATTEMPTS):
        try:
            choices = allocate(units, goal, total, context.stage, "latency")
        except CompressError:
            # Alone, layers do not save as much as the goal; together, the fastest did.
            break
        reached = share_of(choices)
        if reached <= keep and reached >= best[1]:
            best = (choices, reached)
        if abs(reached - keep) < _NEAR and reached <= keep:
            break
        # What layers take in a network is not what they take alone.
        goal = float(np.clip(goal + keep * (1 - _NEAR / 2) - reached, 1e-3, 1.0))
    return best
