"""What the README and docs/ say stays true: their commands compose, their tables and links name what exists."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from compress.cli.boards import load_boards
from compress.cli.compose import compose_config
from compress.cli.places import conf_dir
from compress.reproduce import ANALYTIC, CONTINUE, names
from compress.strategies.distillation.losses import losses

from .conftest import REPOSITORY

README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
_BLOCK = re.compile(r"^ *```bash\n(.*?)```", re.S | re.M)
COMMANDS = [line.partition("  #")[0].strip() for block in _BLOCK.findall(TEXT) for line in block.splitlines()]
OWN_STRATEGY = "--config-dir my_conf"
"""In the command that needs the files of the chapter about a strategy of one's own."""
PROSE = re.sub(r"```.*?```", "", TEXT, flags=re.S)
SPANS = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", PROSE)]


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.startswith("python -m compress.run") and OWN_STRATEGY not in c]
)
def test_run_commands_compose(command):
    arguments = [a for a in shlex.split(command)[3:] if a not in ("-m", "--cfg", "job")]
    swept = [argument for argument in arguments if "," in argument and not set("{[") & set(argument)]
    # Of interval(0.3,0.9) the lower end.
    first = [re.sub(r"\w+\(", "", argument.partition(",")[0]) for argument in swept]
    assert compose_config([*(a for a in arguments if a not in swept), *first]).strategy is not None


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m compress.reproduce")])
def test_reproduce_commands_name_experiments(command):
    words = shlex.split(command)[3:]
    overrides = [word for word in words if "=" in word]
    assert {*words} - {*overrides} <= {ANALYTIC, CONTINUE, *names()}
    assert not overrides or compose_config(overrides)


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
        assert re.search(rf"{re.escape(name)}(?!\w)", README.read_text()), f"{group}={file.stem} is not in the README"


def test_every_loss_of_distillation_is_named():
    for name in {*losses()} - {"soft_targets"}:
        assert f"`{name}`" in TEXT


def test_the_two_set_up_commands_are_one_line_each():
    blocks = _BLOCK.findall(README.read_text())
    start, tests = blocks[0].strip(), blocks[-1].strip()
    assert len(start.splitlines()) == len(tests.splitlines()) == 1
    assert start.endswith("python -m compress.run")
    assert tests.endswith("-m pytest")
    assert "<!-- test-command -->" in README.read_text()


def test_files_that_are_named_are_there():
    named = re.findall(r"(?:results|docs|conf)/[\w./-]*\w\.(?:md|jsonl|yaml|png)", TEXT.replace("my_conf/", ""))
    missing = {name for name in named if not (REPOSITORY / name).is_file()}
    # The example of a strategy of one's own.
    assert missing <= {"conf/strategy/mine.yaml"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    titles = {file: re.findall(r"^#+ (.*)", file.read_text(), re.M) for file in PAGES}
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), link
        if anchor:
            assert anchor in [title.lower().replace(" ", "-") for title in titles[target]], link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_have_a_header_and_as_many_columns_in_every_row(page):
    blocks = re.findall(r"(?:^\|.*\n)+", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    for block in blocks:
        rows = [line.replace(r"\|", "").count("|") for line in block.splitlines()]
        assert re.fullmatch(r"\|(-+\|)+", block.splitlines()[1]), block
        assert len({*rows}) == 1, block


def test_every_strategy_has_its_place_on_the_page_of_strategies():
    text = (REPOSITORY / "docs" / "strategies.md").read_text()
    assert not [file.stem for file in (conf_dir() / "strategy").glob("*.yaml") if f"`{file.stem}`" not in text]


def test_every_page_is_linked_from_the_readme():
    linked = re.findall(r"\]\((docs/[^)]+\.md)\)", README.read_text())
    assert {*linked} == {f"docs/{page.name}" for page in PAGES if page is not README}


@pytest.mark.parametrize("span", [s for s in SPANS if re.match(r"[~+']*(strategy|recovery|techniques)\.[\w.]+=", s)])
def test_overrides_in_the_text_can_be_copied(span):
    overrides = shlex.split(span)
    stages = dict.fromkeys(re.findall(r"strategy\.([a-z_]+)\.", span)) or ["prune"]
    # Of a sweep the first value.
    single = [re.sub(r"=(\w+),[\w,]+$", r"=\1", override) for override in overrides]
    assert compose_config([f"strategy={'+'.join(stages)}", *single]).strategy is not None


def test_no_override_in_the_text_is_cut_short():
    assert not [span for span in SPANS if re.search(r"(^|[ '])\.\w+=", span)]


def test_the_strategy_of_ones_own_runs_as_printed(outside, tmp_path, session_cache):
    blocks = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", TEXT, re.S)
    assert [name for name, _ in blocks] == ["mine.py", "my_conf/strategy/mine.yaml"]
    for name, content in blocks:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    (command,) = [c for c in COMMANDS if OWN_STRATEGY in c]
    quick = ["recovery.epochs=1", "data.train_limit=256", "data.test_limit=64", "model.train.epochs=1", "tracking=none"]
    done = outside(*shlex.split(command)[1:], *quick, f"cache.dir={session_cache}", "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr
    mine = json.loads((tmp_path / "out" / "report.json").read_text())["stages"][-1]
    assert mine["name"] == "mine"
    (zeros,) = [text for text in mine["guarantees"] if text.endswith("are zero")]
    assert float(re.findall(r"[\d.]+(?=%)", zeros)[0]) == pytest.approx(60, abs=0.5)
