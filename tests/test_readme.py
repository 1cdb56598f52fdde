"""What the README says stays true: its commands compose, its tables name what exists."""

from __future__ import annotations

import re
import shlex

import pytest

from compress.cli.boards import load_boards
from compress.cli.compose import compose_config
from compress.cli.places import conf_dir
from compress.reproduce import ANALYTIC, CONTINUE, names
from compress.strategies.distillation.losses import losses

from .conftest import REPOSITORY

TEXT = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
COMMANDS = [line.partition("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m compress.run")])
def test_run_commands_compose(command):
    arguments = [a for a in shlex.split(command)[3:] if a not in ("-m", "--cfg", "job")]
    swept = [argument for argument in arguments if "," in argument and not set("{[") & set(argument)]
    # Of interval(0.3,0.9) the lower end.
    first = [re.sub(r"\w+\(", "", argument.partition(",")[0]) for argument in swept]
    assert compose_config([*(a for a in arguments if a not in swept), *first]).strategy is not None


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m compress.reproduce")])
def test_reproduce_commands_name_experiments(command):
    assert set(shlex.split(command)[3:]) <= {ANALYTIC, CONTINUE, *names()}


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m compress.measure")])
def test_measure_commands_name_boards(command):
    words = shlex.split(command)[3:]
    (boards,) = re.findall(r"--boards (\S+)", command)
    settings = [word for word in words if "=" in word]
    own = {
        word.rpartition("/")[2].removesuffix(".yaml") for other in COMMANDS for word in other.split() if "yaml" in word
    }
    assert (
        load_boards([name for name in boards.split(",") if name not in own], settings) or set(boards.split(",")) <= own
    )


@pytest.mark.parametrize(
    "group",
    ["strategy", "model", "data", "recovery", "board", "tracking", "cache", "techniques", "budget", "distribution"],
)
def test_every_choice_is_named(group):
    for file in (conf_dir() / group).glob("*.yaml"):
        # The table writes resnet20/32/44/56/110.
        name = re.sub(r"^resnet(?=(32|44|56|110)$)", "/", file.stem)
        assert re.search(rf"{re.escape(name)}(?!\w)", TEXT), f"{group}={file.stem} is not in the README"


def test_every_loss_of_distillation_is_named():
    for name in {*losses()} - {"soft_targets"}:
        assert f"`{name}`" in TEXT


def test_the_two_set_up_commands_are_one_line_each():
    start, tests = BLOCKS[0].strip(), BLOCKS[-1].strip()
    assert len(start.splitlines()) == len(tests.splitlines()) == 1
    assert start.endswith("python -m compress.run")
    assert tests.endswith("-m pytest")
    assert "<!-- test-command -->" in TEXT
