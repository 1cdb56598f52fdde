"""The replicas that share each batch of a training, and what they tell one another.

Weights are plain variables: each process has one copy of them. The replicas of all processes compute the gradients of
their own rows of the batch and add them up; then every process makes the same update once. So whatever holds variables
of a model (projections, quantizers, terms of the loss) needs to know nothing of it. ``tf.distribute``'s own variables
would not be those that a strategy has taken hold of before the training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from compress.batches import Part
from compress.errors import CompressError


@dataclass(frozen=True)
class Distribution:
    """Who computes a training step. As it is by default: this process alone, on one device."""

    strategy: Any = None
    """The ``tf.distribute.Strategy``; None: there is none."""
    worker: int = 0
    """Number of this process among the workers; 0 is the chief, who leaves the results."""
    workers: int = 1

    @property
    def replicas(self) -> int:
        """How many devices, of all workers together, share a batch."""
        return 1 if self.strategy is None else int(self.strategy.num_replicas_in_sync)

    @property
    def divided(self) -> bool:
        """Whether a batch is shared at all."""
        return self.replicas > 1

    @property
    def chief(self) -> bool:
        """Whether this process leaves the results."""
        return self.worker == 0

    @property
    def identity(self) -> tuple[Any, ...]:
        """What a training's outcome depends on, for the keys of a cache; nothing, unless batches are shared."""
        return ("replicas", self.replicas) if self.divided else ()

    def require_divisible(self, batch_size: int, samples: int, key: str) -> None:
        """Refuse a batch that cannot be divided.

        Args:
            batch_size: samples of a step, of all replicas together.
            samples: all that there are; a batch is not larger.
            key: the configuration key of the batch size.

        Raises:
            CompressError: naming the nearest size that can.
        """
        size, unit = min(batch_size, samples), 2 * self.replicas
        if not self.divided or not size % unit:
            return
        nearest = min(max(1, round(size / unit)), samples // unit) * unit
        raise CompressError(
            key,
            expected=f"a multiple of {unit}: {self.replicas} replicas share a batch, each has as many samples of its "
            "first half as of its second",
            received=f"{size}" + (f" (all samples; {batch_size} was asked for)" if size < batch_size else ""),
            fix=f"Write {key}={nearest}." if nearest else f"Use fewer replicas: there are {samples} samples.",
        )

    def part(self, batch_size: int) -> Part | None:
        """Return, inside a replica, which rows of the batch are its own; None: all."""
        if not self.divided:
            return None
        return Part(batch_size, tf.gather(_rows(batch_size, self.replicas), _context().replica_id_in_sync_group))

    def share(self, loss: tf.Tensor) -> tf.Tensor:
        """Return what a replica's mean adds to the mean over the whole batch."""
        return loss / self.replicas if self.divided else loss

    def batches(self, make: Callable[[np.ndarray], tf.data.Dataset], batch_size: int) -> Any:
        """Return the batches, divided.

        Args:
            make: given the rows [n, samples] of n replicas, returns their parts of every batch, in turn.
            batch_size: samples of a step, of all replicas together.
        """
        rows = _rows(batch_size, self.replicas)

        def own(context: tf.distribute.InputContext) -> tf.data.Dataset:
            local = context.num_replicas_in_sync // context.num_input_pipelines
            first = context.input_pipeline_id * local
            return make(rows[first : first + local])

        return self.strategy.distribute_datasets_from_function(own)

    def summed(self, function: Callable[[Any], Sequence[tf.Tensor | None]], data: Any) -> list[tf.Tensor | None]:
        """Run the function in every replica, on its own part of the batch; return the sums of what it returns.

        Where it returns None it must do so in each.
        """

        def run(own: Any) -> list[tf.Tensor | None]:
            values = function(own)
            # Only what was computed here is placed on the replica's device; a collective asks where that is.
            present = [tf.identity(tf.convert_to_tensor(value)) for value in values if value is not None]
            sums = iter(_context().all_reduce(tf.distribute.ReduceOp.SUM, present))
            return [None if value is None else next(sums) for value in values]

        found = self.strategy.run(run, args=(data,))
        return [None if value is None else self.strategy.experimental_local_results(value)[0] for value in found]

    def require_same(self, variables: Sequence[tf.Variable], settings: Sequence[Any], where: str) -> None:
        """Compare what the workers are about to train.

        Args:
            variables: those of the model, and of what is trained with it.
            settings: what else decides the training.
            where: which training.

        Raises:
            CompressError: in every worker, if they differ.
        """
        if self.workers == 1:
            return
        shapes = [(variable.shape.as_list(), variable.dtype.name) for variable in variables]
        digest = hashlib.sha256(repr((where, shapes, settings)).encode())
        for variable in variables:
            digest.update(np.ascontiguousarray(variable.numpy()).data)
        rows = self._gathered(np.frombuffer(digest.digest(), np.int64))
        others = sorted({int(number) for number in np.flatnonzero((rows != rows[0]).any(axis=1))})
        if others:
            raise CompressError(
                where,
                expected="the same model, settings and data on every worker",
                received=f"others on replica {', '.join(map(str, others))} than on replica 0: their settings or data "
                "differ, or an earlier stage came out differently",
                fix="Start all workers with the same command and data, on machines of one kind; a stage that measures "
                "time (latency=...) decides differently on each: make it in a run of its own.",
            )

    def adopt_chief(self, variables: Sequence[tf.Variable]) -> None:
        """Give all workers the values that the chief's variables have, to the last bit.

        Updates are the same on all of them, but some operations on a GPU add up in no fixed order.
        """
        if self.workers == 1:
            return
        floats = [variable for variable in variables if variable.dtype.is_floating]

        def own(_: Any) -> list[tf.Tensor]:
            first = tf.equal(_context().replica_id_in_sync_group, 0)
            return [tf.cast(first, variable.dtype) * variable for variable in floats]

        sums = tf.function(lambda: self.summed(own, None))
        for variable, value in zip(floats, sums(), strict=True):
            variable.assign(value)

    def wait(self) -> None:
        """Wait until all workers have come here: one that left early would look like one that died."""
        if self.workers > 1:
            self._gathered(np.zeros(1, np.int64))

    @contextmanager
    def watched(self, where: str) -> Iterator[None]:
        """Have a worker that is gone told as one.

        Raises:
            CompressError: in the place of TensorFlow's error.
        """
        try:
            yield
        except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.DeadlineExceededError) as error:
            if self.workers == 1:
                raise
            raise self._gone(where, error) from error
        except tf.errors.InternalError as error:
            if self.workers == 1 or "ollective" not in str(error):
                raise
            raise self._gone(where, error) from error

    def _gone(self, where: str, error: Exception) -> CompressError:
        return CompressError(
            where,
            expected=f"answers of all {self.workers} workers",
            received=f"none ({type(error).__name__}): one has stopped, or cannot be reached any more",
            fix="Look at the other workers' output for why one has stopped, and start all of them again.",
        )

    def _gathered(self, row: np.ndarray) -> np.ndarray:
        """Return the rows of all replicas [replicas, n], those of a worker's replicas being its own."""
        with self.watched("distribution"):
            # Replicas read a constant of their own; gathering asks for one.
            each = self.strategy.experimental_distribute_values_from_function(lambda _: tf.constant(row[None]))
            return np.asarray(self.strategy.gather(each, axis=0))


SINGLE = Distribution()


def _rows(batch_size: int, replicas: int) -> np.ndarray:
    """Return the rows of a batch that each replica computes [replicas, rows].

    A sample is mixed with the one that is as far from the batch's other end. Both are in the same replica, there as far
    from the ends, too.
    """
    half = np.arange(batch_size // 2).reshape(replicas, -1)
    return np.concatenate([half, batch_size - 1 - half[:, ::-1]], axis=1)


def _context() -> Any:
    return tf.distribute.get_replica_context()


def replica_number() -> int:
    """Return the number of the replica that is being traced, of all workers together; 0 where there is one alone."""
    return int(tf.get_static_value(_context().replica_id_in_sync_group))


def replicas_here() -> int:
    """Return how many share the batch of the step that is being traced."""
    return int(_context().num_replicas_in_sync)


def mean_over_replicas(value: tf.Tensor) -> tf.Tensor:
    """Return the mean of a value over the replicas: with gradients, inside a replica; itself where there is one."""
    return value if replicas_here() == 1 else _context().all_reduce(tf.distribute.ReduceOp.MEAN, value)
