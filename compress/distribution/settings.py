"""``conf/distribution``: on which devices, or machines, models are trained."""

from __future__ import annotations

import json
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import tensorflow as tf
from pydantic.dataclasses import dataclass

from compress.data.source import STRICT
from compress.distribution.replicas import SINGLE, Distribution
from compress.errors import CompressError

_LOG = logging.getLogger("compress")
_DEVICE = re.compile(r"(CPU|GPU):(\d{1,3})")


class DistributionSettings(ABC):
    """Who trains. Subclasses are frozen dataclasses whose fields are the configuration."""

    @abstractmethod
    def start(self) -> Distribution:
        """Prepare TensorFlow, which must not have run any operation yet, and return who trains.

        Raises:
            CompressError: if there are no such devices, or the other machines cannot be reached.
        """


@dataclass(frozen=True, config=STRICT)
class Single(DistributionSettings):
    """This process alone, on one device."""

    def start(self) -> Distribution:
        """Return it."""
        return SINGLE


@dataclass(frozen=True, config=STRICT)
class Mirrored(DistributionSettings):
    """Several devices of this machine.

    Attributes:
        devices: such as ``GPU:0``; None: all GPUs. ``CPU:0``, ``CPU:1`` divide the processor: good for trying it out.
    """

    devices: tuple[str, ...] | None = None

    def start(self) -> Distribution:
        """Return the devices as replicas."""
        where = "distribution.devices"
        gpus = [f"GPU:{number}" for number in range(len(tf.config.list_physical_devices("GPU")))]
        wanted = gpus if self.devices is None else list(self.devices)
        there = f"there {'is' if len(gpus) == 1 else 'are'} {', '.join(gpus) or 'no GPU'}"
        parsed = [_DEVICE.fullmatch(name) for name in wanted]
        kinds = {match[1] for match in parsed if match}
        if len(wanted) < 2 or len(set(wanted)) < len(wanted) or None in parsed or len(kinds) > 1:
            raise CompressError(
                where,
                expected="two different devices or more, all GPUs or all parts of the CPU",
                received=f"{'all GPUs' if self.devices is None else ', '.join(wanted) or 'none'}; {there}",
                fix="Write distribution=none for one device; '[CPU:0,CPU:1]' divides the processor.",
            )
        missing = [name for name in wanted if name.startswith("GPU") and name not in gpus]
        if missing:
            raise CompressError(
                where, expected="GPUs that are there", received=f"{', '.join(missing)}; {there}", fix="Name those."
            )
        if kinds == {"CPU"}:
            _divide_processor(1 + max(int(match[2]) for match in parsed if match), where)
        return Distribution(tf.distribute.MirroredStrategy(wanted))


@dataclass(frozen=True, config=STRICT)
class MultiWorker(DistributionSettings):
    """Several machines, or processes, each with all of its GPUs; the same command is started on every one.

    Attributes:
        cluster: who says which machines: the environment variable ``TF_CONFIG``, or SLURM.
    """

    cluster: Literal["tf_config", "slurm"] = "tf_config"

    def start(self) -> Distribution:
        """Wait for the other workers, and return this one."""
        resolver, worker, addresses = _tf_config() if self.cluster == "tf_config" else _slurm()
        _LOG.info("worker %d of %d, %s: waiting for all", worker, len(addresses), addresses[worker])
        try:
            strategy = tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)
        except (RuntimeError, ValueError, tf.errors.OpError) as error:
            raise CompressError(
                "distribution",
                expected=f"an answer of each worker ({', '.join(addresses)}), at the start of the program",
                received=(str(error).splitlines() or [type(error).__name__])[0][:300],
                fix="Start the same command on each, one run in each process, with a free port.",
            ) from error
        return Distribution(strategy, worker, len(addresses))


def _divide_processor(parts: int, where: str) -> None:
    (processor,) = tf.config.list_physical_devices("CPU")
    if len(tf.config.get_logical_device_configuration(processor) or [None]) >= parts:
        return
    try:
        tf.config.set_logical_device_configuration(processor, [tf.config.LogicalDeviceConfiguration()] * parts)
    except RuntimeError as error:
        raise CompressError(
            where,
            expected="parts of the CPU that are set before anything runs",
            received=f"{parts} in a process that runs already",
            fix="Have the first run of the process ask for as many, or start one process for each.",
        ) from error


def _tf_config() -> tuple[Any, int, list[str]]:
    """Return the resolver, the number of this worker, and the addresses of all."""
    where = "TF_CONFIG"
    text = os.environ.get(where)
    example = (
        """Write TF_CONFIG='{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", """
        """"index": 0}}' before the command, with index 1 on host2."""
    )
    if not text:
        raise CompressError(where, expected="the environment variable with all workers", received="none", fix=example)
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise CompressError(where, expected="JSON", received=f"{text[:120]} ({error})", fix=example) from error
    parts = given if isinstance(given, Mapping) else {}
    cluster, task = parts.get("cluster"), parts.get("task")
    addresses = _addresses(cluster)
    if not addresses or not isinstance(task, Mapping) or not isinstance(cluster, Mapping):
        raise CompressError(
            where,
            expected="a cluster of workers (and perhaps a chief), each host:port, and the task of this one",
            received=text[:200],
            fix=example,
        )
    kind, index = task.get("type"), task.get("index")
    own = cluster.get(kind) if kind in ("chief", "worker") else None
    if own is None or isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(own):
        raise CompressError(
            f"{where}, task",
            expected=f"one of the {len(addresses)} tasks of the cluster, counted from index 0",
            received=json.dumps(task)[:200],
            fix=example,
        )
    before = len(cluster.get("chief", ())) if kind == "worker" else 0
    return tf.distribute.cluster_resolver.TFConfigClusterResolver(), before + index, addresses


def _addresses(cluster: Any) -> list[str]:
    """Return the addresses of chief and workers, in order; none if it is no such cluster."""
    if not isinstance(cluster, Mapping) or not set(cluster) <= {"chief", "worker"}:
        return []
    lists = [cluster.get(kind, []) for kind in ("chief", "worker")]
    if not all(isinstance(items, Sequence) and not isinstance(items, str) for items in lists) or len(lists[0]) > 1:
        return []
    every = [*lists[0], *lists[1]]
    # A port of 0 is one that the others cannot know.
    fits = all(isinstance(address, str) and re.fullmatch(r"\S+:[1-9]\d{0,4}", address) for address in every)
    return every if fits and len(set(every)) == len(every) else []


def _slurm() -> tuple[Any, int, list[str]]:
    """Return the same of the tasks of a SLURM step."""
    try:
        resolver = tf.distribute.cluster_resolver.SlurmClusterResolver()
        cluster = resolver.cluster_spec().as_dict()
        _, index = resolver.get_task_info()
    except (KeyError, RuntimeError, ValueError, OSError) as error:
        raise CompressError(
            "distribution.cluster",
            expected="a step of a SLURM job, which has SLURM_PROCID and SLURM_STEP_NODELIST in its environment",
            received=f"{type(error).__name__}: {error}"[:300],
            fix="Start it with srun, for example: srun -N 2 --ntasks-per-node=1 python -m compress.run ..., or write "
            "distribution.cluster=tf_config.",
        ) from error
    return resolver, int(index), list(cluster["worker"])
