"""Answers ``strategy=a+b+c``: a Hydra config source that composes a pipeline from single strategies.

``strategy/lowrank+prune`` becomes a defaults list which places ``conf/strategy/lowrank.yaml`` at
``strategy.lowrank`` and ``conf/strategy/prune.yaml`` at ``strategy.prune``, each on top of the keys that
every stage has (``conf/pipeline/stage.yaml``). A repeated strategy gets a number: ``prune``, ``prune2``.
The single files are read by Hydra's own sources, so a user's ``--config-dir`` adds strategies, too.
"""

from __future__ import annotations

import os
import re

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from compress.errors import CompressError

GROUP = "strategy"
SCHEME = "pipeline"
NO_STRATEGY = "none"


def stage_names(expression: str) -> list[tuple[str, str]]:
    """Split ``a+b+a`` into (stage name, strategy name) pairs: ``[(a, a), (b, b), (a2, a)]``.

    Raises:
        CompressError: if a part is no name.
    """
    seen: dict[str, int] = {}
    pairs = []
    for strategy in expression.split("+"):
        if not re.fullmatch(r"[A-Za-z_]\w*", strategy):
            raise CompressError(
                GROUP,
                expected="names of strategies joined by +, one of lowrank, prune, ... in each place",
                received=f"{expression!r}, with {strategy!r} as one of them",
                fix="Write for example strategy=lowrank+prune.",
            )
        seen[strategy] = seen.get(strategy, 0) + 1
        count = seen[strategy]
        pairs.append((strategy if count == 1 else f"{strategy}{count}", strategy))
    return pairs


class PipelineConfigSource(ConfigSource):
    """Composes ``strategy/<a>+<b>`` from the files of the single strategies."""

    @staticmethod
    def scheme() -> str:
        """Return the search path scheme of this source."""
        return SCHEME

    def load_config(self, config_path: str) -> ConfigResult:
        """Return the defaults list that places every stage."""
        expression = config_path.removeprefix(f"{GROUP}/")
        if not self.is_config(config_path):
            raise ConfigLoadError(f"not a pipeline: {config_path}")
        defaults: list[dict[str, str]] = []
        if expression != NO_STRATEGY:
            for stage, strategy in stage_names(expression):
                defaults.append({f"/pipeline@{stage}": "stage"})
                # The extension marks the single file, which this source leaves to the others.
                defaults.append({f"/{GROUP}@{stage}": f"{strategy}.yaml"})
        return ConfigResult(
            config=OmegaConf.create({"defaults": defaults}) if defaults else OmegaConf.create({}),
            path=f"{SCHEME}://",
            provider=self.provider,
            header={"package": None},
        )

    def is_group(self, config_path: str) -> bool:
        """Say whether the path is the strategy group."""
        return config_path == GROUP

    def is_config(self, config_path: str) -> bool:
        """Say whether the path names a pipeline: anything in the group but the single files."""
        return config_path.startswith(f"{GROUP}/") and not config_path.endswith(".yaml")

    def available(self) -> bool:
        """Return true: the source needs nothing."""
        return True

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """List the completions of the pipeline under the cursor; nothing outside shell completion.

        Single strategies are listed by the sources that hold their files. Only when the shell asks for
        completions of ``strategy=lowrank+...`` are there further names to offer.
        """
        if config_path != GROUP or results_filter == ObjectType.GROUP:
            return []
        word = os.environ.get("COMP_LINE", "").rsplit(" ", 1)[-1]
        if not word.startswith(f"{GROUP}=") or "+" not in word:
            return []
        prefix = word.removeprefix(f"{GROUP}=").rpartition("+")[0]
        from compress.cli.places import conf_dir

        return [f"{prefix}+{file.stem}" for file in sorted((conf_dir() / GROUP).glob("*.yaml"))]


class PipelineSearchPath(SearchPathPlugin):
    """Puts the pipeline source in front of the search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Prepend the source, so that it sees ``strategy/...`` before the files do."""
        search_path.prepend(provider="compress", path=f"{SCHEME}://")


def register() -> None:
    """Make Hydra know both plugins; safe to call more than once."""
    plugins = Plugins.instance()
    plugins.register(PipelineConfigSource)
    plugins.register(PipelineSearchPath)
