"""Mixed precision: bits for each layer, chosen together under a budget.

Source: Yao et al., HAWQ-V3 (arXiv 2011.10680, section 3.4), for the integer program; sensitivities are measured here,
as the change of the logits when one layer alone is rounded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.dataclasses import dataclass
from scipy.optimize import LinearConstraint, milp

from compress.candidate import Calibration, Candidate, Effect, Grid, Guarantee, Skipped, Storage
from compress.errors import CompressError
from compress.graph.fold import fold_layer_norm
from compress.graph.kernels import kernels
from compress.graph.rewrite import calls, copy_model
from compress.graph.walk import Walk
from compress.metrics.size import file_bytes
from compress.progress import progress
from compress.strategies.budget import Budget, one_budget
from compress.strategies.least_squares import assign_matrix, is_linear, matrix_of
from compress.strategies.options import refuse_without_effect
from compress.strategies.quantization.calibration import check_activations
from compress.strategies.quantization.float_by_latency import keep_floats_within
from compress.strategies.quantization.grid import OnGrid
from compress.strategies.quantization.rounding import round_layers, round_to_grid
from compress.strategies.quantization.stored import FinalStorage, Stored, float_only, refuses_floats
from compress.strategies.quantization.valued import valued_layers
from compress.strategies.repair import RIDGE, Repair, called_once, change_of_logits, outputs_of
from compress.strategies.strategy import STRICT, Context, Strategy

_SENSITIVITY_SAMPLES = 256


@dataclass(frozen=True, config=STRICT)
class MixedPrecision(Strategy):
    """Quantize to int8 activations and weights of different bits, so that the ``.tflite`` file meets its budget.

    Layers that are no Dense or ordinary Conv2D have 8 bits.

    Args:
        bytes: share of the bytes of the float file that is kept, at most; 0.2 if neither is given.
        latency: instead, share of the float file's median latency on the board that is kept, at most: integer weights
            of fewer bits run no faster, so layers have 8 bits or stay floats.
        choices: bits that a layer may have. LiteRT packs 4 and fewer; 5 to 7 take as much room as 8.
        images: unlabelled calibration samples for sensitivities and rounding.
        ranges: how the ranges of activations are chosen, on ``calibration_images`` training images.
    """

    bytes: Annotated[float, Gt(0), Lt(1)] | None = None
    latency: Annotated[float, Gt(0), Lt(1)] | None = None
    choices: Annotated[tuple[Annotated[int, Ge(2), Le(8)], ...], MinLen(2)] = (4, 8)
    images: Annotated[int, Ge(16), Le(1_000_000)] = 500
    ranges: Literal["minmax", "percentile", "mse", "entropy"] = "mse"
    calibration_images: Annotated[int, Ge(1)] = 256

    stores = "int8"

    @property
    def effects(self) -> frozenset[Effect]:  # type: ignore[override]
        """What it does to a layer: under a latency it leaves the weights alone."""
        rounds = self._budget().unit == "bytes"
        return frozenset({Effect.STORE, *((Effect.ROUND, Effect.SPREAD) if rounds else ())})

    @property
    def establishes(self) -> type[Guarantee]:  # type: ignore[override]
        """The kind of guarantee that it adds."""
        return OnGrid if self._budget().unit == "bytes" else FinalStorage

    def __post_init__(self) -> None:
        """Refuse two budgets, choices that are none, and fields that have no effect."""
        self._budget()
        if len(set(self.choices)) < len(self.choices):
            raise ValueError(f"choices that differ from one another, not {list(self.choices)}")
        refuse_without_effect(self, [(self.latency is None, ("choices", "images"), "a budget of bytes")])

    def _budget(self) -> Budget:
        return one_budget(Budget("bytes", 0.2), bytes=self.bytes, latency=self.latency)

    def clashes_with(self, earlier: Strategy) -> str | None:
        """Say why it cannot keep what ``earlier`` establishes: under a latency layers stay floats."""
        floats = refuses_floats(earlier.stores) if self._budget().unit == "latency" else None
        return floats or super().clashes_with(earlier)

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Measure, choose, round."""
        check_activations(candidate, context.data, self.calibration_images)
        chosen = context.selection.names(candidate.model)
        lacking = float_only(candidate.model, chosen)
        chosen -= {item.layer for item in lacking}
        left_out = tuple(k.layer.name for k in kernels(candidate.model) if k.layer.name not in chosen)
        storage = Storage("int8", Calibration(self.calibration_images, self.ranges), float_layers=left_out)
        result = candidate.evolve(model=copy_model(candidate.model), storage=storage, skipped=())
        budget = self._budget()
        if budget.unit == "latency":
            return self._within_latency(result.evolve(skipped=context.skip(lacking)), context, chosen, budget.keep)
        samples = context.calibration_samples(self.images)
        folded = fold_layer_norm(candidate.model, valued_layers(candidate.guarantees))
        repair = Repair(folded, samples, context.seed, candidate.guarantees)
        table = {kernel.layer.name: kernel for kernel in kernels(repair.folded) if kernel.layer.name in chosen}
        times = calls(repair.folded)
        names = [name for name, kernel in table.items() if is_linear(kernel.layer) and times[name] == 1]
        if not names:
            raise context.nothing_done("a Dense or an ordinary Conv2D, whose bits can be chosen", ())
        choices = sorted(self.choices)
        costs = {name: {bits: table[name].size * (0.5 if bits <= 4 else 1) for bits in choices} for name in names}
        whole = _file_bytes(candidate.evolve(model=copy_model(candidate.model), storage=Storage()), context)
        most = budget.keep * whole

        def size_at(bits: Mapping[str, int]) -> int:
            """Bytes of the file; they do not depend on the weights' values."""
            grids = {f"{name}/kernel": _widest_grid(table[name].value, width) for name, width in bits.items()}
            trial = result.evolve(model=copy_model(repair.folded))
            return _file_bytes(trial.with_guarantee(OnGrid.of(context.stage, trial.model, grids)), context)

        least = size_at(dict.fromkeys(names, choices[0]))
        bits = None
        if least <= most:
            errors = context.remember(
                "bit sensitivity",
                [names, choices, self.images],
                lambda: measure_sensitivity(repair, names, choices),
            )
            cheapest = sum(min(cost.values()) for cost in costs.values())
            bits = _fitting(_numbered(errors), costs, cheapest + most - least, size_at, most)
        if bits is None:
            reachable = least / whole
            raise CompressError(
                f"strategy.{context.stage}.bytes",
                expected=f"at least {reachable:.3f}, what all layers take at {choices[0]} bits"
                if reachable < 1
                else "a model whose integer file is smaller than its float file: this one's is not, at any bits",
                received=f"{budget.keep:g}",
                fix=f"Allow more, {'add fewer bits to choices, ' * (choices[0] > 4)}or remove weights first "
                "(prune_channels, lowrank).",
            )
        model, grids = round_layers(repair, bits)
        skipped = lacking + [
            Skipped(name, "it has 8 bits: it is no Dense or Conv2D that is called once")
            for name in table
            if name not in bits
        ]
        widths = np.array([[bits[name], table[name].size] for name in bits], float)
        return (
            result.evolve(
                model=model,
                skipped=context.skip(skipped),
                measured={"mean_bits": float(np.average(widths[:, 0], weights=widths[:, 1]))},
            )
            .with_guarantee(OnGrid.of(context.stage, model, grids))
            .with_guarantee(Stored(context.stage, "int8", left_out))
        )

    def _within_latency(
        self, candidate: Candidate, context: Context, chosen: Collection[str], share: float
    ) -> Candidate:
        names = [kernel.layer.name for kernel in kernels(candidate.model) if kernel.layer.name in chosen]
        kept = keep_floats_within(candidate, context, names, share)
        skipped = (Skipped(name, "it stays a float: the latency allows it", by_choice=True) for name in kept)
        floats = (*candidate.storage.float_layers, *kept)
        storage = replace(candidate.storage, float_layers=floats)
        result = candidate.evolve(storage=storage, skipped=(*candidate.skipped, *skipped))
        return result.with_guarantee(FinalStorage(context.stage, "int8", floats))


def _file_bytes(candidate: Candidate, context: Context) -> int:
    with tempfile.TemporaryDirectory(prefix="compress-") as folder:
        return file_bytes(context.export(candidate, Path(folder, "model.tflite")).path)


def _widest_grid(kernel: np.ndarray, bits: int) -> Grid:
    """Return the grid of a kernel that clips nothing."""
    largest = np.maximum(np.abs(kernel).max(tuple(range(kernel.ndim - 1)), keepdims=True), 1e-12)
    return Grid((largest / (2 ** (bits - 1) - 1)).astype(np.float32), bits)


def _fitting(
    errors: Mapping[str, Mapping[int, float]],
    costs: Mapping[str, Mapping[int, float]],
    allowed: float,
    size_at: Callable[[Mapping[str, int]], int],
    most: float,
) -> dict[str, int] | None:
    """Return the best bits whose file has at most ``most`` bytes; costs leave out what tensors are padded with."""
    while (bits := choose_bits(errors, costs, allowed)) is not None and (size := size_at(bits)) > most:
        allowed = sum(costs[name][width] for name, width in bits.items()) - max(size - most, 1.0)
    return bits


def _numbered(errors: Mapping[str, Mapping[Any, float]]) -> dict[str, dict[int, float]]:
    """Return the errors with bits that are numbers: JSON knows no such keys."""
    return {layer: {int(bits): error for bits, error in row.items()} for layer, row in errors.items()}


def measure_sensitivity(repair: Repair, layers: Sequence[str], choices: Sequence[int]) -> dict[str, dict[int, float]]:
    """Return the mean squared change of the logits when one layer alone is rounded, by layer and bits.

    Args:
        repair: the model, made ready.
        layers: Dense and ordinary Conv2D layers; others, and shared ones, are left out.
        choices: bits of a weight.
    """
    found: dict[str, dict[int, float]] = {}
    few = min(_SENSITIVITY_SAMPLES, len(repair.samples))
    wanted = outputs_of(repair.folded, repair.samples[:few])
    repair.measure_importance(layers)
    with progress("bit sensitivity") as shown:
        for step in (walk := Walk(repair.folded, copy_model(repair.folded), repair.samples)):
            layer = step.layer
            if layer.name not in layers or not is_linear(layer) or not called_once(walk, step):
                continue
            known, before = repair.moments(step), matrix_of(layer)
            errors = {}
            for bits in choices:
                assign_matrix(layer, round_to_grid(known, before, bits, RIDGE, repair.alive.get(layer.name))[0])
                values = {key: value[:few] for key, value in walk.values.items()}
                final = walk.rest(step.position, walk.run(step.node, layer, values), few)
                errors[bits] = change_of_logits(repair.folded, final, wanted)
            assign_matrix(layer, before)
            found[layer.name] = errors
            shown.advance(len(found), len(layers), layer.name)
    return found


def choose_bits(
    errors: Mapping[str, Mapping[int, float]], costs: Mapping[str, Mapping[int, float]], most: float
) -> dict[str, int] | None:
    """Return the bits for each layer with the least sum of errors whose costs add up to at most ``most``.

    None if even the cheapest choice costs more. Solved exactly, as a program in one binary variable for each choice.
    """
    pairs = [(layer, bits) for layer, choices in errors.items() for bits in choices]
    objective = np.array([errors[layer][bits] for layer, bits in pairs])
    once = np.array([[layer == own for own, _ in pairs] for layer in errors], float)
    spent = np.array([[costs[layer][bits] for layer, bits in pairs]])
    solved = milp(
        objective / max(objective.max(initial=0.0), 1e-30),
        integrality=np.ones(len(pairs)),
        bounds=(0, 1),
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(spent, -np.inf, most)],
    )
    if solved.x is None:
        return None
    return {layer: bits for (layer, bits), taken in zip(pairs, solved.x, strict=True) if taken > 0.5}
