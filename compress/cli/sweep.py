"""What happens around a multirun: a parent run before the jobs; the Pareto fronts and the failed jobs after them."""

from __future__ import annotations

import atexit
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from compress.cli.failures import clear_failures, exit_code, print_failures, read_failures
from compress.errors import USER_ERROR, CompressError, paragraph

if TYPE_CHECKING:
    from compress.tracking.store import TrackingSettings
    from compress.tracking.sweeps import Summary

_LOG = logging.getLogger("compress")


class SweepCallback(Callback):
    """Hydra callback of the multirun."""

    _close: Callable[[], object]
    _settings: TrackingSettings

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Open the parent run; refuse a store that does not answer before any job starts."""
        clear_failures(Path(config.hydra.sweep.dir))
        if not config.tracking.enabled:
            return
        from compress.tracking.pareto import read_fronts
        from compress.tracking.store import close_orphans, connect, start_parent, write_parent
        from compress.tracking.sweeps import OBJECTIVES_KEY, finish_sweep

        try:
            self._settings = _read_settings(config)
            read_fronts(self._settings.objectives, OBJECTIVES_KEY)
            client, experiment = connect(self._settings.uri, self._settings.experiment)
        except CompressError as error:
            # Hydra turns a callback's exceptions into warnings, and every job would fail in its turn.
            print(paragraph(error), file=sys.stderr)
            sys.exit(USER_ERROR)
        close_orphans(client, experiment)
        parent = start_parent(client, experiment, "multirun", sys.argv[1:])
        write_parent(Path(config.hydra.sweep.dir), parent)
        # Hydra does not call on_multirun_end after a mistake in a later job's overrides, or Ctrl-C.
        self._close = partial(finish_sweep, client, experiment, parent, self._settings, stopped=True)
        atexit.register(self._close)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Compute and log the Pareto fronts, close the parent run; say which jobs failed, and exit if some did."""
        missing = self._finish(config) if config.tracking.enabled else None
        failures = read_failures(Path(config.hydra.sweep.dir))
        print_failures(failures)
        if missing is not None:
            print(paragraph(missing), file=sys.stderr)
        code = max(exit_code(failures), USER_ERROR if missing is not None else 0)
        if code:
            sys.exit(code)

    def _finish(self, config: DictConfig) -> CompressError | None:
        from compress.tracking.store import connect, read_parent
        from compress.tracking.sweeps import finish_sweep

        parent = read_parent(Path(config.hydra.sweep.dir))
        if parent is None:
            return None
        atexit.unregister(self._close)
        client, experiment = connect(self._settings.uri, self._settings.experiment)
        summary = finish_sweep(client, experiment, parent, self._settings)
        _log_summary(summary)
        return summary.missing


def _log_summary(summary: Summary) -> None:
    for point in summary.points:
        _LOG.info("%s: %s", point.label, f"on {' and '.join(sorted(point.fronts))}" if point.fronts else "dominated")
    for name, volume in summary.hypervolumes.items():
        _LOG.info("hypervolume of the front of %s: %.4f", name, volume)


def _read_settings(config: DictConfig) -> TrackingSettings:
    from pydantic import TypeAdapter, ValidationError

    from compress.tracking.store import TrackingSettings

    try:
        settings: TrackingSettings = TypeAdapter(TrackingSettings).validate_python(
            OmegaConf.to_container(config.tracking, resolve=True)
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise CompressError(
            ".".join(["tracking", *map(str, first["loc"])]),
            expected=str(first["msg"]),
            received=repr(first["input"])[:200],
            fix="See conf/tracking/mlflow.yaml.",
        ) from error
    return settings
