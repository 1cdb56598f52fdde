"""The root of the board aarch64: made from packages of ours by a stand-in for apt, dpkg-deb and pip themselves."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from compress.boards import aarch64_root as module
from compress.boards.aarch64_root import main

DEBIAN = shutil.which("dpkg-deb") is not None
APT = f"""#!{sys.executable}
import json, shutil, sys
from pathlib import Path
here = Path(__file__).parent
words = sys.argv[1:]
(here / "asked").open("a").write(json.dumps(words) + "\\n")
debs = sorted((here / "debs").glob("*.deb"))
places = dict(word.split("=", 1) for word in words if "=" in word)
assert places["APT::Architecture"] == "arm64"
if (here / "fails").exists() and (here / "fails").read_text() in words:
    sys.exit("E: Failed to fetch it: 404 Not Found")
if "--print-uris" in words:
    for deb in debs:
        size = 10**10 if (here / "huge").exists() else deb.stat().st_size
        print(f"'http://mirror/{{deb.name}}' {{deb.name}} {{size}} SHA256:0")
elif "install" in words:
    for deb in debs[: -1 if (here / "short").exists() else None]:
        shutil.copy(deb, places["Dir::Cache::archives"])
"""


def deb(folder: Path, name: str, files: dict[str, str | None]) -> None:
    """Build a package; a file is its text, or ``-> target`` for a link."""
    tree = folder / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        f"Package: {name.partition('_')[0]}\nVersion: 2.36\nArchitecture: arm64\nMaintainer: a\nDescription: b\n"
    )
    for path, text in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        if text.startswith("-> "):
            (tree / path).symlink_to(text.removeprefix("-> "))
        else:
            (tree / path).write_text(text)
    command = ["dpkg-deb", "--build", "--root-owner-group", str(tree), str(folder / f"{name}.deb")]
    subprocess.run(command, check=True, capture_output=True)
    shutil.rmtree(tree)


def wheel(folder: Path, name: str) -> None:
    tag = "cp311-cp311-manylinux_2_27_aarch64"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-{tag}.whl", "w") as file:
        file.writestr(f"{name}/__init__.py", "")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n")
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """Packages as Debian's and PyPI's, and a stand-in for apt."""
    folder = tmp_path_factory.mktemp("packages")
    for name in ("debs", "wheels"):
        (folder / name).mkdir()
    (folder / "apt-get").write_text(APT)
    (folder / "apt-get").chmod(0o755 | stat.S_IXUSR)
    if DEBIAN:
        make_debs(folder / "debs")
    for name in ("ai_edge_litert", "numpy"):
        wheel(folder / "wheels", name)
    return folder


def make_debs(folder: Path) -> None:
    deb(folder, "libc6_2.36-9_arm64", {"lib/ld-linux-aarch64.so.1": "loader"})
    links = {"usr/bin/python3": "-> python3.11", "usr/lib/python3.11/site.py": "-> /etc/python3.11/site.py"}
    deb(folder, "python3_3.11_arm64", {"usr/bin/python3.11": "python", "etc/python3.11/site.py": "", **links})


@pytest.fixture
def place(packages, tmp_path, monkeypatch) -> Path:
    """Where roots are made, with pip and apt looking at packages of ours alone."""
    for name in ("asked", "fails", "huge", "short"):
        (packages / name).unlink(missing_ok=True)
    monkeypatch.setenv("PATH", f"{packages}:{os.environ['PATH']}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages / "wheels"))
    monkeypatch.setattr(module, "version", lambda name: "1.0")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


if DEBIAN:

    def test_a_root_is_made_whole(place, packages):
        root = place / "deep/a root; touch hacked $(touch hacked) '"
        (place / "mine.list").write_text("deb http://mirror stable main")
        assert run(root, "--sources", "mine.list") == 0
        assert (root / "usr/bin/python3").resolve().read_text() == "python"
        site = root / "usr/lib/python3.11/site.py"
        assert not site.readlink().is_absolute()
        assert site.resolve() == root / "etc/python3.11/site.py"
        assert (root / "lib/ld-linux-aarch64.so.1").is_file()
        assert (root / "bin").readlink() == Path("usr/bin")
        assert "asimd" in (root / "proc/cpuinfo").read_text()
        found = root / "usr/local/lib/python3.11/dist-packages"
        assert {path.name for path in found.iterdir() if path.name.isidentifier()} == {"ai_edge_litert", "numpy"}
        assert str(place / "mine.list") in (packages / "asked").read_text()
        assert {path.name for path in place.iterdir()} == {"deep", "mine.list"}
        assert [path.name for path in (place / "deep").iterdir()] == [root.name]

    @pytest.mark.parametrize(
        ("trouble", "content", "said"),
        [
            ("fails", "--print-uris", "--sources"),
            ("fails", "--yes", "--sources"),
            ("short", "", "1 packages of 2"),
            ("huge", "", "20,000,000,000 bytes"),
        ],
    )
    def test_a_download_that_fails_leaves_nothing(place, packages, capsys, trouble, content, said):
        (packages / trouble).write_text(content)
        assert run(place / "root") == 2
        assert said in " ".join(capsys.readouterr().err.split())
        assert list(place.iterdir()) == []

    def test_a_version_that_is_not_built_for_arm_leaves_nothing(place, capsys, monkeypatch):
        monkeypatch.setattr(module, "version", lambda name: "9.9")
        assert run(place / "root") == 2
        assert "ai-edge-litert==9.9" in " ".join(capsys.readouterr().err.split())
        assert list(place.iterdir()) == []


def test_what_is_there_is_left_alone(place, packages, capsys):
    (place / "root").mkdir()
    (place / "root/mine").write_text("mine")
    assert run(place / "root") == 2
    assert run(place / "root/mine") == 2
    assert "Remove it first" in capsys.readouterr().err
    assert (place / "root/mine").read_text() == "mine"
    assert not (packages / "asked").exists()


def test_what_is_missing_is_named(place, monkeypatch, capsys):
    assert run("root", "--sources", "absent.list") == 2
    assert run("root", "-c", "absent.txt") == 2
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert run("root") == 2
    monkeypatch.setenv("PATH", str(place))
    assert run("root") == 2
    said = " ".join(capsys.readouterr().err.split())
    for word in ("absent.list", "absent.txt", "ensurepip", "no apt-get"):
        assert word in said
    assert list(place.iterdir()) == []
