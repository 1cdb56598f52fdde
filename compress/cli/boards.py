"""Files on several boards: what ``compress.measure`` does and prints."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from compress.boards.board import Board
from compress.candidate import Artifact, Measurement, Storage
from compress.cli.compose import compose_config
from compress.cli.construct import construct, to_plain
from compress.cli.experiment import machine
from compress.cli.places import conf_dir
from compress.errors import CompressError, did_you_mean
from compress.words import counted

_LONGEST_TABLE = 12
"""Operators shown of each file, the slowest first."""


@dataclass(frozen=True)
class Row:
    """What a board says of a file, and how many times as fast the file is as the first one on that board."""

    file: Path
    measurement: Measurement
    speedup: float | None = None


def load_boards(names: Sequence[str], settings: Sequence[str], extra: Path | None = None) -> list[Board]:
    """Return the boards of these names.

    Args:
        names: choices of ``board=``.
        settings: ``<board>.<field>=<value>``.
        extra: a folder with more choices, in its folder ``board``.

    Raises:
        CompressError: if there is no board of a name, or a setting is not valid.
    """
    folders = [conf_dir(), *([extra] if extra else [])]
    known = {file.stem for folder in folders for file in (folder / "board").glob("*.yaml")}
    wanted = {name: [text for text in settings if text.startswith(f"{name}.")] for name in names}
    for name in names:
        if name not in known:
            raise CompressError(
                "--boards",
                expected=f"some of {', '.join(sorted(known))}",
                received=name or "a name without letters",
                fix=did_you_mean(name, known),
            )
    for text in settings:
        if not any(text in found for found in wanted.values()):
            raise CompressError(
                text,
                expected="<board>.<field>=<value> of a board that is asked for",
                received=text,
                fix=f"Write for example {names[0]}.timeout=60, or correct the path if it was meant to be a file.",
            )
    places = [f"hydra.searchpath=['file://{extra.resolve()}']"] if extra else []
    boards = []
    for name, found in wanted.items():
        # Added, not overridden: a field that the board lacks is refused below, with the nearest name that it has.
        overrides = [f"++board.{text.removeprefix(f'{name}.')}" for text in found]
        plain = to_plain(compose_config([*places, f"board={name}", *overrides]))
        boards.append(construct(Board, plain["board"], name))
    return boards


def measure_files(boards: Sequence[Board], files: Sequence[Path]) -> list[Row]:
    """Return what each board says of each file, board by board; one that fails is a row with its reason.

    Raises:
        CompressError: if a file is not there.
    """
    for file in files:
        if not file.is_file():
            received = "a folder" if file.is_dir() else "no such file"
            raise CompressError(str(file), expected="a .tflite file", received=received, fix="Correct the path.")
    if not files:
        raise CompressError("files", expected="at least one .tflite file", received="none", fix="Name one.")
    artifacts = [Artifact(file.resolve(), Storage()) for file in files]
    rows = []
    for board in boards:
        found = _measure(board, artifacts)
        first = found[0].cost_ms
        for file, one in zip(files, found, strict=True):
            speedup = first / one.cost_ms if first and one.cost_ms and len(files) > 1 else None
            rows.append(Row(file, one, speedup))
    return rows


def _measure(board: Board, artifacts: Sequence[Artifact]) -> list[Measurement]:
    try:
        return board.measure_all(artifacts)
    except Exception as error:
        # A board of someone else's may raise what it should return; the other boards' numbers are kept.
        reason = f"the board itself failed ({type(error).__name__}: {error})"[:400]
        return [Measurement(board.name, None, reason)] * len(artifacts)


def print_rows(rows: Sequence[Row], *, operators: bool = False) -> None:
    """Print a table with one row for each board and file."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="milliseconds for one sample; estimates come from boards that run nothing")
    for heading in ("board", "file", "p50", "p90", "p99", "mean", "first", "runs", "estimate", "faster"):
        table.add_column(heading, justify="left" if heading in ("board", "file") else "right", no_wrap=True)
    table.add_column("also", overflow="fold")
    names = _short_names({row.file for row in rows})
    for row in rows:
        table.add_row(*_cells(row, names[row.file]))
    console = Console()
    # A file or a pipe has no width; the table must not be cut to 80 columns there.
    wide = console if console.is_terminal else Console(width=200)
    wide.print(table)
    if operators:
        for row in (row for row in rows if row.measurement.operators):
            wide.print(_operator_table(row))


def _short_names(files: Collection[Path]) -> dict[Path, str]:
    """Return what each file is called in the table: its name, with its folder where others have the same name."""
    often = Counter(file.name for file in files)
    return {file: file.name if often[file.name] == 1 else str(file) for file in files}


def _cells(row: Row, name: str) -> list[str]:
    one = row.measurement
    latency = one.latency_ms
    times = ["-"] * 6
    if latency is not None:
        found = (latency.p50, latency.p90, latency.p99, latency.mean, latency.first)
        times = [*("-" if value is None else f"{value:.3f}" for value in found), f"{latency.runs:,}"]
    estimate = "-" if one.estimate_ms is None else f"{one.estimate_ms:.3f}"
    said = [f"failed: {one.failure}"] if one.failure else []
    said += [f"{name} {_number(value)}" for name, value in one.values.items()]
    faster = "" if row.speedup is None else f"{row.speedup:.2f}x"
    return [one.board, name, *times, estimate, faster, "; ".join([*said, *one.notes])]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def _operator_table(row: Row) -> object:
    from rich.table import Table

    what = "estimated" if row.measurement.latency_ms is None else "measured"
    table = Table(title=f"{row.measurement.board}, {row.file.name}: {what} ms by operator")
    table.add_column("operator")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    whole = sum(one.ms for one in row.measurement.operators) or 1.0
    slowest = sorted(row.measurement.operators, key=lambda one: -one.ms)
    for one in slowest[:_LONGEST_TABLE]:
        table.add_row(one.name, f"{one.ms:.4f}", f"{one.ms / whole:.1%}")
    if rest := slowest[_LONGEST_TABLE:]:
        table.add_row(f"{len(rest)} more", f"{sum(o.ms for o in rest):.4f}", f"{sum(o.ms for o in rest) / whole:.1%}")
    return table


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write everything as JSON, under a temporary name that is then changed."""
    partial = path.with_name(f".{path.name}.partial")
    plain: list[Mapping[str, object]] = [
        {"file": str(row.file), **asdict(row.measurement), "speedup": row.speedup} for row in rows
    ]
    partial.write_text(json.dumps(plain, indent=2) + "\n")
    partial.replace(path)


def write_profile(rows: Sequence[Row], path: Path) -> None:
    """Fit a profile to the latencies of one board and write it as a choice of ``board=``.

    Raises:
        CompressError: if there are too few latencies, or those of several boards.
    """
    from compress.boards.roofline import work_of
    from compress.boards.roofline_fit import fit_profile
    from compress.metrics.tflite_file import TFLiteFile

    timed = [row for row in rows if row.measurement.latency_ms is not None]
    boards = sorted({row.measurement.board for row in timed})
    if len(boards) != 1:
        raise CompressError(
            "--fit",
            expected="latencies of one board",
            received=", ".join(boards) or "none",
            fix="Name one board that measures: --boards host.",
        )
    profile = fit_profile(
        [work_of(TFLiteFile.read(row.file)) for row in timed],
        [row.measurement.latency_ms.p50 for row in timed if row.measurement.latency_ms is not None],
        f"board={boards[0]}, {machine()}",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(
        f"# An estimate from operators and bytes, fitted to {counted(len(timed), 'file')}.\n{profile.to_yaml()}"
    )
    partial.replace(path)
