"""Tables of sizes that are counted: the quick ones against the published numbers, and what such a grid may hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from compress.cli.counted import Counted
from compress.cli.experiment import Column, Experiment, Grid, PublishedTable, load_experiment, run_experiment
from compress.cli.places import experiments_dir
from compress.errors import CompressError
from compress.reproduce import ANALYTIC, main, names

COUNTED = (
    *("google_mbv1_16", "keras_docs_table", "separable_ops", "vgg_memory"),
    *(f"mbv1_t{number}" for number in range(2, 11)),
    *(f"shufflenet_t{number}" for number in (1, 2, 4, 5, 6)),
)
NOTHING = ["data=noise", "data.samples=2", "strategy=none", "model=one_layer"]


@pytest.fixture(scope="module")
def counted() -> Counted:
    return Counted()


def page_of(name: str, counted: Counted, folder: Path) -> str:
    return run_experiment(load_experiment(experiments_dir() / name, name), [], folder, counted).read_text()


def misses(page: str) -> list[str]:
    found = re.findall(r"Outside the tolerance: (.*)\.\n", page)
    return found[0].split("; ") if found else []


def test_all_counted_tables_are_one_command():
    grids = {name: load_experiment(experiments_dir() / name, name).grid for name in names()}
    assert sorted(name for name, grid in grids.items() if grid.count) == sorted(COUNTED)


def test_where_the_weights_of_mobilenet_are(counted, tmp_path):
    page = page_of("mbv1_t2", counted, tmp_path)
    # The paper's digits are swapped: its column sums to 99.29 %.
    assert misses(page) == ["Conv 3x3, multiply-adds %: 1.906 against 1.19"]
    assert page.count("| yes |") == 7


def test_one_block_of_mobilenet(counted, tmp_path):
    page = page_of("mbv1_t3", counted, tmp_path)
    assert misses(page) == []
    assert page.count("yes") == 8
    assert "| Convolution | 462 | 462.42 | yes | 2.36 | 2.359 | yes |" in page


def test_separable_convolutions_by_hand(counted, tmp_path):
    page = page_of("separable_ops", counted, tmp_path)
    assert misses(page) == [
        "VGG-16, first Dense layer, multiply-adds: 102,760,448 against 4.1E+08",
        "VGG-16, first Dense layer, weights: 102,760,448 against 4,096,000",
    ]
    assert page.count("yes") == 16


def test_memory_of_vgg(counted, tmp_path):
    page = page_of("vgg_memory", counted, tmp_path)
    assert misses(page) == [
        "TOTAL, values: 15,237,608 against 24E+06",
        "TOTAL, MB of float32: 60.95 against 93",
    ]
    assert page.count("yes") == 22 * 2 + 1


@pytest.mark.slow
def test_channels_and_complexity_of_shufflenet(counted, tmp_path):
    page = page_of("shufflenet_t1", counted, tmp_path)
    assert page.count("yes") == 5 * 4 + 2
    assert [miss.split(",")[0] for miss in misses(page)] == ["g = 2", "g = 4", "g = 8"]


def test_a_table_is_made_by_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["mbv1_t5", "model.resolution=32"])
    assert stopped.value.code == 0
    page = (tmp_path / "results" / "mbv1_t5.md").read_text()
    # At 32 pixels: the 49 times smaller maps of all but the last layer.
    assert "| 0.75 MobileNet | 68.4 | 325 | 7.393 | **no** |" in page
    assert "command: `python -m compress.reproduce mbv1_t5 model.resolution=32`" in page
    assert not (tmp_path / "outputs").exists()


def test_stages_are_not_counted():
    with pytest.raises(CompressError, match=r"strategy: expected none.*received prune"):
        Counted().report([*NOTHING[:2], "strategy=prune", "model=one_layer"])


def test_the_word_for_all_tables_is_in_the_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["analytical"])
    assert stopped.value.code == 2
    assert f"it: {ANALYTIC}." in capsys.readouterr().err


def test_a_pattern_sums_over_the_layers_that_match(tmp_path):
    columns = [
        Column("both", "layers.final.{layer}.macs", scale=1e-3),
        Column("share", "layers.final.{layer}.params", share_of="layers.final.*.params", scale=0.01),
    ]
    run = [*NOTHING, "data.shape=[8,8,6]", "data.classes=4", "model.filters=4", "model.kind=separable"]
    grid = Grid({"a": run, "b": run}, columns, [], [0], {"a": "pointwise", "b": "point*|depth?ise|image"}, count=True)
    table = PublishedTable("title", "source", ["row"], [["a"], ["b"]])
    page = run_experiment(Experiment("mine", table, grid), [], tmp_path).read_text()
    # 6 * 4 weights, and 3 * 3 * 6, for each of 64 pixels.
    assert "| a | 1.536 | 0.308 |" in page
    assert "| b | 4.992 | 1 |" in page


def test_layers_without_a_run_of_their_own_are_refused():
    with pytest.raises(ValueError, match="one run, or one for each layer"):
        Grid({"a": [], "b": []}, [], [], [0], {"c": "conv"})


def test_a_page_whose_rows_are_the_same_stays_as_it_is(counted, tmp_path):
    page = page_of("mbv1_t3", counted, tmp_path)
    (file,) = tmp_path.glob("*.md")
    earlier = re.sub(r"- (commit|machine|date|versions): .*", r"- \1: another", page)
    file.write_text(earlier)
    assert page_of("mbv1_t3", counted, tmp_path) == earlier
    for changed in (earlier.replace("462.42", "462.43"), earlier.replace("- seeds: 0", "- seeds: 1")):
        assert changed != earlier
        file.write_text(changed)
        assert page_of("mbv1_t3", counted, tmp_path) == page
