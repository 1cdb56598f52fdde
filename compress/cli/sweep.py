"""What happens around a multirun: a parent run before the jobs, the Pareto front after them."""

from __future__ import annotations

import atexit
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from compress.errors import USER_ERROR, CompressError, paragraph

_LOG = logging.getLogger("compress")


class SweepCallback(Callback):
    """Hydra callback of the multirun."""

    _close: Callable[[], object]

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Open the parent run; refuse a store that does not answer before any job starts."""
        if not config.tracking.enabled:
            return
        from compress.tracking.store import connect, finish_sweep, start_parent, write_parent

        try:
            client, experiment = connect(str(config.tracking.uri), str(config.tracking.experiment))
        except CompressError as error:
            # Hydra turns a callback's exceptions into warnings, and every job would fail in its turn.
            print(paragraph(error), file=sys.stderr)
            sys.exit(USER_ERROR)
        parent = start_parent(client, experiment, "multirun", sys.argv[1:])
        write_parent(Path(config.hydra.sweep.dir), parent)
        # Hydra does not call on_multirun_end after a mistake in a later job's overrides, or Ctrl-C.
        self._close = partial(finish_sweep, client, experiment, parent, stopped=True)
        atexit.register(self._close)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Compute and log the Pareto front, close the parent run."""
        if not config.tracking.enabled:
            return
        from compress.tracking.store import connect, finish_sweep, read_parent

        parent = read_parent(Path(config.hydra.sweep.dir))
        if parent is None:
            return
        atexit.unregister(self._close)
        client, experiment = connect(config.tracking.uri, config.tracking.experiment)
        points = finish_sweep(client, experiment, parent)
        for point in sorted(points, key=lambda p: p.tflite_bytes):
            fronts = [key for key, on_front in point.pareto.items() if on_front]
            _LOG.info("%s: %s", point.label, f"on the front of {' and '.join(fronts)}" if fronts else "dominated")
