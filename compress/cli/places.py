"""Where ``conf/`` and ``experiments/`` lie: in the source tree, or inside the installed package."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def conf_dir() -> Path:
    """Return the folder of the Hydra configuration."""
    return _shipped("conf")


def experiments_dir() -> Path:
    """Return the folder of the experiments."""
    return _shipped("experiments")


def _shipped(name: str) -> Path:
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name
