"""A store of runs for the tests of a file, and a folder of its own for each test."""

from __future__ import annotations

import pytest

from compress.tracking.store import TrackingSettings


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> TrackingSettings:
    folder = tmp_path_factory.mktemp("mlflow")
    return TrackingSettings(True, f"sqlite:///{folder}/mlflow.db", "tests")


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path, monkeypatch):
    # MLflow puts the artifacts of a SQLite store beside the current folder.
    monkeypatch.chdir(tmp_path)
