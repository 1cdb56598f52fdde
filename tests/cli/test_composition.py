"""``strategy=a+b+c`` inside Hydra: order, repeats, overrides, defaults."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.cli.build import make_plan
from compress.cli.compose import compose_config
from compress.cli.config_source import stage_names
from compress.cli.places import conf_dir

NAMES = sorted(file.stem for file in (conf_dir() / "strategy").glob("*.yaml"))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6))
def test_any_order_any_length_any_repeats(chosen):
    config = compose_config([f"strategy={'+'.join(chosen)}"])
    stages = list(config.strategy)
    assert [name.rstrip("0123456789") for name in stages] == chosen
    assert len(set(stages)) == len(chosen)


def test_repeats_are_numbered():
    assert stage_names("prune+share+prune+prune") == [
        ("prune", "prune"),
        ("share", "share"),
        ("prune2", "prune"),
        ("prune3", "prune"),
    ]


def test_overrides_reach_one_stage_only():
    plan = make_plan(
        compose_config(
            [
                "strategy=prune+share+prune",
                "recovery.epochs=3",
                "strategy.prune2.sparsity=0.9",
                "strategy.prune2.recovery.epochs=0.5",
                "strategy.share.only={type: Dense}",
            ]
        )
    )
    first, share, second = plan.stages
    assert (first.strategy.sparsity, second.strategy.sparsity) == (None, 0.9)
    assert (first.recovery.epochs, share.recovery.epochs, second.recovery.epochs) == (3, 3, 0.5)
    assert share.selection.only[0].type == "Dense"
    assert first.selection.only == ()


def test_an_empty_pipeline():
    assert make_plan(compose_config(["strategy=none"])).stages == ()


def test_data_set_decides_the_recovery_epochs_unless_told():
    assert make_plan(compose_config(["strategy=prune", "data=digits"])).stages[0].recovery.epochs == 20
    assert make_plan(compose_config(["strategy=prune", "data=cifar10"])).stages[0].recovery.epochs == 1
    assert make_plan(compose_config(["strategy=prune", "recovery=none"])).stages[0].recovery.trains is False


def test_a_user_folder_adds_a_strategy(outside, tmp_path):
    (tmp_path / "more" / "strategy").mkdir(parents=True)
    (tmp_path / "more" / "strategy" / "halve.yaml").write_text("_target_: mine.Halve\nfactor: 0.5\n")
    done = outside("-m", "compress.run", "--config-dir", str(tmp_path / "more"), "strategy=prune+halve", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "_target_: mine.Halve" in done.stdout
    assert done.stdout.index("prune:") < done.stdout.index("halve:")


@pytest.mark.parametrize("name", ["config.yaml", "pipeline/stage.yaml"])
def test_stage_recovery_has_every_key_of_recovery(name):
    config = compose_config(["strategy=prune"])
    assert set(config.strategy.prune.recovery) == set(config.recovery)
    assert (conf_dir() / name).is_file()


def test_all_recoveries_have_the_same_settings_with_the_same_words():
    """They differ in the method, in what stands above it, and in that ``none`` makes no epochs."""
    texts = {file.stem: file.read_text().partition("\nmethod: ") for file in (conf_dir() / "recovery").glob("*.yaml")}
    assert set(texts) == {"none", "finetune", "distill", "auto"}
    rest = {name: text.splitlines() for name, (_, _, text) in texts.items()}
    assert {name: lines[0] for name, lines in rest.items()} == {name: name for name in texts}
    assert {lines[1].partition("#")[2] for lines in rest.values()} == {rest["none"][1].partition("#")[2]}
    assert all(lines[2:] == rest["none"][2:] for lines in rest.values())
