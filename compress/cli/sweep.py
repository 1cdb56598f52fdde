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
from omegaconf import DictConfig, OmegaConf, flag_override

from compress.cli.errors import guarded
from compress.cli.failures import clear_failures, exit_code, print_failures, read_failures
from compress.errors import CompressError

if TYPE_CHECKING:
    from compress.tracking.store import TrackingSettings
    from compress.tracking.sweeps import Summary

_LOG = logging.getLogger("compress")
_DEFECT = 1
_BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
_JOBLIB = "hydra_plugins.hydra_joblib_launcher.joblib_launcher"
_SUBMITIT = "hydra_plugins.hydra_submitit_launcher.submitit_launcher"
_OWN_LAUNCHERS = {
    f"{_JOBLIB}.JoblibLauncher": "hydra_plugins.compress_joblib.JoblibLauncher",
    f"{_SUBMITIT}.LocalLauncher": "hydra_plugins.compress_submitit.LocalLauncher",
    f"{_SUBMITIT}.SlurmLauncher": "hydra_plugins.compress_submitit.SlurmLauncher",
}


class SweepCallback(Callback):
    """Hydra callback of the multirun."""

    _close: Callable[..., Summary | None]
    _stop: Callable[[], object]

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Open the parent run; refuse a store that does not answer before any job starts."""
        clear_failures(Path(config.hydra.sweep.dir))
        own = _OWN_LAUNCHERS.get(config.hydra.launcher._target_)
        if own is not None:
            # Hydra takes one choice of this name, the plugin's; but for this it would end with the first dead process.
            with flag_override(config, ["readonly", "struct"], False):
                config.hydra.launcher._target_ = own
        if not config.tracking.enabled:
            return
        from compress.tracking.delivery import deliver, end_sweep
        from compress.tracking.journal import require_folder
        from compress.tracking.pareto import read_fronts, require_reference
        from compress.tracking.store import Store, close_orphans, forget_parent, start_parent, write_parent
        from compress.tracking.sweeps import OBJECTIVES_KEY

        try:
            settings = _read_settings(config)
            fronts = read_fronts(settings.objectives, OBJECTIVES_KEY)
            require_reference(settings.reference or {}, fronts, "tracking.reference")
            store = Store(settings.uri, settings.experiment)
            require_folder(Path(settings.unsent))
            store.reach()
            deliver(Path(settings.unsent), store)
            store.ask(close_orphans)
            parent = start_parent(store, "multirun", sys.argv[1:])
        except Exception as error:
            # Hydra turns a callback's exceptions into warnings, and every job would fail in its turn.
            try:
                sys.exit(guarded(partial(_raise, error), sys.argv[1:]))
            except Exception:
                _LOG.exception("a defect: the multirun could not be opened in MLflow")
                sys.exit(_DEFECT)
        sweep = Path(config.hydra.sweep.dir)
        write_parent(sweep, parent)
        self._close = partial(end_sweep, store, parent, settings)
        # Hydra does not call on_multirun_end after a mistake in a later job's overrides, or Ctrl-C.
        in_turn = config.hydra.launcher._target_ == _BASIC

        def stop() -> None:
            summary = self._close(stopped=True, in_turn=in_turn)
            if summary is not None and not summary.begun:
                forget_parent(sweep)

        self._stop = stop
        atexit.register(self._stop)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Compute and log the Pareto fronts, close the parent run; say which jobs failed, and exit if some did."""
        failures = read_failures(Path(config.hydra.sweep.dir))
        code = 0
        try:
            if config.tracking.enabled:
                code = guarded(self._finish, sys.argv[1:])
        except Exception:
            # Hydra would make a warning of it.
            _LOG.exception("a defect: the multirun could not be closed in MLflow")
            code = _DEFECT
        finally:
            print_failures(failures)
        code = max(exit_code(failures), code)
        if code:
            sys.exit(code)

    def _finish(self) -> list[CompressError]:
        atexit.unregister(self._stop)
        summary = self._close(stopped=False)
        if summary is None:
            return []
        _log_summary(summary)
        return [] if summary.missing is None else [summary.missing]


def _raise(error: Exception) -> list[CompressError]:
    raise error


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
            expected=str(first["msg"]).removeprefix("Input should be "),
            received=repr(first["input"])[:200],
            fix="See conf/tracking/mlflow.yaml.",
        ) from error
    return settings
