"""The state of an unfinished training: what it takes to go on, to the last bit, as if it had not been stopped.

Batches, augmentation and mixing are functions of the seed and the step; :func:`draws_by_step` makes dropout one, too.
So the state is the step and the variables that the compiled training step uses, whoever owns them: weights, the
optimiser's, those of loss terms, masks of a pruning schedule, scales of a quantizer.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import tensorflow as tf
import tf_keras

from compress.distribution.replicas import replica_number, replicas_here


class Checkpoint(Protocol):
    """Where one training leaves its state."""

    seconds: float
    """It is left at the ends of epochs, but not more often than this."""

    def load(self, identity: str) -> Mapping[str, np.ndarray] | None:
        """Return the arrays that were saved under ``identity``; None if there are none, or others."""

    def save(self, identity: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep the arrays in the place of any before, all of them or none."""


class Resumable(tf_keras.callbacks.Callback):
    """A training that leaves its state, and finds it again.

    Args:
        model: the compiled model under training.
        batches: what it is trained on.
        checkpoint: where the state is left.
        settings: what decides the training besides the variables' values at its start.
        steps: all of them.
        epoch: steps of an epoch.
    """

    def __init__(
        self,
        model: tf_keras.Model,
        batches: tf.data.Dataset,
        checkpoint: Checkpoint,
        settings: Sequence[Any],
        *,
        steps: int,
        epoch: int,
    ) -> None:
        super().__init__()
        self._started = time.monotonic()
        self._checkpoint, self._steps, self._epoch = checkpoint, steps, epoch
        self._variables = _step_variables(model, batches)
        digest = hashlib.sha256(repr(list(settings)).encode())
        for variable in self._variables:
            digest.update(np.ascontiguousarray(variable.numpy()).tobytes())
        self._identity = digest.hexdigest()
        self._saved = time.monotonic()
        self._supports_tf_logs = True
        self.done = 0
        """Steps that were made before."""
        self.seconds = 0.0
        """That these took."""
        self.loss = float("nan")
        self._restore()

    def _restore(self) -> None:
        found = self._checkpoint.load(self._identity)
        if found is None:
            return
        for index, variable in enumerate(self._variables):
            variable.assign(found[f"variable{index}"])
        self.done, self.loss = int(found["step"]), float(found["loss"])
        self.seconds = float(found["seconds"])

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Leave the state where an epoch has ended."""
        step = self.done + batch + 1
        at_end = step == self._steps
        if (step % self._epoch and not at_end) or time.monotonic() - self._saved < self._checkpoint.seconds:
            return
        arrays = {f"variable{index}": variable.numpy() for index, variable in enumerate(self._variables)}
        loss = float((logs or {}).get("loss", np.nan))
        seconds = self.seconds + time.monotonic() - self._started
        numbers = {"step": step, "loss": loss, "seconds": seconds}
        arrays |= {name: np.array(number) for name, number in numbers.items()}
        self._checkpoint.save(self._identity, arrays)
        self._saved = time.monotonic()


def _step_variables(model: tf_keras.Model, batches: tf.data.Dataset) -> list[tf.Variable]:
    """Return the variables that the training step reads or writes, in the order of their use."""
    # ``fit`` finds this very trace again.
    step = model.make_train_function().get_concrete_function(iter(batches.take(0)))
    by_handle = {id(variable.handle): variable for variable in step.graph.variables}
    return [by_handle[id(captured)] for captured in step.captured_inputs if id(captured) in by_handle]


@contextmanager
def draws_by_step(models: Sequence[tf_keras.Model], seed: int, step: tf.Variable) -> Iterator[None]:
    """Have what is traced inside draw its random numbers (dropout, noise) as a function of the seed and the step.

    Keras' own draws depend on all the draws before them.
    """
    kind = tf_keras.__internal__.layers.BaseRandomLayer
    drawing = [layer for model in models for layer in model.submodules if isinstance(layer, kind)]
    before = [layer._random_generator for layer in drawing]
    numbers = defaultdict[int, Iterator[int]](itertools.count)

    def next_seed() -> tf.Tensor:
        # Each place that draws has a number of its own, in each replica that shares the batch.
        replica = replica_number()
        own = tf.constant([seed, next(numbers[replica])], tf.int64)
        if replicas_here() > 1:
            own = tf.random.experimental.stateless_fold_in(own, replica)
        return tf.random.experimental.stateless_fold_in(own, tf.cast(step, tf.int64))

    for layer, generator in zip(drawing, before, strict=True):
        layer._random_generator = _stateless(type(generator), next_seed)
    try:
        yield
    finally:
        for layer, generator in zip(drawing, before, strict=True):
            layer._random_generator = generator


def _stateless(kind: Callable[..., Any], next_seed: Callable[[], tf.Tensor]) -> Any:
    generator = kind(0, rng_type="stateless")
    generator.make_seed_for_stateless_op = next_seed
    return generator
