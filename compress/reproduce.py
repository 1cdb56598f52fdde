"""``python -m compress.reproduce``: regenerate the table of a published paper, ours beside theirs.

    python -m compress.reproduce                       lists the experiments
    python -m compress.reproduce resnet_cifar10        runs the grid, writes results/resnet_cifar10.md
    python -m compress.reproduce resnet_cifar10 seed=0,1 recovery.epochs=2     with overrides for every run
    python -m compress.reproduce analytic              all tables of sizes that are only counted, in about a minute

    python -m compress.reproduce resnet_cifar10 --continue     without the runs that results/resnet_cifar10.jsonl holds

Finished stages stay in the cache: a killed command run again continues where it was. What the table shows of each run
is kept beside it: with --continue also another machine goes on from there.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from compress.cli.errors import guarded
from compress.cli.places import experiments_dir
from compress.errors import CompressError, did_you_mean

ANALYTIC = "analytic"
"""All experiments whose models are only counted."""
CONTINUE = "--continue"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, or 2 after a user's mistake."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(guarded(lambda: reproduce(given), given))


def reproduce(arguments: Sequence[str]) -> list[CompressError]:
    """Run the experiment that the first argument names; list the experiments if there is none."""
    if not set(arguments) - {CONTINUE} or arguments[0] in ("-h", "--help"):
        print(__doc__)
        print("Experiments: " + ", ".join(names()))
        return []
    keep = CONTINUE in arguments
    name, *overrides = (argument for argument in arguments if argument != CONTINUE)
    if name not in (ANALYTIC, *names()):
        raise CompressError(
            "experiment",
            expected=f"the name of an experiment, or {ANALYTIC}",
            received=name,
            fix=did_you_mean(name, [ANALYTIC, *names()]),
        )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    from compress.quiet import import_tensorflow

    import_tensorflow()
    from compress.cli.counted import Counted
    from compress.cli.experiment import load_experiment, run_experiment

    counted = Counted()
    for each in names() if name == ANALYTIC else [name]:
        experiment = load_experiment(experiments_dir() / each, each)
        if name != ANALYTIC or experiment.grid.count:
            target = run_experiment(experiment, overrides, Path("results"), counted, keep=keep)
            print(target.read_text())
            print(f"The page is {target}")
    return []


def names() -> list[str]:
    """Return the names of the experiments, e.g. ``resnet_cifar10`` or ``paper/table``."""
    root = experiments_dir()
    return sorted(str(file.parent.relative_to(root)) for file in root.rglob("grid.yaml"))


if __name__ == "__main__":
    main()
