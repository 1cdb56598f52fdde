"""Mistakes in a user's own file: where they are and what they are, in one paragraph."""

from __future__ import annotations

import sys

import pytest

from compress.cli.construct import construct, find_class
from compress.errors import CompressError
from compress.strategies.strategy import Strategy

WHOLE = """
import dataclasses
from compress.strategies.strategy import Strategy

@dataclasses.dataclass(frozen=True)
class Mine(Strategy):
    amount: float

    def __post_init__(self):
        if self.amount > 1:
            raise ValueError("an amount of at most 1")

    def apply(self, candidate, context):
        return candidate

@dataclasses.dataclass(frozen=True)
class Unfinished(Strategy):
    amount: float = 0.5

class Plain:
    pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write a module of the user's own and return its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str, name: str = "own_strategies") -> str:
        (tmp_path / f"{name}.py").write_text(source)
        sys.modules.pop(name, None)
        return name

    yield write
    for name in ("own_strategies", "own_helper"):
        sys.modules.pop(name, None)


def refused(target: str, **fields) -> str:
    with pytest.raises(CompressError) as caught:
        construct(Strategy, {"_target_": target, **fields}, "strategy.mine")
    assert caught.value.where.startswith("strategy.mine")
    return str(caught.value)


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("import dataclasses\nclass Mine(:\n    pass\n", ["own_strategies.py, line 2", "SyntaxError: "]),
        (
            "import dataclasses\nimport nosuchmodule\n",
            ["line 2", "ModuleNotFoundError: No module named 'nosuchmodule'"],
        ),
        ("from dataclasses import nosuch\n", ["line 1", "ImportError: cannot import name 'nosuch'"]),
        ("\n\nvalue = 1 / 0\n", ["own_strategies.py, line 3", "ZeroDivisionError: division by zero"]),
        ("import numpy\n\nnumpy.zeros(-1)\n", ["own_strategies.py, line 3", "ValueError: negative dimensions"]),
        ("raise SystemExit('usage: ...')\n", ["own_strategies.py, line 1", "SystemExit: usage"]),
    ],
    ids=["syntax", "module", "name", "exception", "in a library", "exit"],
)
def test_a_file_that_cannot_be_imported(own, source, parts):
    said = refused(f"{own(source)}.Mine")
    assert all(part in said for part in parts), said


def test_a_mistake_in_a_file_that_it_imports(own):
    own("\nvalue = nosuch\n", "own_helper")
    said = refused(f"{own('import own_helper')}.Mine")
    assert "own_helper.py, line 2" in said
    assert "NameError: name 'nosuch' is not defined" in said


def test_a_module_that_is_not_there():
    assert "PYTHONPATH" in refused("nosuchmodule.Mine")


def test_a_class_that_the_module_does_not_have(own):
    said = refused(f"{own(WHOLE)}.Mien")
    assert "own_strategies.py" in said
    assert "nearest to it: Mine." in said


def test_a_class_that_is_no_strategy(own):
    assert "a dataclass that is a compress.strategies.strategy.Strategy" in refused(f"{own(WHOLE)}.Plain")


def test_a_strategy_without_the_decorator_is_told_of_it(own):
    source = (
        "from compress.strategies.strategy import Strategy\nclass Bare(Strategy):\n    def apply(self, c, x): ...\n"
    )
    with pytest.raises(CompressError, match="@dataclass"):
        find_class(Strategy, f"{own(source)}.Bare", "strategy.mine")


def test_an_annotation_that_means_nothing(own):
    source = """
from pydantic.dataclasses import dataclass
from compress.strategies.strategy import Strategy

@dataclass(frozen=True)
class Mine(Strategy):
    amount: "Nothere" = 0.5

    def apply(self, candidate, context):
        return candidate
"""
    with pytest.raises(CompressError, match="Nothere"):
        construct(Strategy, {"_target_": f"{own(source)}.Mine", "amount": 1}, "strategy.mine")


def test_a_class_without_apply(own):
    said = refused(f"{own(WHOLE)}.Unfinished")
    assert "apply" in said
    assert "own_strategies.Unfinished" in said


@pytest.mark.parametrize(
    ("fields", "part"),
    [({}, "missing 1 required positional argument: 'amount'"), ({"amount": 2}, "an amount of at most 1")],
)
def test_fields_that_its_constructor_refuses(own, fields, part):
    assert part in refused(f"{own(WHOLE)}.Mine", **fields)


def test_a_right_one(own):
    kind = find_class(Strategy, f"{own(WHOLE)}.Mine", "strategy.mine")
    assert construct(Strategy, {"_target_": "own_strategies.Mine", "amount": 0.5}, "strategy.mine") == kind(amount=0.5)


def test_the_command_says_it_without_a_traceback(cli, own, tmp_path):
    name = own("import dataclasses\n\nvalue = 1 / 0\n")
    (tmp_path / "conf" / "strategy").mkdir(parents=True)
    (tmp_path / "conf" / "strategy" / "mine.yaml").write_text(f"_target_: {name}.Mine\n")
    code, _, error = cli("--config-dir", str(tmp_path / "conf"), "strategy=mine")
    assert code == 2, error
    assert "Traceback" not in error
    assert "ZeroDivisionError: division by zero" in " ".join(error.split())


def test_a_yaml_file_with_a_mistake_is_named_with_its_line(cli, tmp_path):
    (tmp_path / "mine" / "strategy").mkdir(parents=True)
    (tmp_path / "mine" / "strategy" / "wrong.yaml").write_text("_target_: mine.Mine\namount: [0.5\n")
    code, _, error = cli("--config-dir", str(tmp_path / "mine"), "strategy=wrong")
    assert code == 2
    assert "wrong.yaml, line 3" in " ".join(error.split())
    assert "Traceback" not in error


def test_a_student_that_builds_on_another_file_is_refused_by_name(cli, tmp_path):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "heir.yaml").write_text("defaults: [mlp_800, _self_]\ndropout: 0.1\n")
    code, _, error = cli(
        "--config-dir", str(tmp_path / "mine"), "strategy=distill", "strategy.distill.student=heir", "board=roofline"
    )
    assert code == 2
    assert "heir.yaml: expected a file that holds all values" in " ".join(error.split())
