"""A built wheel runs from any folder: the configuration and the experiments are inside it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile

import pytest

from compress.cli.errors import _EXTRAS

from .conftest import REPOSITORY


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(REPOSITORY)], check=True)
    wheel = next(folder.glob("compress-*.whl"))
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    names = zipfile.ZipFile(wheel).namelist()
    assert "compress/conf/config.yaml" in names
    assert "compress/experiments/resnet_cifar10/grid.yaml" in names
    assert "compress/tracking/report.schema.json" in names
    assert not [name for name in names if name.startswith(("tests/", "results/"))]
    return folder / "site"


def test_the_wheel_runs_from_any_folder(site, outside):
    done = outside("-m", "compress.run", "--cfg", "job", "strategy=share+quantize", env={"PYTHONPATH": str(site)})
    assert done.returncode == 0, done.stderr
    assert "clusters: 32" in done.stdout
    done = outside("-m", "compress.reproduce", env={"PYTHONPATH": str(site)})
    assert "resnet_cifar10" in done.stdout


def test_extras_are_spelled_as_every_installer_knows_them():
    """PEP 685: pip before 23.3 looks for the spelling in the package's metadata, which is the normalised one."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    assert [extra for extra in extras if not re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", extra)] == []
    places = [REPOSITORY / "README.md", REPOSITORY / "pyproject.toml", *(REPOSITORY / "docs").glob("*.md")]
    places += [
        file
        for folder in ("compress", "conf", "hydra_plugins")
        for file in (REPOSITORY / folder).rglob("*")
        if file.suffix in (".py", ".yaml")
    ]
    named = {
        (str(file.relative_to(REPOSITORY)), extra)
        for file in places
        for given in re.findall(r"\bcompress\[([\w,-]+)\]", file.read_text())
        for extra in given.split(",")
    }
    assert ("docs/boards.md", "ethos-u") in named
    assert [pair for pair in sorted(named) if pair[1] not in extras] == []
    assert {extra for choices in _EXTRAS.values() for extra in choices.values()} <= extras
