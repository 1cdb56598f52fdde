"""The digest of a strategy's code: it changes with all that the stage computes with, and with nothing else."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from pathlib import Path

import pytest

import compress
from compress.cache import code
from compress.cache.code import code_digest
from compress.models.small import Lenet5
from compress.strategies.lowrank.factorize import LowRank
from compress.strategies.pruning.prune import Prune


@pytest.fixture
def family(tmp_path, monkeypatch) -> Path:
    """A strategy family outside the package, whose source can be changed."""
    folder = tmp_path / "planted_family"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "method.py").write_text("class Method:\n    pass\n")
    (folder / "helper.py").write_text("RATE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.startswith("planted_family")]:
        del sys.modules[name]


def test_the_digest_follows_the_source_of_the_strategys_family(family):
    kind = importlib.import_module("planted_family.method").Method
    first = code_digest(kind)
    assert code_digest(kind) == first
    (family / "helper.py").write_text("RATE = 2\n")
    second = code_digest(kind)
    (family / "method.py").write_text("class Method:\n    fast = True\n")
    third = code_digest(kind)
    (family / "notes.txt").write_text("no code")
    assert code_digest(kind) == third
    assert len({first, second, third}) == 3


def test_the_digest_follows_what_the_family_imports_of_this_package(family, monkeypatch):
    kind = importlib.import_module("planted_family.method").Method
    before = {other: code_digest(other) for other in (kind, Prune)}
    (family / "helper.py").write_text("def late():\n    from compress.strategies import repair\n    return repair\n")
    importing = code_digest(kind)
    (family / "helper.py").write_text("RATE = 1\n")
    read, repair = Path.read_bytes, Path(compress.__file__).parent / "strategies" / "repair.py"
    monkeypatch.setattr(Path, "read_bytes", lambda file: read(file) + (b"# changed" if file == repair else b""))
    assert code_digest(kind) == before[kind]
    assert code_digest(Prune) != before[Prune]
    (family / "helper.py").write_text("def late():\n    from compress.strategies import repair\n    return repair\n")
    assert code_digest(kind) != importing


def test_strategies_of_different_families_have_different_digests():
    assert len({code_digest(Prune), code_digest(LowRank), code_digest(Lenet5)}) == 3


@pytest.mark.parametrize(
    "changed",
    [
        "training.py",
        "graph/rewrite.py",
        "deploy/tflite.py",
        "metrics/interpreter_worker.py",
        "strategies/strategy.py",
        "strategies/distillation/losses/soft_targets.py",
        "boards/host_worker.py",
    ],
)
def test_the_digest_follows_every_room_that_a_stage_stands_on(changed, tmp_path, monkeypatch):
    package = Path(code.__file__).parent.parent
    shutil.copytree(package, tmp_path / "compress", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code, "__file__", str(tmp_path / "compress" / "cache" / "code.py"))
    before = code_digest(Prune)
    with (tmp_path / "compress" / changed).open("a") as file:
        file.write("\n# changed\n")
    assert code_digest(Prune) != before


@pytest.mark.parametrize(
    "changed", ["tensorflow", "tf-keras", "tensorflow-model-optimization", "ai-edge-litert", "numpy"]
)
def test_the_digest_follows_the_versions_of_what_computes(changed, monkeypatch):
    before = code_digest(Prune)
    known = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "999" if name == changed else known(name))
    code._versions.cache_clear()
    try:
        assert code_digest(Prune) != before
    finally:
        code._versions.cache_clear()


def test_a_strategy_in_a_file_of_its_own_is_digested_alone(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("class Mine: pass")
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = importlib.import_module("mine").Mine
    first = code_digest(mine)
    (tmp_path / "notes.py").write_text("anything")
    assert code_digest(mine) == first
    (tmp_path / "mine.py").write_text("class Mine: changed = True")
    assert code_digest(mine) != first
