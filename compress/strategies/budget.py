"""Ratios that carry their unit: how much of the model a strategy is asked to keep."""

from __future__ import annotations

from dataclasses import dataclass

from compress.errors import CompressError


@dataclass(frozen=True)
class Budget:
    """Keep this fraction of the unit (``macs``, ``params``, ...)."""

    unit: str
    keep: float


def one_budget(default: Budget, **choices: float | None) -> Budget:
    """Return the one budget that is set among ``choices``; ``default`` if none is.

    Raises:
        ValueError: if several are set.
    """
    given = [Budget(unit, keep) for unit, keep in choices.items() if keep is not None]
    if len(given) > 1:
        raise ValueError(f"one of {', '.join(choices)}; the others null")
    return given[0] if given else default


def share_for_part(keep: float, total: float, part: float, *, stage: str, unit: str) -> float:
    """Return what fraction of a part must be kept so that ``keep`` of the whole is.

    The rest of the whole (``total - part``) cannot be touched.

    Raises:
        CompressError: if even nothing of the part would be too much.
    """
    fixed = total - part
    share = (keep * total - fixed) / part if part else -1.0
    if share <= 0:
        raise CompressError(
            f"strategy.{stage}.{unit}",
            expected=f"more than {fixed / total:.3f}, the share of {unit} outside the layers it may touch",
            received=f"{keep:g}",
            fix=f"Raise strategy.{stage}.{unit} or widen strategy.{stage}.only.",
        )
    return min(1.0, share)
