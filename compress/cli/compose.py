"""Composes the configuration outside ``hydra.main``: for experiments and tests."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from compress.cli import config_source
from compress.cli.places import conf_dir


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """Return what ``python -m compress.run <overrides>`` would be given."""
    config_source.register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides))
