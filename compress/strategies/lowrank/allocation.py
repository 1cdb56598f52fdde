"""Forms and ranks of all layers chosen together under one budget: the least sum of errors for the saving."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compress.candidate import Skipped
from compress.errors import CompressError
from compress.strategies.lowrank.units import Choice, Curve, Unit

Priced = tuple[Curve, int] | None
_HIGHEST = 1e12


def cheapest(units: Sequence[Unit]) -> list[Choice | None]:
    """Return what costs least: rank 1 nearly everywhere."""
    return [_choice(unit.at_price(_HIGHEST)) for unit in units]


def kept(units: Sequence[Unit], choices: Sequence[Priced], total: float) -> float:
    """Return the share of ``total`` that is left."""
    saved = sum(
        unit.cost - float(choice[0].cost[choice[1] - 1])
        for unit, choice in zip(units, choices, strict=True)
        if choice is not None
    )
    return 1.0 - saved / total


def allocate(
    units: Sequence[Unit], keep: float, total: float, stage: str, unit_name: str, untouched: Sequence[Skipped] = ()
) -> list[Choice | None]:
    """Choose forms and ranks together: least sum of errors for the saving (Lagrange multiplier, bisected).

    Args:
        units: the layers that may be factorized, with their curves; costs in the budget's unit.
        keep: the share of ``total`` that may remain.
        total: cost of the whole model.
        stage, unit_name, untouched: for the error; the last are the layers that may not be factorized, and why.

    Raises:
        CompressError: if even rank 1 everywhere costs more.
    """
    largest = max((float(curve.error.max()) for unit in units for curve in unit.curves if len(curve.error)), default=0)

    def choose(multiplier: float) -> list[Priced]:
        return [unit.at_price(multiplier * unit.cost / total * max(largest, 1e-30)) for unit in units]

    low, high = 1 / _HIGHEST, _HIGHEST
    if kept(units, choose(high), total) > keep:
        reasons = [f"{item.layer}: {item.reason}" for item in untouched]
        more = f" and {len(reasons) - 4} more" if len(reasons) > 4 else ""
        raise CompressError(
            f"strategy.{stage}.{unit_name}",
            expected=f"at least {kept(units, choose(high), total):.3f}, what rank 1 in every layer it may touch leaves"
            + (f" (not {'; '.join(reasons[:4])}{more})" if reasons else ""),
            received=f"{keep:g}",
            fix=f"Raise strategy.{stage}.{unit_name}, or let the stage touch more layers.",
        )
    while high / low > 1 + 1e-9:
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if kept(units, choose(middle), total) <= keep else (middle, high)
    choices = choose(high)
    _spend(units, choices, (keep - kept(units, choices, total)) * total)
    return [_choice(choice) for choice in choices]


def _choice(priced: Priced) -> Choice | None:
    return None if priced is None else (priced[0].form, priced[1])


def _spend(units: Sequence[Unit], choices: list[Priced], rest: float) -> None:
    """Raise ranks, or leave layers alone, while the rest of the budget lasts, the largest fall of the error first.

    One price for all layers can only reach points of the convex hull, and may stop well short of the budget.
    """
    while True:
        best: tuple[float, int, Priced, float] | None = None
        for index, (unit, choice) in enumerate(zip(units, choices, strict=True)):
            if choice is None:
                continue
            curve, rank = choice
            now = float(curve.cost[rank - 1])
            highest = int((curve.cost <= min(now + rest, np.nextafter(unit.cost, 0))).sum())
            options: list[tuple[float, Priced, float]] = []
            if unit.cost <= now + rest:
                options.append((float(curve.error[rank - 1]), None, unit.cost - now))
            elif highest > rank:
                fall = float(curve.error[rank - 1] - curve.error[highest - 1])
                options.append((fall, (curve, highest), float(curve.cost[highest - 1]) - now))
            for fall, other, more in options:
                if best is None or fall > best[0]:
                    best = (fall, index, other, more)
        if best is None:
            return
        choices[best[1]] = best[2]
        rest -= best[3]
