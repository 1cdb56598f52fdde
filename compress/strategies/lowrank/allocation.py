"""Ranks of all layers chosen together under one budget: the least spectral error for the saving."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from compress.errors import CompressError
from compress.strategies.lowrank.forms import FactorForm, Unit

Choice = tuple[FactorForm, int]


def allocate(
    units: list[Unit],
    cost: Callable[[Unit], float],
    keep: float,
    total: float,
    stage: str,
    unit_name: str,
) -> list[Choice | None]:
    """Choose all ranks together: least sum of relative errors for the saving (Lagrange multiplier, bisected)."""

    def weight(unit: Unit) -> float:
        return cost(unit) * unit.size / total

    def choose(multiplier: float) -> list[Choice | None]:
        return [unit.at_price(multiplier * weight(unit)) for unit in units]

    def kept(choices: list[Choice | None]) -> float:
        saved = sum(
            cost(unit) * (unit.size - float(choice[0].weights[choice[1] - 1]))
            for unit, choice in zip(units, choices, strict=True)
            if choice is not None
        )
        return 1.0 - saved / total

    low, high = 0.0, 1e9
    if kept(choose(high)) > keep:
        raise CompressError(
            f"strategy.{stage}.{unit_name}",
            expected=f"at least {kept(choose(high)):.3f}, what rank 1 in every layer it may touch leaves",
            received=f"{keep:g}",
            fix=f"Raise strategy.{stage}.{unit_name} or widen strategy.{stage}.only.",
        )
    for _ in range(100):
        middle = float(np.sqrt(max(low, 1e-9) * high))
        low, high = (low, middle) if kept(choose(middle)) <= keep else (middle, high)
        if high / max(low, 1e-9) < 1 + 1e-9:
            break
    choices = choose(high)
    _spend(units, choices, cost, (keep - kept(choices)) * total)
    return choices


def _spend(units: list[Unit], choices: list[Choice | None], cost: Callable[[Unit], float], rest: float) -> None:
    """Raise ranks in ``choices`` while the rest of the budget lasts, the largest fall of the error first.

    One price for all layers can only reach points of the convex hull, and may stop well short of the budget.
    """
    while True:
        best: tuple[float, int, int, float] | None = None
        for index, (unit, choice) in enumerate(zip(units, choices, strict=True)):
            if choice is None:
                continue
            form, rank = choice
            limit = min(unit.size, float(form.weights[rank - 1]) + rest / cost(unit))
            highest = int((form.weights < limit).sum())
            if highest > rank:
                fall = float(form.error[rank - 1] - form.error[highest - 1])
                price = cost(unit) * float(form.weights[highest - 1] - form.weights[rank - 1])
                if best is None or fall > best[0]:
                    best = (fall, index, highest, price)
        if best is None:
            return
        _, index, highest, price = best
        choices[index] = (choices[index][0], highest)  # type: ignore[index]
        rest -= price
