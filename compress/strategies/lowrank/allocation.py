"""Ranks of all layers chosen together under one budget: the least spectral error for the saving."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compress.errors import CompressError
from compress.strategies.lowrank.forms import FactorForm, Unit

Choice = tuple[FactorForm, int]


def allocate(units: Sequence[Unit], keep: float, total: float, stage: str, unit_name: str) -> list[Choice | None]:
    """Choose all ranks together: least sum of relative errors for the saving (Lagrange multiplier, bisected).

    Args:
        units: the layers that may be factorized, their costs in the budget's unit.
        keep: the share of ``total`` that may remain.
        total: cost of the whole model.
        stage, unit_name: for the error.

    Raises:
        CompressError: if even rank 1 everywhere costs more.
    """

    def choose(multiplier: float) -> list[Choice | None]:
        return [unit.at_price(multiplier * unit.cost / total) for unit in units]

    def kept(choices: Sequence[Choice | None]) -> float:
        saved = sum(
            unit.cost - float(choice[0].cost[choice[1] - 1])
            for unit, choice in zip(units, choices, strict=True)
            if choice is not None
        )
        return 1.0 - saved / total

    low, high = 1e-9, 1e9
    if kept(choose(high)) > keep:
        raise CompressError(
            f"strategy.{stage}.{unit_name}",
            expected=f"at least {kept(choose(high)):.3f}, what rank 1 in every layer it may touch leaves",
            received=f"{keep:g}",
            fix=f"Raise strategy.{stage}.{unit_name} or widen strategy.{stage}.only.",
        )
    while high / low > 1 + 1e-9:
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if kept(choose(middle)) <= keep else (middle, high)
    choices = choose(high)
    _spend(units, choices, (keep - kept(choices)) * total)
    return choices


def _spend(units: Sequence[Unit], choices: list[Choice | None], rest: float) -> None:
    """Raise ranks in ``choices`` while the rest of the budget lasts, the largest fall of the error first.

    One price for all layers can only reach points of the convex hull, and may stop well short of the budget.
    """
    while True:
        best: tuple[float, int, Choice, float] | None = None
        for index, (unit, choice) in enumerate(zip(units, choices, strict=True)):
            if choice is None:
                continue
            form, rank = choice
            now = float(form.cost[rank - 1])
            highest = int((form.cost <= min(now + rest, np.nextafter(unit.cost, 0))).sum())
            if highest > rank:
                fall = float(form.error[rank - 1] - form.error[highest - 1])
                if best is None or fall > best[0]:
                    best = (fall, index, (form, highest), float(form.cost[highest - 1]) - now)
        if best is None:
            return
        choices[best[1]] = best[2]
        rest -= best[3]
