"""The rooms: imports go down only. Imports for type checking alone are free."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

FLOORS = (
    {"run", "reproduce", "measure", "predict", "pareto", "sensitivity", "deliver"},
    {"cli"},
    {"search"},
    {"tracking"},
    {"pipeline"},
    {"networks"},
    {"cache", "reference"},
    {"strategies"},
    {"deploy"},
    {"boards"},
    {"training", "training_step", "checkpoints"},
    {"distribution"},
    {"batches"},
    {"metrics"},
    {"models"},
    {"data"},
    {"graph"},
    {"candidate"},
    {"errors", "progress", "quiet", "words", ""},
)
"""Top floor first. A room imports from its own and from lower ones."""

FILES = sorted((REPOSITORY / "compress").rglob("*.py"))


def floor_of(module: str) -> int:
    room = module.split(".")[1] if "." in module else ""
    (found,) = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    return found


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            yield str(node.module)
        elif isinstance(node, ast.Import):
            yield from (item.name for item in node.names)
        else:
            yield from imports(node)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(REPOSITORY)))
def test_imports_go_down(file: Path) -> None:
    own = ".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
    used = set(imports(ast.parse(file.read_text())))
    up = [name for name in used if name.split(".")[0] == "compress" and floor_of(name) < floor_of(own)]
    assert not up, f"{own} imports from a higher floor: {up}"
    packages = {name.split(".")[0] for name in used}
    if floor_of(own) > floor_of("compress.cli"):
        assert not packages & {"hydra"}, "only the entry points and cli know Hydra"
    if floor_of(own) > floor_of("compress.tracking"):
        assert "mlflow" not in packages
    if own.startswith("compress.boards"):
        assert not packages & {"tf_keras", "keras"}, "a board never sees Keras"
