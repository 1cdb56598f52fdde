"""A built wheel runs from any folder: the configuration and the experiments are inside it."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest

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
