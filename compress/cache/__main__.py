"""``python -m compress.cache``: what the stage cache holds; ``clear`` removes it, or what is older than some days."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from compress.errors import CompressError, run_command
from compress.words import counted


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, or 2 after a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m compress.cache", description=(__doc__ or "").partition(":")[2])
    parser.add_argument("action", nargs="?", choices=["list", "clear"], default="list")
    parser.add_argument("--dir", type=Path, default=Path(".compress_cache"), help="the folder (default: %(default)s)")
    parser.add_argument(
        "--older-than", type=float, metavar="DAYS", help="with clear: only what was not used for so long"
    )
    given = parser.parse_args(arguments)

    def body() -> None:
        if given.action == "clear":
            clear(given.dir, given.older_than)
        else:
            show(given.dir)

    sys.exit(run_command(body))


def show(folder: Path) -> None:
    """Print a line for each finished stage, those used last first, and the sum.

    Raises:
        CompressError: if there is no such folder.
    """
    from compress.cache.upkeep import entries, unfinished

    kept = entries(_existing(folder))
    for entry in kept:
        print(f"{entry.when}  {_size(entry.bytes)}  {entry.folder.name[:12]}  {'+'.join(entry.stages) or 'baseline'}")
    print(f"{counted(len(kept), 'finished stage')}, {_size(sum(entry.bytes for entry in kept)).strip()}, in {folder}")
    waiting = unfinished(folder)
    if waiting:
        print(f"and {len(waiting)} with an unfinished training, which the same command continues")


def clear(folder: Path, older_than: float | None) -> None:
    """Remove all that the cache holds, or the stages that were not used for ``older_than`` days.

    Raises:
        CompressError: if there is no such folder.
    """
    from compress.cache.upkeep import entries, remove, remove_idle

    kept = entries(_existing(folder))
    if older_than is not None:
        kept = [entry for entry in kept if entry.used < time.time() - older_than * 24 * 3600]
    remove(kept)
    if older_than is None:
        busy = remove_idle(folder)
        if busy:
            print(f"left: what belongs to {counted(busy, 'stage')} that runs are at now")
    size = _size(sum(entry.bytes for entry in kept)).strip()
    print(f"removed {counted(len(kept), 'finished stage')}, {size}, from {folder}")


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise CompressError(
            "--dir",
            expected="the folder of a stage cache",
            received=f"{folder}, which is not there",
            fix="Name the folder that cache.dir named in the run.",
        )
    return folder


def _size(count: float) -> str:
    return f"{count / 1e6:9.2f} MB"


if __name__ == "__main__":
    main()
