"""An experiment: a published table, the grid of runs that produces our side, and both rendered side by side."""

from __future__ import annotations

import os
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from omegaconf import OmegaConf
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from compress.boards.host import processor
from compress.cli.compose import compose_config
from compress.cli.counted import Counted
from compress.cli.finished import FinishedRuns
from compress.cli.job import run_job
from compress.errors import CompressError
from compress.tracking.report import read_report, versions

_STRICT = ConfigDict(extra="forbid")


@checked_dataclass(frozen=True, config=_STRICT)
class Column:
    """A column of the rendered table.

    ``ours`` is a dotted path into ``report.json``, ``published`` a column of the published table; one of them may be
    absent. In a path ``{layer}`` stands for the row's layer, a pattern sums over the keys of its place that match
    (``*``: all, ``conv_*|fc``: some), and a number counts the items of a list from 0. With ``removed_from``, another
    path, ours is the percentage of that number that is gone, with ``share_of`` the percentage that it is. Ours is then
    multiplied by ``scale``. With ``compared`` the same number of another row, which the grid's ``compared_with`` names,
    is subtracted, seed by seed. With a ``tolerance`` the difference is judged (``printed``: half a unit of the last
    digit that was published); with ``at_least`` only ours being lower counts.
    """

    name: str
    ours: str | None = None
    published: str | None = None
    removed_from: str | None = None
    share_of: str | None = None
    scale: float = 1.0
    compared: bool = False
    tolerance: float | Literal["printed"] | None = None
    at_least: bool = False


@checked_dataclass(frozen=True, config=_STRICT)
class Grid:
    """``grid.yaml``: row name -> overrides of its run, on top of the common ``overrides``.

    A row with a ``seed=0`` of its own is run with that seed alone.

    With ``layers``, row name -> layer (``*``: all), a row is a layer of its own run, or of the only run if it has none.
    With ``count`` the untrained models of the runs are counted, and nothing is run. ``compared_with``: row name -> the
    row that a column with ``compared`` subtracts. ``allocation``: path of what a search chose, shown layer by layer
    below the table.
    """

    runs: dict[str, list[str]]
    columns: list[Column]
    overrides: list[str]
    seeds: list[int]
    layers: dict[str, str] = field(default_factory=dict)
    count: bool = False
    compared_with: dict[str, str] = field(default_factory=dict)
    allocation: str | None = None

    def __post_init__(self) -> None:
        """Refuse layers of which nobody knows whose they are, and rows compared that are not there."""
        for name in (*self.compared_with, *self.compared_with.values()):
            if name not in self.rows:
                raise ValueError(f"compared_with to name rows, not {name!r}")
        if len(self.runs) != 1 and not set(self.layers) <= set(self.runs):
            raise ValueError("one run, or one for each layer, when rows are layers")

    @property
    def rows(self) -> list[str]:
        """Names of the rows that have a side of ours."""
        return list(self.runs if len(self.runs) != 1 else self.layers or self.runs)

    def run_of(self, row: str) -> str | None:
        """Return the name of the run that the row is about, None if there is none."""
        return row if row in self.runs else next(iter(self.runs)) if row in self.layers else None


@checked_dataclass(frozen=True, config=_STRICT)
class PublishedTable:
    """``table.yaml``: the published numbers with their source; the first column names the rows."""

    title: str
    source: str
    columns: list[str]
    rows: list[list[str | int | float | None]]
    notes: str = ""

    def value(self, row: str, column: str) -> str | int | float | None:
        """Return a cell, or None if there is no such row."""
        found = next((cells for cells in self.rows if cells[0] == row), None)
        return None if found is None else found[self.columns.index(column)]


@dataclass(frozen=True)
class Experiment:
    """An experiment folder, read."""

    name: str
    table: PublishedTable
    grid: Grid


def load_experiment(folder: Path, name: str) -> Experiment:
    """Read ``table.yaml`` and ``grid.yaml``.

    Raises:
        CompressError: if one of them is malformed.
    """
    return Experiment(name, _read(PublishedTable, folder / "table.yaml"), _read(Grid, folder / "grid.yaml"))


def run_experiment(
    experiment: Experiment,
    overrides: Sequence[str],
    results: Path,
    counted: Counted | None = None,
    *,
    keep: bool = False,
) -> Path:
    """Run the grid for every seed and write ``<results>/<experiment>.md``; return the file.

    What the table shows of each run is kept beside it, in ``<results>/<experiment>.jsonl``. A page that would
    differ from the one that is there in nothing but where and when it was made stays as it is.

    Args:
        experiment: what to run.
        overrides: further overrides for every run; ``seed=0,1`` replaces the experiment's seeds.
        results: the folder of the rendered tables.
        counted: what has been counted already, if several experiments are.
        keep: take the runs from the ``.jsonl`` file that were made with the same overrides.

    Raises:
        CompressError: if a run fails, or the file to go on from is damaged.
    """
    counted = counted or Counted()
    seeds, extra = _seeds(experiment.grid.seeds, overrides)
    rows: dict[str, list[Mapping[str, Any]]] = {}
    target = results / f"{experiment.name}.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    finished = FinishedRuns(target.with_suffix(".jsonl"), _paths(experiment.grid), kept=keep)

    def page() -> str:
        return render(experiment, rows, seeds, overrides, finished.other_commits())

    for row, own in experiment.grid.runs.items():
        own_seeds, settings = _seeds(seeds, own)
        made = False
        for seed in own_seeds:
            settled = [*experiment.grid.overrides, *settings, *extra]
            if experiment.grid.count:
                rows.setdefault(row, []).append(counted.report(settled))
                continue
            report = finished.find(row, seed, settled)
            if report is None:
                folder = Path("outputs") / "reproduce" / experiment.name / f"{row}-seed{seed}"
                folder.mkdir(parents=True, exist_ok=True)
                run_job(compose_config([*settled, f"seed={seed}"]), folder, None)
                report = read_report(folder / "report.json")
                finished.add(row, seed, settled, report)
                made = True
            rows.setdefault(row, []).append(report)
        if made:
            # Written after every row, so that a table that is stopped shows what it has.
            _write(target, page())
    _write(target, page())
    return target


def _paths(grid: Grid) -> list[str]:
    """Return all that the columns read of a report."""
    columns = grid.columns
    read = [path for column in columns for path in (column.ours, column.removed_from, column.share_of)]
    return [path.replace("{layer}", "*") for path in [*read, grid.allocation] if path is not None]


def render(
    experiment: Experiment,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    seeds: Sequence[int],
    extra: Sequence[str],
    earlier: Mapping[str, int] = MappingProxyType({}),
) -> str:
    """Return the Markdown page: ours and theirs side by side, and how it was made.

    ``earlier``: commit -> how many runs were made there, of those that were not made now.
    """
    table, grid = experiment.table, experiment.grid
    headings = [table.columns[0]]
    for column in grid.columns:
        headings += [f"{column.name}: {side}" for side in _sides(column)]
    lines = [f"# {table.title}", "", f"Published: {table.source}", "", "| " + " | ".join(headings) + " |"]
    lines.append("|" + "---|" * len(headings))
    misses = []
    others = [str(cells[0]) for cells in table.rows if cells[0] not in grid.rows]
    for row in [*grid.rows, *others]:
        run = grid.run_of(row)
        reports = rows.get(run) if run else None
        cells = [row]
        for column in grid.columns:
            published = table.value(row, column.published) if column.published else None
            ours = _numbers(rows, grid, row, column)
            if "published" in _sides(column):
                cells.append(_cell(published))
            if "ours" in _sides(column):
                cells.append(_ours(ours) if reports else "not run yet" if run else "")
            if "agrees" in _sides(column):
                verdict = _agrees(ours, published, column)
                cells.append({True: "yes", False: "**no**", None: "-" if run else ""}[verdict])
                if verdict is False:
                    misses.append(f"{row}, {column.name}: {_ours(ours)} against {_cell(published)}")
        lines.append("| " + " | ".join(cells) + " |")
    if grid.allocation is not None:
        for run, reports in rows.items():
            lines += _allocation(run, len(reports), _at(reports[0], grid.allocation.split(".")) or ())
    if misses:
        lines += ["", "Outside the tolerance: " + "; ".join(misses) + "."]
    if table.notes:
        lines += ["", table.notes.strip()]
    command = shlex.join(["python", "-m", "compress.reproduce", experiment.name, *extra])
    first = next(iter(rows.values()), [{}])[0]
    alone = [f"{row}: {own[0]} alone" for row, settings in grid.runs.items() if (own := _seeds([], settings)[0])]
    lines += provenance(command, [*seeds, *alone], f"{machine()}; board: {first.get('board', '-')}")
    lines[-1:] = [
        *(f"- made earlier: {count} of the runs, at commit {commit}" for commit, count in earlier.items()),
        "",
    ]
    return "\n".join(lines)


def _allocation(run: str, seeds: int, chosen: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table of what a search chose for each layer."""
    which = run if seeds == 1 else f"{run}; the first seed"
    lines = ["", f"Chosen for each layer, and expected of it ({which}):", ""]
    lines += ["| layer | chosen | divergence | bytes | ms |", "|---|---|---|---|---|"]
    for row in chosen:
        time = "-" if row["milliseconds"] is None else f"{row['milliseconds']:.4f}"
        what = ", ".join(row["chosen"]) or "as it is"
        lines.append(f"| {row['layer']} | {what} | {row['divergence']:.1e} | {row['bytes']:,} | {time} |")
    return lines


def provenance(command: str, seeds: Sequence[int | str], where: str) -> list[str]:
    """Return the lines at the end of a generated page that say how it was made; ``where``: the machine."""
    known = versions()
    return [
        "",
        "How this was made:",
        "",
        f"- command: `{command}`",
        f"- commit: {known.pop('commit')}",
        f"- seeds: {', '.join(map(str, seeds))}",
        "- versions: " + ", ".join(f"{key} {value}" for key, value in known.items()),
        f"- machine: {where}",
        f"- date: {datetime.now(UTC):%Y-%m-%d}",
        "",
    ]


def machine() -> str:
    """Return the processor, its number of cores and the operating system."""
    name, _ = processor()
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"


def _read(kind: Any, file: Path) -> Any:
    try:
        return TypeAdapter(kind).validate_python(OmegaConf.to_container(OmegaConf.load(file)))
    except ValidationError as error:
        first = error.errors()[0]
        raise CompressError(
            str(file),
            expected=str(first["msg"]),
            received=f"{'.'.join(map(str, first['loc']))}: {first['input']!r}"[:200],
            fix="Correct the file; experiments/resnet_cifar10 is an example.",
        ) from error


def _seeds(default: Sequence[int], overrides: Sequence[str]) -> tuple[list[int], list[str]]:
    seeds, extra = list(default), []
    for override in overrides:
        if override.startswith("seed="):
            try:
                seeds = [int(part) for part in override.removeprefix("seed=").split(",")]
            except ValueError as error:
                raise CompressError(
                    "seed", expected="whole numbers, e.g. seed=0,1,2", received=override, fix="Correct it."
                ) from error
        else:
            extra.append(override)
    return seeds, extra


def _sides(column: Column) -> list[str]:
    sides = [side for side in ("published", "ours") if getattr(column, side) is not None]
    return [*sides, "agrees"] if column.tolerance is not None else sides


def _numbers(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], grid: Grid, row: str, column: Column
) -> list[float | None]:
    """Return ours in a cell, seed by seed."""
    values = [_number(report, column, grid.layers.get(row, "")) for report in rows.get(grid.run_of(row) or "", ())]
    if not column.compared:
        return values
    other = grid.compared_with.get(row)
    others = [] if other is None else _numbers(rows, grid, other, replace(column, compared=False))
    return [None if a is None or b is None else a - b for a, b in zip(values, others, strict=False)]


def _number(report: Mapping[str, Any], column: Column, layer: str) -> float | None:
    if column.ours is None:
        return None
    # The accuracy of random weights must not stand beside a published one.
    if not report.get("trained", True) and column.ours.rpartition(".")[2].startswith("accuracy"):
        return None
    value = _at(report, column.ours.replace("{layer}", layer).split("."))
    other = column.removed_from or column.share_of
    if value is None:
        return None
    if other is None:
        return value if column.scale == 1 else column.scale * value
    whole = _at(report, other.replace("{layer}", layer).split("."))
    if not whole:
        return None
    share = value / whole
    return 100 * column.scale * (1 - share if column.removed_from else share)


def _at(value: Any, path: Sequence[str]) -> Any:
    """Return the number at a path, summed over patterns; or whatever lies there."""
    if path and isinstance(value, list):
        value = dict(zip(map(str, range(len(value))), value, strict=True))
    if not path or not isinstance(value, Mapping):
        return None if path else value
    if path[0] in value or not set("*?|") & set(path[0]):
        return _at(value.get(path[0]), path[1:])
    patterns = path[0].split("|")
    found = [_at(each, path[1:]) for key, each in value.items() if any(fnmatchcase(key, p) for p in patterns)]
    return sum(number for number in found if number is not None) if found else None


def _ours(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    if len(known) == 1:
        return _cell(known[0])
    return f"{_cell(float(np.mean(known)))} ± {np.std(known, ddof=1):.2f}"


def _cell(value: str | int | float | None) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    if isinstance(value, int) or (value.is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:.3f}".rstrip("0").rstrip(".") if abs(value) < 10 else f"{value:.2f}"


def _agrees(ours: Sequence[float | None], published: Any, column: Column) -> bool | None:
    known = [value for value in ours if value is not None]
    if not known or column.tolerance is None or published is None:
        return None
    try:
        theirs = Decimal(str(published))
    except InvalidOperation:
        return None
    tolerance = column.tolerance
    if tolerance == "printed":
        tolerance = 0.5 * 10.0 ** int(theirs.as_tuple().exponent)
    difference = float(np.mean(known)) - float(theirs)
    return difference >= -tolerance - 1e-9 and (column.at_least or difference <= tolerance + 1e-9)


def _write(target: Path, text: str) -> None:
    if target.is_file() and _without_maker(target.read_text()) == _without_maker(text):
        return
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text(text)
    partial.replace(target)


def _without_maker(page: str) -> str:
    """Return a page without the lines that say which program made it, where and when."""
    return re.sub(r"(?m)^- (commit|versions|machine|date|made earlier): .*\n", "", page)
