"""``python -m compress.run``: compress a model, measure the exported file, record the result.

python -m compress.run strategy=lowrank+prune model=resnet20 data=cifar10 strategy.prune.sparsity=0.8
python -m compress.run -m strategy=prune,lowrank+prune seed=0,1,2
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from compress.cli import config_source
from compress.cli.errors import guarded
from compress.cli.places import conf_dir
from compress.errors import CompressError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, or 2 after a user's mistake."""
    if arguments is not None:
        sys.argv[1:] = list(arguments)
    sys.exit(guarded(lambda: run_command(), sys.argv[1:]))


def run_command() -> list[CompressError]:
    """Let Hydra compose and run the job or jobs; return the mistake that ended a single job.

    The failed jobs of a multirun are told, and end the program, in :mod:`compress.cli.sweep`.
    """
    failures: list[CompressError] = []

    def job(config: DictConfig) -> float | None:
        # Imported here, so that --help, --cfg and completion answer without TensorFlow and MLflow.
        from compress.quiet import import_tensorflow

        import_tensorflow()
        from compress.cli.job import run_job, run_one_of_many
        from compress.cli.threads import limit_threads

        hydra_config = HydraConfig.get()
        limit_threads(hydra_config.launcher)
        folder = Path(hydra_config.runtime.output_dir)
        overrides = [str(text) for text in hydra_config.overrides.task]
        if hydra_config.mode == RunMode.MULTIRUN:
            limits = hydra_config.sweeper.get("give_up") or {}
            sweep = Path(hydra_config.sweep.dir)
            return run_one_of_many(config, folder, sweep, hydra_config.job.num, overrides, limits)
        try:
            return run_job(config, folder, None, overrides)
        except CompressError as error:
            if config.debug:
                raise
            failures.append(error)
            return None

    config_source.register()
    hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(job)()
    return failures


if __name__ == "__main__":
    main()
