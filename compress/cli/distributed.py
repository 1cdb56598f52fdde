"""Who trains, from the configuration: started before anything else, and who of several workers leaves what."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.cli.construct import construct
from compress.distribution.replicas import Distribution
from compress.distribution.settings import DistributionSettings, MultiWorker, Single
from compress.errors import CompressError


def start_distribution(plain: Mapping[str, Any], sweep: Path | None) -> Distribution:
    """Return who trains. Must come before TensorFlow's first operation in this process.

    Args:
        plain: the composed configuration.
        sweep: the folder of the multirun that the job belongs to, if any.

    Raises:
        CompressError: if the settings are not valid, or the devices or workers not there.
    """
    given = plain.get("distribution")
    if not isinstance(given, Mapping):
        # Told when the whole configuration is checked.
        return Single().start()
    settings = construct(DistributionSettings, given, "distribution")
    if isinstance(settings, MultiWorker):
        _refuse_what_parts_workers(plain, sweep)
    return settings.start()


def folder_of(distribution: Distribution, folder: Path) -> Path:
    """Return where a worker's files go: a folder of its own inside ``folder``, unless it is the chief."""
    if distribution.chief:
        return folder
    own = folder / f"worker{distribution.worker}"
    own.mkdir(parents=True, exist_ok=True)
    return own


def _refuse_what_parts_workers(plain: Mapping[str, Any], sweep: Path | None) -> None:
    cache = plain.get("cache")
    if isinstance(cache, Mapping) and cache.get("enabled"):
        raise CompressError(
            "cache",
            expected="off with distribution=multi_worker: a worker that finds a stage in its cache would leave the "
            "others waiting in its training",
            received="on",
            fix="Write cache=off.",
        )
    if sweep is not None:
        raise CompressError(
            "distribution",
            expected="one job with distribution=multi_worker: workers meet once, at the start of their processes",
            received="a multirun",
            fix="Start each job by a command of its own on every worker.",
        )
