"""The stage cache: what is stored comes back, what is damaged or forged does not, and nothing in it runs."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tf_keras

import compress
from compress.cache import code, store
from compress.cache.__main__ import main as cache_command
from compress.cache.code import code_digest
from compress.cache.store import Entry, StageCache
from compress.cache.trainings import Trainings
from compress.candidate import Calibration, Candidate, Storage
from compress.models.small import Lenet5
from compress.strategies.compact.separable_form import SeparableForm
from compress.strategies.lowrank.factorize import LowRank
from compress.strategies.lowrank.rank import Rank
from compress.strategies.pruning.prune import Prune
from compress.strategies.pruning.zeros import Zeros
from compress.strategies.quantization.stored import Stored
from compress.strategies.sharing.codebook import Codebook

layers = tf_keras.layers
KEY = "0123456789abcdef"
FILES = ("guarantees.npz", "manifest.json", "model.cmp", "model.keras", "model.tflite", "record.json")
X = np.random.default_rng(0).normal(size=(2, 6, 6, 2)).astype(np.float32)


def network() -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((6, 6, 2), name="image")
    x = layers.DepthwiseConv2D(3, name="conv_depthwise")(image)
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(4, 1, name="conv")(x)))
    return tf_keras.Model(image, layers.Dense(3, name="dense")(layers.Flatten()(x)))


@pytest.fixture
def entry() -> Entry:
    mask = np.arange(8).reshape(1, 1, 2, 4) % 3 > 0
    guarantees = (
        Zeros("prune", {"conv/kernel": mask, "dense/kernel": np.ones((64, 3), bool)}),
        Codebook("share", 300, {"dense/kernel": np.arange(192, dtype=np.uint16).reshape(64, 3)}),
        Rank("lowrank", {"dense": 5}),
        SeparableForm("compact", {"conv": "conv_depthwise"}),
        Stored("quantize", "int8"),
    )
    candidate = Candidate(
        network(),
        guarantees,
        Storage("int8", Calibration(images=17, ranges="mse"), ("conv",)),
        lineage=("prune", "share"),
        released=("lowrank: gone",),
    )
    return Entry(
        candidate, {"name": "share", "skipped": [{"layer": "conv", "reason": "too small"}]}, b"\0TFLite\xff", b"\x93CMP"
    )


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("compress"), "warning", lambda text, *values: said.append(text % values))
    return said


def test_an_entry_comes_back_whole(entry, tmp_path):
    cache = StageCache(tmp_path / "deep" / "cache")
    cache.store(KEY, entry)
    found = cache.load(KEY)
    before, after = entry.candidate, found.candidate
    assert (found.tflite, found.packed) == (entry.tflite, entry.packed)
    assert found.result == entry.result
    assert (after.storage, after.lineage, after.released) == (before.storage, before.lineage, before.released)
    assert [(item.layer, item.reason) for item in after.skipped] == [("conv", "too small")]
    assert after.model.get_config() == before.model.get_config()
    np.testing.assert_array_equal(after.model(X), before.model(X))
    assert [type(g) for g in after.guarantees] == [type(g) for g in before.guarantees]
    for one, two in zip(before.guarantees, after.guarantees, strict=True):
        assert one.stage == two.stage
        assert one.describe() == two.describe()
        assert one.layers == two.layers
    for field, index in (("masks", 0), ("labels", 1)):
        one, two = getattr(before.guarantees[index], field), getattr(after.guarantees[index], field)
        assert one.keys() == two.keys()
        for name in one:
            assert one[name].dtype == two[name].dtype
            np.testing.assert_array_equal(one[name], two[name])
    assert after.guarantees[1].clusters == 300
    assert after.guarantees[2].ranks == {"dense": 5}


def test_what_was_never_stored_is_not_there(entry, tmp_path):
    cache = StageCache(tmp_path)
    assert cache.load(KEY) is None
    cache.store(KEY, entry)
    assert cache.load(KEY[::-1]) is None


def test_without_a_folder_nothing_is_kept(entry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    StageCache(None).store(KEY, entry)
    assert StageCache(None).load(KEY) is None
    assert not list(tmp_path.iterdir())


def test_a_measurement_is_made_once(tmp_path, warnings):
    made = []

    def measure() -> dict:
        made.append(1)
        return {"conv": {"4": 0.1}}

    cache = StageCache(tmp_path)
    assert cache.remembered(KEY, measure) == cache.remembered(KEY, measure) == {"conv": {"4": 0.1}}
    assert len(made) == 1
    cache.remembered(KEY[::-1], measure)
    assert len(made) == 2
    (file,) = tmp_path.rglob(f"{KEY}.json")
    whole = file.read_text()
    # Cut short; another number in a file that can be read; another file altogether.
    for number, damaged in enumerate(
        (whole[:-1], whole.replace("0.1", "0.2"), "[1]", '{"conv": {"4": 0.1}}', '{"value": 8, "digest": ""}'), start=1
    ):
        file.write_text(damaged)
        assert cache.remembered(KEY, measure) == {"conv": {"4": 0.1}}
        assert len(made) == 2 + number
        assert len(warnings) == number
    StageCache(None).remembered(KEY, measure)
    assert len(made) == 8


ARRAYS = {"": np.arange(6, dtype=np.float32).reshape(2, 3), "flat": np.ones((2, 1), np.float32)}


def arrays_of(cache: StageCache, key: str = KEY) -> tuple[dict[str, np.ndarray], bool]:
    """Return arrays, and whether they had to be made."""
    made = []
    found = cache.arrays(key, "outputs of a teacher", lambda: made.append(1) or ARRAYS)
    return found, bool(made)


def test_arrays_are_made_once(tmp_path):
    cache = StageCache(tmp_path / "deep" / "cache")
    for made in (True, False):
        found, was_made = arrays_of(cache)
        assert was_made == made
        assert found.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
    assert arrays_of(cache, KEY[::-1])[1]
    assert arrays_of(StageCache(None))[1]
    assert arrays_of(StageCache(None))[1]


@pytest.mark.parametrize("name", ["arrays.npz", "manifest.json", "record.json"])
@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
def test_damaged_arrays_are_noticed_and_made_anew(name, place, tmp_path, warnings):
    cache = StageCache(tmp_path)
    arrays_of(cache)
    assert sorted(file.name for file in (tmp_path / KEY).iterdir()) == ["arrays.npz", "manifest.json", "record.json"]
    file = tmp_path / KEY / name
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 0x41
    file.write_bytes(content)
    assert arrays_of(cache)[1]
    assert len(warnings) == 1
    assert not arrays_of(cache)[1]


def test_arrays_are_listed_and_make_room(tmp_path, capsys):
    size = sum(array.nbytes for array in ARRAYS.values())
    arrays_of(StageCache(tmp_path))
    with pytest.raises(SystemExit):
        cache_command(["--dir", str(tmp_path)])
    assert "outputs of a teacher" in capsys.readouterr().out
    arrays_of(StageCache(tmp_path, most_bytes=size), KEY[::-1])
    assert not (tmp_path / KEY).exists()
    assert (tmp_path / KEY[::-1]).is_dir()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
def test_one_changed_byte_is_noticed_and_the_entry_removed(name, place, entry, tmp_path, warnings):
    cache = StageCache(tmp_path)
    cache.store(KEY, entry)
    assert sorted(file.name for file in (tmp_path / KEY).iterdir()) == sorted(FILES)
    file = tmp_path / KEY / name
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 0x41
    file.write_bytes(content)
    assert cache.load(KEY) is None
    assert len(warnings) == 1
    assert KEY[:12] in warnings[0]
    assert not (tmp_path / KEY).exists()
    cache.store(KEY, entry)
    assert cache.load(KEY) is not None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "empty", "cut"])
def test_a_file_that_is_not_whole_is_noticed(name, how, entry, tmp_path, warnings):
    cache = StageCache(tmp_path)
    cache.store(KEY, entry)
    file = tmp_path / KEY / name
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(b"" if how == "empty" else file.read_bytes()[:-1])
    assert cache.load(KEY) is None
    assert len(warnings) == 1
    assert not (tmp_path / KEY).exists()


def test_an_entry_of_another_format_is_made_anew(entry, tmp_path, warnings):
    cache = StageCache(tmp_path)
    cache.store(KEY, entry)
    manifest = tmp_path / KEY / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 999}))
    assert cache.load(KEY) is None
    assert "999" in warnings[0]


def test_a_full_disk_leaves_nothing_and_is_a_warning(entry, tmp_path, monkeypatch, warnings):
    def fail(handle: int) -> None:
        assert not (tmp_path / KEY).exists(), "not visible before it is whole"
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(store.os, "fsync", fail)
    StageCache(tmp_path).store(KEY, entry)
    assert not list(tmp_path.iterdir())
    (said,) = warnings
    assert "no space" in said
    assert StageCache(tmp_path).load(KEY) is None


def test_what_was_made_is_not_lost_because_the_disk_is_full(tmp_path, monkeypatch, warnings):
    def fail(*arguments, **named) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    cache = StageCache(tmp_path)
    with cache.alone("a"), cache.alone("b"):
        pass
    monkeypatch.setattr(Path, "replace", fail)
    assert cache.remembered("a", lambda: [1]) == [1]
    assert cache.arrays("b", "numbers", lambda: {"x": np.ones(2)})["x"].tolist() == [1, 1]
    Trainings(tmp_path, "c").next().save("who", {"step": np.array(1)})
    assert len(warnings) == 3
    assert all("no space" in said for said in warnings)
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"]


def test_an_entry_is_written_to_disk_before_it_is_visible(entry, tmp_path, monkeypatch):
    seen = []
    synced = store.os.fsync

    def watch(handle: int) -> None:
        seen.append((tmp_path / KEY).exists())
        synced(handle)

    monkeypatch.setattr(store.os, "fsync", watch)
    StageCache(tmp_path).store(KEY, entry)
    assert seen == [False] * len(FILES)


def other(entry: Entry) -> Entry:
    return Entry(entry.candidate, {**entry.result, "name": "another"}, b"another", b"packed")


def test_an_entry_that_is_there_already_is_left_as_it_is(entry, tmp_path):
    cache = StageCache(tmp_path)
    cache.store(KEY, entry)
    cache.store(KEY, other(entry))
    assert cache.load(KEY).tflite == entry.tflite
    assert [item.name for item in tmp_path.iterdir()] == [KEY]


def test_an_entry_that_appears_at_the_last_moment_is_left_as_it_is(entry, tmp_path, monkeypatch):
    cache = StageCache(tmp_path)
    rename = Path.replace

    def overtaken(partial: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", rename)
        cache.store(KEY, other(entry))
        return rename(partial, target)

    monkeypatch.setattr(Path, "replace", overtaken)
    cache.store(KEY, entry)
    assert cache.load(KEY).tflite == b"another"


def forge(folder: Path, change) -> None:
    """Change the record of an entry and give it a manifest that agrees."""
    record = json.loads((folder / "record.json").read_text())
    change(record)
    (folder / "record.json").write_text(json.dumps(record))
    sums = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir() if f.name != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps({"format": 2, "sha256": sums}))


@pytest.mark.parametrize(
    ("path", "name", "fields"),
    [
        ("os", "system", {"command": "touch {0}"}),
        ("subprocess", "Popen", {"args": ["touch", "{0}"]}),
        ("builtins", "open", {"file": "{0}", "mode": "w"}),
        ("compress.candidate", "Candidate", {"model": None}),
        ("compress.candidate", "Guarantee", {"stage": "prune"}),
        ("compress.cache.store", "shutil.rmtree", {"path": "{0}"}),
    ],
)
def test_a_forged_guarantee_is_not_called(path, name, fields, entry, tmp_path, warnings):
    cache, target = StageCache(tmp_path / "cache"), tmp_path / "touched"
    cache.store(KEY, entry)
    filled = json.loads(json.dumps(fields).replace("{0}", str(target)))

    def change(record):
        record["guarantees"] = [
            {"index": 0, "module": path, "name": name, "fields": {k: {"value": v} for k, v in filled.items()}}
        ]

    forge(tmp_path / "cache" / KEY, change)
    assert cache.load(KEY) is None
    assert not target.exists()
    assert len(warnings) == 1


def test_a_forged_guarantee_chooses_no_module_to_import(entry, tmp_path, monkeypatch, warnings):
    (tmp_path / "planted.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    cache = StageCache(tmp_path / "cache")
    cache.store(KEY, entry)
    forge(tmp_path / "cache" / KEY, lambda record: record["guarantees"][0].update(module="planted"))
    assert cache.load(KEY) is None
    assert "planted" not in sys.modules
    assert len(warnings) == 1


def test_the_forger_of_these_tests_makes_entries_that_load(entry, tmp_path):
    cache = StageCache(tmp_path)
    cache.store(KEY, entry)
    forge(tmp_path / KEY, lambda record: record["guarantees"][0].update(index=0))
    assert cache.load(KEY) is not None


def test_code_in_a_stored_model_does_not_run(entry, tmp_path, warnings):
    target = tmp_path / "touched"
    image = tf_keras.Input((2,))
    code = layers.Lambda(eval(f"lambda x: (open({str(target)!r}, 'w'), x)[1]"))
    model = tf_keras.Model(image, code(image))
    target.unlink()
    cache = StageCache(tmp_path / "cache")
    cache.store(KEY, entry)
    model.save(tmp_path / "cache" / KEY / "model.keras")
    forge(tmp_path / "cache" / KEY, lambda record: None)
    target.unlink(missing_ok=True)
    assert cache.load(KEY) is None
    assert not target.exists()
    assert len(warnings) == 1


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


def test_a_model_with_code_is_not_kept(tmp_path, caplog):
    image = tf_keras.Input((4,))
    model = tf_keras.Model(image, tf_keras.layers.Lambda(lambda t: t * 2)(image))
    StageCache(tmp_path / "cache").store(KEY, Entry(Candidate(model), {"skipped": []}, b"", b""))
    assert not (tmp_path / "cache").exists()


def test_a_strategy_in_a_file_of_its_own_is_digested_alone(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("class Mine: pass")
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = importlib.import_module("mine").Mine
    first = code_digest(mine)
    (tmp_path / "notes.py").write_text("anything")
    assert code_digest(mine) == first
    (tmp_path / "mine.py").write_text("class Mine: changed = True")
    assert code_digest(mine) != first


def aged(cache: StageCache, entry: Entry, ages: dict[str, float]) -> None:
    """Store entries that were used so many seconds ago."""
    for key, age in ages.items():
        cache.store(key, entry)
        used = time.time() - age
        os.utime(cache.folder / key / "manifest.json", (used, used))


def kept(folder: Path) -> set[str]:
    return {item.name for item in folder.iterdir() if not item.name.startswith(".")}


def test_what_was_not_used_for_longest_makes_room(entry, tmp_path):
    aged(StageCache(tmp_path), entry, {"old": 300, "older": 500, "read again": 400})
    assert StageCache(tmp_path).load("read again") is not None
    size = sum(file.stat().st_size for file in (tmp_path / "old").iterdir())
    StageCache(tmp_path, most_bytes=2.5 * size).store("new", entry)
    assert kept(tmp_path) == {"new", "read again"}
    StageCache(tmp_path, most_bytes=1).store("newest", entry)
    assert kept(tmp_path) == {"newest"}


def test_what_was_never_finished_is_removed_after_a_day(entry, tmp_path):
    for name, age in {"abandoned": 100_000, "being written": 100}.items():
        (tmp_path / f".partial-{name}").mkdir()
        os.utime(tmp_path / f".partial-{name}", (time.time() - age,) * 2)
    StageCache(tmp_path).store(KEY, entry)
    assert sorted(item.name for item in tmp_path.iterdir()) == [".partial-being written", KEY]


def test_two_that_want_the_same_take_turns(tmp_path):
    cache, inside, most = StageCache(tmp_path), [], []

    def work(number: int) -> None:
        with cache.alone(KEY):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.05)
            inside.remove(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert most == [1, 1, 1, 1]
    with cache.alone("one"), cache.alone("another"):
        pass


def test_a_measurement_that_two_want_is_made_once(tmp_path):
    cache, made = StageCache(tmp_path), []

    def measure() -> list[float]:
        made.append(1)
        time.sleep(0.1)
        return [0.5]

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda _: cache.remembered(KEY, measure), range(3))) == [[0.5]] * 3
    assert len(made) == 1


def test_the_command_lists_and_clears(entry, tmp_path, capsys):
    aged(StageCache(tmp_path), entry, {"a" * 64: 10, "b" * 64: 3 * 24 * 3600})
    StageCache(tmp_path).remembered(KEY, lambda: 1)

    def command(*arguments: str) -> tuple[int, list[str]]:
        with pytest.raises(SystemExit) as stopped:
            cache_command([*arguments, "--dir", str(tmp_path)])
        return int(stopped.value.code or 0), capsys.readouterr().out.splitlines()

    code_, lines = command()
    assert code_ == 0
    assert [line.split()[4] for line in lines[:2]] == ["a" * 12, "b" * 12]
    assert all(line.endswith("prune+share") for line in lines[:2])
    assert lines[2].startswith("2 finished stages")
    assert command("clear", "--older-than", "2")[1][0].startswith("removed 1 finished stages")
    assert kept(tmp_path) == {"a" * 64, "measured"}
    command("clear")
    assert kept(tmp_path) == set()


def test_clearing_leaves_what_a_run_is_at(tmp_path, capsys):
    cache, inside, most = StageCache(tmp_path), [], []
    held, cleared = threading.Event(), threading.Event()

    def work(wait: threading.Event) -> None:
        with cache.alone(KEY):
            held.set()
            inside.append(1)
            most.append(len(inside))
            wait.wait(10)
            inside.pop()

    for key in (KEY, "idle"):
        cache.trainings(key).next().save("who", {"step": np.array(1)})
    cache.remembered("idle", lambda: 1)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(work, cleared)
        held.wait(10)
        with pytest.raises(SystemExit):
            cache_command(["clear", "--dir", str(tmp_path)])
        second = pool.submit(work, cleared)
        time.sleep(0.3)
        cleared.set()
        first.result()
        second.result()
    assert most == [1, 1], "one at a time, also after the locks were cleared"
    assert [folder.name for folder in (tmp_path / ".trainings").iterdir()] == [KEY]
    assert not (tmp_path / "measured").exists()
    assert "left: what belongs to 1 stages" in capsys.readouterr().out


def test_the_command_names_a_folder_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cache_command(["--dir", str(tmp_path / "none")])
    assert stopped.value.code == 2
    assert "which is not there" in " ".join(capsys.readouterr().err.split())
