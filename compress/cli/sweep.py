"""What happens around a multirun: a parent run before the jobs; the Pareto fronts and the failed jobs after them."""

from __future__ import annotations

import atexit
import logging
import sys
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, flag_override

from compress.cli.errors import guarded
from compress.cli.failures import clear_failures, exit_code, print_failures, read_failures
from compress.errors import CompressError
from compress.pipeline.folder import alone_in

if TYPE_CHECKING:
    from compress.tracking.store import Store, TrackingSettings
    from compress.tracking.sweeps import Summary

T = TypeVar("T")
_LOG = logging.getLogger("compress")
_DEFECT = 1
_MULTI_WORKER = "compress.distribution.settings.MultiWorker"
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

    _leave: Callable[[], object] | None = None
    _close: Callable[..., Summary | None]
    _stop: Callable[[], object]

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Take the folder before Hydra writes into it; refuse one that another command is working in."""
        if OmegaConf.select(config, "distribution._target_") != _MULTI_WORKER:
            # The workers of one training have one folder, and folders of their own in it.
            self._take(Path(config.hydra.run.dir), "hydra.run.dir")

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Let the folder go."""
        self._let_go()

    def _take(self, folder: Path, key: str) -> None:
        held = ExitStack()
        # A command that a mistake ends is not told to on_run_end or on_multirun_end.
        self._leave = weakref.finalize(self, held.close)
        _or_exit(lambda: held.enter_context(alone_in(folder, key)), "the folder could not be taken")

    def _let_go(self) -> None:
        if self._leave is not None:
            self._leave()

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Take the folder; open the parent run; refuse a store that does not answer before any job starts."""
        self._take(Path(config.hydra.sweep.dir), "hydra.sweep.dir")
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
        from compress.tracking.names import require_known
        from compress.tracking.pareto import read_fronts, require_reference
        from compress.tracking.store import Store, close_orphans, forget_parent, start_parent, write_parent
        from compress.tracking.sweeps import OBJECTIVES_KEY

        def open_parent() -> tuple[TrackingSettings, Store, str]:
            settings = _read_settings(config)
            fronts = read_fronts(settings.objectives, OBJECTIVES_KEY)
            require_known(fronts, OBJECTIVES_KEY, recorded=True)
            require_reference(settings.reference or {}, fronts, "tracking.reference")
            store = Store(settings.uri, settings.experiment)
            require_folder(Path(settings.unsent))
            store.reach()
            deliver(Path(settings.unsent), store)
            store.ask(close_orphans)
            return settings, store, start_parent(store, "multirun", sys.argv[1:])

        try:
            settings, store, parent = _or_exit(open_parent, "the multirun could not be opened in MLflow")
        except SystemExit:
            self._let_go()
            raise
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
            self._let_go()
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


def _or_exit(body: Callable[[], T], defect: str) -> T:
    """Return what ``body`` returns; end the program where it fails.

    Hydra turns a callback's exceptions into warnings, and every job would fail in its turn.
    """
    try:
        return body()
    except Exception as error:
        try:
            sys.exit(guarded(partial(_raise, error), sys.argv[1:]))
        except Exception:
            _LOG.exception("a defect: %s", defect)
            sys.exit(_DEFECT)


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
