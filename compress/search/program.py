"""The integer program of an allocation: one option for each layer, the least sum of errors within budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

_GAP = 1e-6


@dataclass(frozen=True)
class Option:
    """What may become of one unit: its error, and its costs in the units of the budgets, [budgets].

    ``counts``: its layers that take part in each interaction, [interactions].
    """

    error: float
    costs: tuple[float, ...]
    counts: tuple[int, ...] = ()


def choose(
    options: Sequence[Sequence[Option]], budgets: Sequence[float], per_pair: Sequence[float] = ()
) -> list[int] | None:
    """Return which option each unit takes: the least sum of errors whose costs add up to at most the budgets.

    None if there is no such choice. Solved exactly, as a program in one binary variable for each option; after a minute
    the best choice that was found by then is taken.

    Args:
        options: of each unit.
        budgets: one for each cost.
        per_pair: one for each count, 0 or more: what each pair of the layers that are counted adds to the errors. The
            sum over pairs, n (n - 1) / 2 of n, is convex, so that the lines through neighbouring points bound it.
    """
    sizes = [len(own) for own in options]
    every = [option for own in options for option in own]
    pairs = np.asarray(per_pair, float)
    interactions = len(pairs)
    errors = np.array([option.error for option in every])
    costs = np.array([option.costs for option in every]).reshape(len(every), -1).T
    once = np.zeros((len(options), len(every) + interactions))
    for row, (start, size) in enumerate(zip(np.cumsum([0, *sizes]), sizes, strict=False)):
        once[row, start : start + size] = 1
    constraints = [LinearConstraint(once, 1, 1)]
    # The solver's tolerances are absolute.
    scale = np.maximum(np.abs(budgets), 1e-30)
    if len(budgets):
        rows = np.pad(costs / scale[:, None], ((0, 0), (0, interactions)))
        constraints.append(LinearConstraint(rows, -np.inf, np.asarray(budgets) / scale))
    largest = max(errors.max(initial=0.0), pairs.max(initial=0.0), 1e-30)
    most = (
        sum((np.array([o.counts for o in own]).max(0) for own in options), np.zeros(interactions))
        if interactions
        else []
    )
    for place, (weight, count) in enumerate(zip(pairs / largest, most, strict=True)):
        # One continuous variable for each count: at least weight * (j n - j (j + 1) / 2) for every j.
        slopes = np.arange(1, int(count))
        rows = np.zeros((len(slopes), len(every) + interactions))
        rows[:, : len(every)] = np.outer(weight * slopes, [option.counts[place] for option in every])
        rows[:, len(every) + place] = -1
        constraints.append(LinearConstraint(rows, -np.inf, weight * slopes * (slopes + 1) / 2))
    solved = milp(
        np.concatenate([errors / largest, np.ones(interactions)]),
        integrality=np.concatenate([np.ones(len(every)), np.zeros(interactions)]),
        bounds=Bounds(0, np.concatenate([np.ones(len(every)), np.full(interactions, np.inf)])),
        constraints=constraints,
        options={"mip_rel_gap": _GAP, "time_limit": 60.0},
    )
    if solved.x is None:
        return None
    parts = np.split(solved.x[: len(every)], np.cumsum(sizes)[:-1])
    return [int(np.argmax(part)) for part in parts]
