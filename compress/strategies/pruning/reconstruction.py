"""Reconstruction: the cut and the repair of a network as one closed-form problem, without labels or gradient steps.

Layer after layer, original and cut network are run side by side on calibration samples. Where a layer reads channels
that may go, second-order elimination (Hassibi and Stork, 1992) takes out those that cost least after a re-solve; then
the layer is re-solved by least squares so that what it gives, or the sum that it is added to, is again that of the
*original* network, which makes up for all errors before it. How many channels each group keeps follows from the
measured change of the logits per multiply-add saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tf_keras
from scipy.interpolate import PchipInterpolator

from compress.graph.channels.groups import Channels, Group
from compress.graph.residual import ResidualBlock, without_branches
from compress.graph.rewrite import calls, copy_model
from compress.graph.walk import Walk
from compress.progress import progress
from compress.strategies.budget import Budget
from compress.strategies.least_squares import assign_matrix, eliminate, is_linear, matrix_of
from compress.strategies.pruning.plan import Plan, Size
from compress.strategies.repair import REPAIR_RIDGE, RIDGE, Repair, called_once, change_of_logits, outputs_of

_LEVELS = (7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16)
_SENSITIVITY_SAMPLES = 256


@dataclass(frozen=True)
class Cuttable:
    """A group that one layer writes and one linear layer reads, and its units' rows in that layer's matrix."""

    group: Group
    reader: str
    rows: np.ndarray


@dataclass(frozen=True)
class Curve:
    """Change of the logits (mean squared) when a group keeps 1, 2, ... of its units."""

    errors: np.ndarray


class Reconstruction:
    """Chooses and removes channels of the model behind ``repair``, of the groups that only ``names`` write."""

    def __init__(self, repair: Repair, names: frozenset[str]) -> None:
        self.repair = repair
        self.channels = Channels(repair.folded)
        self.cuttable = cuttable_groups(self.channels, names)

    def prepare(self) -> None:
        """Measure what errors of each reader's output mean for the logits."""
        self.repair.measure_importance(item.reader for item in self.cuttable)

    def curves(self) -> list[Curve]:
        """Return, for each cuttable group, the change of the logits over the number of units kept."""
        by_reader = {item.reader: number for number, item in enumerate(self.cuttable)}
        curves: list[Curve | None] = [None] * len(self.cuttable)
        repair = self.repair
        walk = Walk(repair.folded, copy_model(repair.folded), repair.samples)
        few = min(_SENSITIVITY_SAMPLES, len(repair.samples))
        wanted = outputs_of(repair.folded, repair.samples[:few])
        with progress("channel sensitivity") as shown:
            for step in walk:
                number = by_reader.get(step.layer.name)
                if number is None:
                    continue
                item = self.cuttable[number]
                known, before = repair.moments(step), matrix_of(step.layer)
                order, _ = eliminate(known, item.rows, repair.metric(item.reader), RIDGE)
                points = {len(item.group): 0.0}
                for level in _LEVELS:
                    count = max(1, round(level * len(item.group)))
                    if count in points:
                        continue
                    left = _left(item, order[len(order) - count :], before)
                    assign_matrix(step.layer, repair.solved(item.reader, known, before, RIDGE, left))
                    outputs = walk.run(step.node, step.layer, _few(walk.values, few))
                    final = walk.rest(step.position, outputs, few)
                    points[count] = change_of_logits(repair.folded, final, wanted)
                # The walk goes on as the original.
                assign_matrix(step.layer, before)
                curves[number] = _curve(points, len(item.group))
                shown.advance(sum(curve is not None for curve in curves), len(curves), item.group.name)
        return [curve for curve in curves if curve is not None]

    def run(self, keep: Sequence[int], gone: Sequence[ResidualBlock] = ()) -> tuple[tf_keras.Model, np.ndarray]:
        """Cut every cuttable group to ``keep`` units and repair the network.

        Args:
            keep: units of each cuttable group.
            gone: blocks whose branches will give nothing; what follows makes up for them, too.

        Returns:
            A model of the original's structure, repaired, that ignores the channels that go; and the units that stay.
            The branches of the blocks are still there.
        """
        by_reader = {item.reader: (item, count) for item, count in zip(self.cuttable, keep, strict=True)}
        stay = np.ones(self.channels.count, bool)
        repair = self.repair
        changed = copy_model(repair.folded)
        branches = {block.add: 1 - block.shortcut for block in gone}
        inside = {name for block in gone for name in block.layers}
        with progress("reconstruction") as shown:
            for step in (walk := Walk(repair.folded, changed, repair.samples)):
                shown.advance(step.position + 1, len(walk.nodes), step.layer.name)
                if step.layer.name in branches:
                    walk.silence(step, branches[step.layer.name])
                if step.layer.name in inside or not is_linear(step.layer) or not called_once(walk, step):
                    continue
                chosen = by_reader.get(step.layer.name)
                if chosen is None and step.untouched:
                    continue
                before, known = matrix_of(step.layer), repair.moments(step, repair.target(walk, step))
                if chosen is None:
                    repair.put(walk, step, known, before, REPAIR_RIDGE)
                    continue
                item, count = chosen
                order, _ = eliminate(known, item.rows, repair.metric(item.reader), RIDGE)
                stay[item.group.units[order[: len(order) - count]]] = False
                repair.put(walk, step, known, before, RIDGE, _left(item, order[len(order) - count :], before))
        return repair.with_norms(without_branches(changed, tuple(gone)) if gone else changed), stay


class Allocation:
    """How many units each cuttable group of ``work`` keeps under a budget.

    Args:
        work: the groups.
        whole: unit -> what share of the start the network of ``work`` still is.
        floors: what each group keeps at least, before rounding.
        multiple: each group keeps a multiple of so many units, or all.
    """

    def __init__(self, work: Reconstruction, whole: Mapping[str, float], floors: Sequence[int], multiple: int) -> None:
        self._groups = [item.group for item in work.cuttable]
        self._sizes = [len(group) for group in self._groups]
        self._channels, self._whole, self._multiple = work.channels, whole, multiple
        self.floors = [min(size, -(-f // multiple) * multiple) for f, size in zip(floors, self._sizes, strict=True)]
        self._now = Size.of(work.channels.model, self._groups)
        ranks = [np.arange(size, dtype=float) for size in self._sizes]
        self._plan = Plan(work.channels, self._groups, ranks, [1] * len(ranks), 1)
        self._even = Plan(work.channels, self._groups, ranks, self.floors, multiple)

    def stay(self, keep: Sequence[int]) -> np.ndarray:
        """Return units [count] of which each group keeps so many, whichever."""
        stay = np.ones(self._channels.count, bool)
        for group, count in zip(self._groups, keep, strict=True):
            stay[group.units[count:]] = False
        return stay

    def cost(self, keep: Sequence[int], unit: str) -> float:
        """Return the share of the start that is left."""
        return self._plan.cost(self.stay(keep), unit, self._now) * self._whole[unit]

    def keep(self, curves: Sequence[Curve] | None, unit: str, share: float) -> list[int]:
        """Return how many units each group keeps; the fewest that it may if the budget is out of reach.

        Without ``curves`` every group keeps the same share.
        """
        if self.cost(self.floors, unit) > share + 1e-9:
            return list(self.floors)
        if curves is None:
            stay = self._even.meet(Budget(unit, share / self._whole[unit]), self._now, "layer")
            return [int(stay[group.units].sum()) for group in self._groups]

        def cost(counts: Sequence[int]) -> float:
            return self.cost(counts, unit)

        keep = [
            count if count == size else max(count // self._multiple * self._multiple, floor)
            for count, size, floor in zip(
                allocate(curves, self._sizes, cost, share, self.floors), self._sizes, self.floors, strict=True
            )
        ]
        slopes = _slopes(self._sizes, cost, self.floors)
        return _spend(keep, curves, slopes, self._sizes, cost, share, self._multiple)


def allocate(
    curves: Sequence[Curve],
    sizes: Sequence[int],
    cost: Callable[[Sequence[int]], float],
    budget: float,
    least: Sequence[int],
) -> list[int]:
    """Return how many units each group keeps so that the sum of the errors is least within the budget.

    ``cost(keep)`` is the share of the whole that is left; each group's part in it is taken as linear.
    """
    slopes = _slopes(sizes, cost, least)

    def at(price: float) -> list[int]:
        return [
            int(np.argmin(curve.errors[low - 1 :] + price * slope * np.arange(low, len(curve.errors) + 1))) + low
            for curve, slope, low in zip(curves, slopes, least, strict=True)
        ]

    low, high = 1e-9, 1e9
    for _ in range(80):
        middle = float(np.sqrt(low * high))
        if cost(at(middle)) > budget:
            low = middle
        else:
            high = middle
    return _spend(at(high), curves, slopes, sizes, cost, budget, 1)


def _slopes(sizes: Sequence[int], cost: Callable[[Sequence[int]], float], least: Sequence[int]) -> list[float]:
    """Return what a unit of each group costs, all others whole."""
    whole, slopes = cost(list(sizes)), []
    for number, size in enumerate(sizes):
        fewer = list(sizes)
        fewer[number] = least[number]
        slopes.append((whole - cost(fewer)) / max(size - least[number], 1))
    return slopes


def _spend(
    keep: list[int],
    curves: Sequence[Curve],
    slopes: Sequence[float],
    sizes: Sequence[int],
    cost: Callable[[Sequence[int]], float],
    budget: float,
    multiple: int,
) -> list[int]:
    """Return ``keep`` with what is left of the budget spent, ``multiple`` units at a time, where it helps most."""
    while True:
        gains = []
        for number, (count, size) in enumerate(zip(keep, sizes, strict=True)):
            more = min(count + multiple, size)
            if more > count and slopes[number] > 0:
                errors = curves[number].errors
                gains.append(((errors[count - 1] - errors[more - 1]) / (slopes[number] * (more - count)), number, more))
        for _, number, more in sorted(gains, reverse=True):
            wider = [more if i == number else count for i, count in enumerate(keep)]
            if cost(wider) <= budget:
                keep = wider
                break
        else:
            return keep


def _curve(points: dict[int, float], size: int) -> Curve:
    counts = sorted(points)
    errors = np.minimum.accumulate([points[count] for count in counts])
    if len(counts) == 1:
        return Curve(np.zeros(size))
    return Curve(np.maximum(PchipInterpolator(counts, errors)(np.arange(1, size + 1)), 0.0))


def cuttable_groups(channels: Channels, names: frozenset[str]) -> list[Cuttable]:
    """Return the groups of a folded model that it can cut, of those that only ``names`` write."""
    found = (_cuttable(channels, group, names) for group in channels.groups)
    return [item for item in found if item is not None]


def _cuttable(channels: Channels, group: Group, names: frozenset[str]) -> Cuttable | None:
    """Return the group if elimination can choose its units: one writer, and one linear layer that reads only it."""
    if group.kept_because is not None or not set(group.writers) <= names or len(group.writers) != 1:
        return None
    if channels.pinned[group.units].any() or any(event.verb == "normalises over" for event in group.events):
        return None
    reading = [member for member in group.members if member.reads and not member.weight.within]
    if len(reading) != 1 or any(m.weight.within for m in group.members):
        return None
    (member,) = reading
    layer = channels.model.get_layer(member.weight.layer)
    ids = member.weight.axes[member.axis]
    if not is_linear(layer) or ids is None or len(member.places) != len(ids):
        return None
    times = np.bincount(member.units, minlength=len(group))
    if times.min() == 0 or times.min() != times.max() or calls(channels.model)[layer.name] != 1:
        return None
    width = len(ids)
    positions = int(np.prod(layer.kernel.shape[:-2])) if len(layer.kernel.shape) > 2 else 1
    places = member.places[np.argsort(member.units, kind="stable")].reshape(len(group), -1)
    rows = (np.arange(positions)[None, :, None] * width + places[:, None, :]).reshape(len(group), -1)
    return Cuttable(group, layer.name, rows)


def _left(item: Cuttable, kept: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return which rows of the reader's matrix [d + 1, outputs] are read when these units are kept: [d]."""
    left = np.zeros(len(matrix) - 1, bool)
    left[item.rows[kept].ravel()] = True
    return left


def _few(values: dict[int, np.ndarray], count: int) -> dict[int, np.ndarray]:
    return {key: value[:count] for key, value in values.items()}
