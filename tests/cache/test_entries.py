"""The stage cache: what is stored comes back, what is damaged or forged does not, and nothing in it runs."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tf_keras

from compress.cache import store
from compress.cache.__main__ import main as cache_command
from compress.cache.store import Entry, StageCache
from compress.cache.trainings import Trainings
from compress.candidate import Candidate
from tests.cache.conftest import KEY

layers = tf_keras.layers
FILES = ("guarantees.npz", "manifest.json", "model.cmp", "model.keras", "model.tflite", "record.json")
X = np.random.default_rng(0).normal(size=(2, 6, 6, 2)).astype(np.float32)


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


def test_a_model_with_code_is_not_kept(tmp_path, caplog):
    image = tf_keras.Input((4,))
    model = tf_keras.Model(image, tf_keras.layers.Lambda(lambda t: t * 2)(image))
    StageCache(tmp_path / "cache").store(KEY, Entry(Candidate(model), {"skipped": []}, b"", b""))
    assert not (tmp_path / "cache").exists()


def test_an_entry_that_makes_room_while_it_is_read_is_not_called_damaged(entry, tmp_path, monkeypatch, warnings):
    cache = StageCache(tmp_path / "cache")
    cache.store(KEY, entry)

    def trimmed(folder: Path) -> Entry:
        shutil.rmtree(folder)
        raise FileNotFoundError(folder)

    with monkeypatch.context() as patch:
        patch.setattr(store, "_read", trimmed)
        assert cache.load(KEY) is None
    cache.store(KEY, entry)
    read = store._read
    monkeypatch.setattr(store, "_read", lambda folder: (read(folder), shutil.rmtree(folder))[0])
    assert cache.load(KEY) is not None
    assert warnings == []
