"""How many threads a job may use when a launcher runs several at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any


def worker_threads(launcher: Mapping[str, Any], cores: int) -> int | None:
    """Return the threads of each job under a Hydra launcher; None: it runs one job at a time, on all cores.

    Args:
        launcher: ``hydra.launcher``.
        cores: those of this machine.
    """
    name = str(launcher.get("_target_", "")).rpartition(".")[2]
    if name == "JoblibLauncher":
        wanted = int(launcher.get("n_jobs") or 1)
        # -1: all cores; -2: all but one.
        workers = wanted if wanted > 0 else max(1, cores + 1 + wanted)
        return max(1, cores // workers)
    if name in ("LocalLauncher", "SlurmLauncher"):
        tasks = launcher.get("cpus_per_task")
        return int(tasks) if tasks else None
    if name == "RayLauncher":
        remote = (launcher.get("ray") or {}).get("remote") or {}
        return max(1, int(remote.get("num_cpus") or 1))
    return None


def available_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_threads(launcher: Mapping[str, Any]) -> None:
    """Let TensorFlow, and what it calls, use no more threads than this job's share; called before the first operation.

    What the environment says (``TF_NUM_INTRAOP_THREADS``) wins.
    """
    threads = worker_threads(launcher, available_cores())
    if threads is None or "TF_NUM_INTRAOP_THREADS" in os.environ:
        return
    import tensorflow as tf

    if tf.config.threading.get_intra_op_parallelism_threads() != threads:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
