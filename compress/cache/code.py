"""A digest of the code that made a stage: with other code, the stage is made anew."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
from pathlib import Path

_SHARED_CODE = ("boards", "deploy", "metrics", "pipeline", "reference.py", "strategies/strategy.py")
"""What every stage's result depends on besides the strategy's own family, and all that these import."""

_COMPUTING = ("tensorflow", "tensorflow-cpu", "tf-keras", "tensorflow-model-optimization", "ai-edge-litert", "numpy")
"""Distributions that train, export and run a stage's model: those of them that are installed count."""


def code_digest(kind: type) -> str:
    """Return a digest of the code that decides what ``kind`` (a strategy or model class) does.

    That is its own family's folder, the rooms that every stage stands on, and all of this package that they import.
    """
    package = Path(__file__).parent.parent
    module = importlib.import_module(kind.__module__)
    own = Path(module.__file__ or __file__)
    # A module of its own may lie in a folder with anything beside it.
    own = own.parent if module.__package__ else own
    places = (own, *(package / name for name in _SHARED_CODE))
    waiting = [file for place in places for file in (place.rglob("*.py") if place.is_dir() else [place])]
    found: set[Path] = set()
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += _imported(file, package)
    digest = hashlib.sha256(_versions().encode())
    for file in sorted(found):
        # Not where the package lies, only where the file lies in it.
        inside = file.relative_to(package if file.is_relative_to(package) else own.parent)
        digest.update(str(inside).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


@functools.cache
def _versions() -> str:
    """Return the versions of what computes a stage besides this package."""
    found = []
    for name in _COMPUTING:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def _imported(file: Path, package: Path) -> list[Path]:
    """Return the files of this package that the file imports, anywhere in it."""
    names = _imported_names(file.read_bytes())
    parts = [name.split(".")[1:] for name in names if name.split(".")[0] == package.name]
    candidates = [
        place for part in parts for place in (package.joinpath(*part, "__init__.py"), *_module(package, part))
    ]
    return [place for place in candidates if place.is_file()]


@functools.lru_cache(maxsize=4096)
def _imported_names(source: bytes) -> frozenset[str]:
    """Return the names of the modules, and of what may be one, that a Python source imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def _module(package: Path, part: list[str]) -> list[Path]:
    return [package.joinpath(*part).with_suffix(".py")] if part else []
