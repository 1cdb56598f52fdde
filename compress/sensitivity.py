"""``python -m compress.sensitivity``: what each layer loses under each technique, and what that saves.

python -m compress.sensitivity model=resnet20 data=cifar10
python -m compress.sensitivity techniques.prune.sparsity=[0.5,0.9] '~techniques.share'
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from compress.cli import config_source
from compress.cli.errors import guarded
from compress.cli.places import conf_dir
from compress.errors import CompressError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, or 2 after a user's mistake."""
    if arguments is not None:
        sys.argv[1:] = list(arguments)
    sys.exit(guarded(run_command, sys.argv[1:]))


def run_command() -> list[CompressError]:
    """Let Hydra compose and run the job; return the mistake that ended it."""
    if {"-m", "--multirun"} & set(sys.argv[1:]):
        raise CompressError(
            "--multirun", expected="one model at a time", received="-m", fix="Call the command once for each."
        )

    failures: list[CompressError] = []

    def job(config: DictConfig) -> None:
        # Imported here, so that --help, --cfg and completion answer without TensorFlow and MLflow.
        from compress.quiet import import_tensorflow

        import_tensorflow()
        from compress.cli.survey import run_survey

        try:
            run_survey(config, Path(HydraConfig.get().runtime.output_dir))
        except CompressError as error:
            if config.debug:
                raise
            # Hydra would say that there was an error, before the message does.
            failures.append(error)

    config_source.register()
    hydra.main(config_path=str(conf_dir()), config_name="sensitivity", version_base="1.3")(job)()
    return failures


if __name__ == "__main__":
    main()
