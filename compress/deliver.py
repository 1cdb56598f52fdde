"""``python -m compress.deliver``: send MLflow what was kept while its server was away.

    python -m compress.deliver
    python -m compress.deliver uri=http://mlflow.example:5000 folder=~/project/.compress_unsent

The next run in the same folder does so, too, before it starts.

uri      the MLflow store (default: $MLFLOW_TRACKING_URI, or sqlite:///mlflow.db)
folder   where it was kept: tracking.unsent of the runs (default: .compress_unsent)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from compress.cli.errors import guarded
from compress.cli.words import key_values
from compress.errors import CompressError
from compress.words import counted

_KEYS = ("uri", "folder", "debug")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, or 2 if something could not be sent."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(guarded(lambda: send_kept(given), given))


def send_kept(arguments: Sequence[str]) -> list[CompressError]:
    """Send it, say how much that was, and return what went wrong."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(__doc__)
        return []
    values = key_values(arguments, _KEYS[:-1], _KEYS[-1:])
    folder = Path(values.get("folder") or ".compress_unsent")
    if "folder" in values and not folder.expanduser().is_dir():
        raise CompressError(
            "folder",
            expected="the folder where runs have kept what MLflow did not take",
            received=str(folder),
            fix="It is .compress_unsent beside where the runs were started, unless tracking.unsent said otherwise. "
            "Where all has been sent there is none.",
        )
    uri = values.get("uri") or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"

    from compress.tracking.delivery import deliver
    from compress.tracking.store import Store, connect_to, without_password

    connect_to(uri)
    found = deliver(folder, Store(uri, ""))
    print(f"sent: {counted(found.runs, 'run')}; kept: {len(found.kept)}")
    for file in found.kept:
        print(f"  {file}")
    for other, count in found.others.items():
        print(f"kept for another store: {count} for {other}")
    if found.others and not found.runs and not found.kept and values.get("uri"):
        raise CompressError(
            "uri",
            expected=f"a store that something is kept for: {', '.join(found.others)}",
            received=without_password(uri),
            fix="Write uri= as the runs did.",
        )
    return list(found.problems)


if __name__ == "__main__":
    main()
