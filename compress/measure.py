"""``python -m compress.measure model.tflite --boards host,roofline``: one table of what boards say of files.

python -m compress.measure baseline.tflite compressed.tflite --boards host host.threads=2

Several files are measured in turns, and compared with the first. A board that fails is a row with its reason. Exit
code 0: every board has answered for every file; 1: at least one has not; 2: a mistake in the command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from compress.errors import USER_ERROR


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.measure",
        description="Measure .tflite files on boards and print one table.",
        epilog="Exit code 0: every board has answered; 1: one has not, see its row; 2: a mistake in the command.",
    )
    parser.add_argument("files", nargs="+", help="files (.tflite), and settings of boards: host.threads=2 ssh.host=pi")
    parser.add_argument("--boards", default="host", help="names in conf/board, separated by commas (default: host)")
    parser.add_argument("--config-dir", type=Path, help="a folder with a folder board/ of your own YAML files")
    parser.add_argument("--operators", action="store_true", help="print times by operator, where a board tells them")
    parser.add_argument("-o", "--output", type=Path, help="also write everything to this JSON file")
    parser.add_argument(
        "--fit", type=Path, metavar="FILE.yaml", help="write a profile for board=roofline fitted to the measured times"
    )
    given = parser.parse_intermixed_args(arguments)
    settings = [text for text in given.files if "=" in text and not Path(text).exists()]
    files = [Path(text) for text in given.files if text not in settings]

    from compress.cli.errors import guarded
    from compress.errors import CompressError

    answered = True

    def body() -> list[CompressError]:
        nonlocal answered
        # Imported here, so that --help answers at once.
        from compress.quiet import import_tensorflow

        import_tensorflow()
        from compress.cli import boards

        chosen = boards.load_boards(given.boards.split(","), settings, given.config_dir)
        rows = boards.measure_files(chosen, files)
        boards.print_rows(rows, operators=given.operators)
        if given.output is not None:
            boards.write_rows(rows, given.output)
        if given.fit is not None:
            boards.write_profile(rows, given.fit)
        answered = all(row.measurement.failure is None for row in rows)
        return []

    code = guarded(body, settings)
    sys.exit(code if code == USER_ERROR or answered else 1)


if __name__ == "__main__":
    main()
