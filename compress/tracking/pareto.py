"""The Pareto front: what no other point beats in every objective; and how much the front dominates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from compress.errors import CompressError, did_you_mean
from compress.words import counted

DEFAULT_OBJECTIVES: tuple[tuple[str, ...], ...] = (("accuracy", "tflite_bytes"), ("accuracy", "latency_p50"))
_GAINS = ("accuracy", "accuracy_keras", "accuracy_delta", "speedup", "compression_rate")
"""Metrics that should be large, besides ``ratio.*``; all others should be small."""
_DIRECTIONS = {"max": True, "min": False}
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Objective:
    """A metric, and whether it should be large or small."""

    metric: str
    maximise: bool


@dataclass(frozen=True)
class Front:
    """Objectives whose non-dominated set is looked for."""

    objectives: tuple[Objective, ...]

    @property
    def name(self) -> str:
        """The objectives besides the accuracy: part of the names of tags and metrics."""
        return ".".join(o.metric for o in self.objectives if o.metric != "accuracy")

    @property
    def title(self) -> str:
        """The objectives, for people."""
        return " against ".join(o.metric for o in self.objectives)

    @property
    def maximise(self) -> list[bool]:
        """For each objective, whether it should be large."""
        return [o.maximise for o in self.objectives]


@dataclass(frozen=True)
class Estimate:
    """A number over the seeds: the mean, and half of its 95 % confidence interval (None: from one seed alone)."""

    mean: float
    half_width: float | None = None

    @property
    def text(self) -> str:
        """The number, for people."""
        if math.isnan(self.mean):
            return "-"
        return _short(self.mean) + (f" ± {_short(self.half_width)}" if self.half_width is not None else "")


@dataclass(frozen=True)
class FinishedRun:
    """A finished run of a sweep, as the store has it."""

    run: str
    strategy: str
    seed: str
    overrides: tuple[str, ...]
    """What the command line changed for it."""
    settings: Mapping[str, str]
    """Its configuration, flat."""
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Point:
    """What is compared: one configuration, run with one seed or several."""

    label: str
    runs: Mapping[str, str]
    """Run id -> its seed."""
    values: Mapping[str, Estimate]
    """Metric -> its value."""
    fronts: frozenset[str] = frozenset()
    """Names of the fronts that it is on."""


def read_fronts(objectives: Sequence[str | Sequence[str]], where: str) -> tuple[Front, ...]:
    """Return the fronts of a list of metrics (one front), or of a list of such lists.

    A metric may say which way is better: ``peak_memory_bytes:min``, ``board_same_class_percent:max``.

    Raises:
        CompressError: if one has less than two objectives, or two are the same.
    """
    parts = [item for item in objectives if not isinstance(item, str)]
    if len(parts) not in (0, len(objectives)):
        raise CompressError(
            where,
            expected="a list of metrics, or a list of such lists",
            received=f"{list(objectives)}",
            fix=f"Write for example '{where}=[accuracy,packed_bytes,latency_p50]'.",
        )
    names = [list(part) for part in parts] or [[str(item) for item in objectives]]
    fronts = tuple(Front(tuple(_objective(text, where) for text in part)) for part in names)
    for front in fronts:
        metrics = [o.metric for o in front.objectives]
        if len(metrics) < 2 or len(set(metrics)) < len(metrics):
            raise CompressError(
                where,
                expected="two or more metrics for each front, each of them once",
                received=", ".join(metrics) or "none",
                fix=f"Write for example '{where}=[accuracy,packed_bytes]'.",
            )
    if len({front.name for front in fronts}) < len(fronts):
        raise CompressError(
            where,
            expected="fronts that differ in what is compared with the accuracy",
            received="; ".join(front.title for front in fronts),
            fix="Take one of the equal ones out.",
        )
    return fronts


def require_reference(reference: Mapping[str, float], fronts: Sequence[Front], where: str) -> None:
    """Refuse a point to count hypervolumes from that is none: other metrics than the fronts', or no numbers.

    Raises:
        CompressError: naming the key.
    """
    metrics = {objective.metric for front in fronts for objective in front.objectives}
    for metric, value in reference.items():
        if metric not in metrics:
            raise CompressError(
                where,
                expected=f"values of the objectives ({', '.join(sorted(metrics))})",
                received=metric,
                fix=did_you_mean(metric, sorted(metrics)),
            )
        if not math.isfinite(value):
            raise CompressError(f"{where}.{metric}", expected="a number", received=str(value), fix="Correct it.")


def _objective(text: str, where: str) -> Objective:
    metric, sign, direction = text.partition(":")
    if not metric or (sign and direction not in _DIRECTIONS):
        raise CompressError(
            where,
            expected="the name of a metric, perhaps with :min or :max",
            received=text or "an empty name",
            fix=f"Write for example {metric or 'accuracy'}:max.",
        )
    return Objective(metric, _DIRECTIONS[direction] if sign else is_gain(metric))


def is_gain(metric: str) -> bool:
    """Say whether a metric should be large, by its name; a stage's own metrics are named ``<stage>.<metric>``."""
    return metric.startswith("ratio.") or metric.rpartition(".")[2] in _GAINS


def asked_or_reported(fronts: Sequence[Front], runs: Sequence[FinishedRun], where: str) -> tuple[Front, ...]:
    """Return the fronts; of the default ones, which nobody has asked for, those whose objectives some run reports."""
    if tuple(fronts) != read_fronts(DEFAULT_OBJECTIVES, where):
        return tuple(fronts)
    reported = {metric for run in runs for metric in run.metrics}
    return tuple(front for front in fronts if all(o.metric in reported for o in front.objectives))


def require_reported(fronts: Sequence[Front], runs: Sequence[FinishedRun], where: str) -> None:
    """Refuse an objective that no run reports.

    Raises:
        CompressError: naming the metrics nearest to it.
    """
    reported = {metric for run in runs for metric in run.metrics}
    for metric in (o.metric for front in fronts for o in front.objectives):
        if metric not in reported:
            raise CompressError(
                where,
                expected=f"a metric that at least one of {counted(len(runs), 'finished run')} reports",
                received=metric,
                fix=did_you_mean(metric, reported),
            )


def make_points(runs: Sequence[FinishedRun]) -> list[Point]:
    """Return the configurations that ran: runs that differ in nothing but the seed are one point."""
    groups: dict[tuple[tuple[str, str], ...], list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(_without_seed(run), []).append(run)
    members = list(groups.values())
    labels = _labels([group[0] for group in members])
    return [
        Point(label, {run.run: run.seed for run in group}, _estimates(group))
        for label, group in zip(labels, members, strict=True)
    ]


def _without_seed(run: FinishedRun) -> tuple[tuple[str, str], ...]:
    # What is no part of the pipeline does not make another point, either.
    other = ("seed", "debug", "tracking", "cache")
    return tuple(sorted((k, v) for k, v in run.settings.items() if k.partition(".")[0] not in other))


def _labels(runs: Sequence[FinishedRun]) -> list[str]:
    """Return for each run its pipeline and the overrides that not all of them have."""
    common = set.intersection(*(set(run.overrides) for run in runs)) if runs else set()

    def own(run: FinishedRun) -> list[str]:
        kept = (text for text in run.overrides if text not in common)
        return [text.removeprefix("strategy.") for text in kept if text.partition("=")[0] not in ("strategy", "seed")]

    return [" ".join([run.strategy, *own(run)]) for run in runs]


def _estimates(runs: Sequence[FinishedRun]) -> dict[str, Estimate]:
    found: dict[str, Estimate] = {}
    for metric in dict.fromkeys(metric for run in runs for metric in run.metrics):
        values = [run.metrics[metric] for run in runs if metric in run.metrics]
        found[metric] = estimate([value for value in values if math.isfinite(value)])
    return found


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of values and half of its 95 % confidence interval, by Student's t."""
    if len(values) < 2:
        return Estimate(values[0] if values else math.nan)
    from scipy.stats import t

    quantile = float(t.ppf(0.5 + _CONFIDENCE / 2, len(values) - 1))
    return Estimate(float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values)))


def matrix(points: Sequence[Point], objectives: Sequence[Objective]) -> np.ndarray:
    """Return the values of the points, shape [n, k]; NaN where a point has none."""
    none = Estimate(math.nan)
    rows = [[point.values.get(o.metric, none).mean for o in objectives] for point in points]
    return np.array(rows, float).reshape(len(points), len(objectives))


def on_fronts(points: Sequence[Point], fronts: Sequence[Front]) -> list[Point]:
    """Return the points with the names of the fronts that they are on."""
    masks = {front.name: non_dominated(matrix(points, front.objectives), front.maximise) for front in fronts}
    return [
        replace(point, fronts=frozenset(name for name, mask in masks.items() if mask[i]))
        for i, point in enumerate(points)
    ]


def non_dominated(values: np.ndarray, maximise: Sequence[bool]) -> np.ndarray:
    """Return a mask of the points that no other point dominates.

    A point dominates another if it is at least as good in all objectives and better in one. Equal points
    are all kept. Points with NaN are never on the front.

    Args:
        values: shape [n, objectives].
        maximise: for each objective, whether it should be large.
    """
    from moocore import is_nondominated

    values = np.asarray(values, float).reshape(-1, len(maximise))
    mask: np.ndarray = ~np.isnan(values).any(axis=1)
    if mask.any():
        mask[mask] = is_nondominated(values[mask], maximise=list(maximise), keep_weakly=True)
    return mask


@dataclass(frozen=True)
class Scale:
    """How a front's hypervolume is counted: from ``reference``, in units of ``unit``, metric by metric."""

    reference: Mapping[str, float]
    unit: Mapping[str, float]


def make_scale(front: Front, runs: Iterable[FinishedRun], given: Mapping[str, float]) -> Scale:
    """Return the reference point and the units of a front's hypervolume.

    The reference is the baseline (the model before compression) in what should be small, and zero in what should be
    large; the units are the baseline's values. So 1 stands for the baseline's accuracy at no cost, and sweeps of one
    model can be compared. Where runs have different baselines, the largest value counts. A metric that the baseline
    does not have is counted from the worst value of all runs, in units of the largest.

    Args:
        front: the objectives.
        runs: the finished runs of all sweeps that are to be compared.
        given: metric -> a value to count from instead.
    """
    known = list(runs)
    reference: dict[str, float] = {}
    unit: dict[str, float] = {}
    for objective in front.objectives:
        metric = objective.metric
        values = _finite(run.metrics.get(metric) for run in known)
        baseline = _finite(run.metrics.get(f"baseline.{metric}") for run in known)
        if baseline and max(baseline) > 0:
            reference[metric] = 0.0 if objective.maximise else max(baseline)
            unit[metric] = max(baseline)
        else:
            worst = (min if objective.maximise else max)(values, default=math.nan)
            reference[metric], unit[metric] = worst, max(map(abs, values), default=0.0) or 1.0
        reference[metric] = given.get(metric, reference[metric])
    return Scale(reference, unit)


def _finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def hypervolume(values: np.ndarray, front: Front, scale: Scale) -> float:
    """Return the volume that the points dominate, counted from the reference point, in its units.

    A point that is not better than the reference in every objective counts for nothing.

    Args:
        values: shape [n, objectives].
        front: the objectives.
        scale: where to count from, and in what units.
    """
    from moocore import hypervolume as volume

    metrics = [o.metric for o in front.objectives]
    units = np.array([scale.unit[metric] for metric in metrics])
    # All are minimised, from here on.
    signs = np.where(front.maximise, -1.0, 1.0) / units
    reference = np.array([scale.reference[metric] for metric in metrics]) * signs
    scaled = np.asarray(values, float).reshape(-1, len(metrics)) * signs
    scaled = scaled[np.isfinite(scaled).all(axis=1)]
    return float(volume(scaled, ref=reference)) if len(scaled) else 0.0


def _short(value: float) -> str:
    """Return a number with at least four digits that mean something."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4g}"
