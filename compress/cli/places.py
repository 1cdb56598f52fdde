"""Where ``conf/`` and ``experiments/`` lie: in the source tree, or inside the installed package."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from compress.errors import CompressError

_PACKAGE = Path(__file__).resolve().parent.parent


def conf_dir() -> Path:
    """Return the folder of the Hydra configuration."""
    return _shipped("conf")


def choices_of(group: str) -> dict[str, Path]:
    """Return the YAML files of a group of the configuration by name, those of the user's own folders among them.

    The latter are known where Hydra has started the command, or a launcher's process.
    """
    folders = [conf_dir()]
    if HydraConfig.initialized():
        sources = HydraConfig.get().runtime.config_sources
        folders += [Path(source.path) for source in sources if source.schema == "file"]
    return {file.stem: file for folder in reversed(folders) for file in sorted((folder / group).glob("*.yaml"))}


def read_choice(file: Path) -> DictConfig:
    """Return what the YAML file of a choice holds.

    Raises:
        CompressError: if it builds on others, which only Hydra puts together.
    """
    values = OmegaConf.load(file)
    plain = values if isinstance(values, DictConfig) else OmegaConf.create({})
    if "defaults" in plain:
        raise CompressError(
            str(file),
            expected="a file that holds all values: nothing is composed here",
            received=f"defaults: {plain['defaults']}",
            fix="Write the values of those files into it.",
        )
    return plain


def experiments_dir() -> Path:
    """Return the folder of the experiments."""
    return _shipped("experiments")


def _shipped(name: str) -> Path:
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name
