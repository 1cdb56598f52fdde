"""Runs strategies in order; checks guarantees before and after; measures every stage on its exported file."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tf_keras

from compress.boards.board import Board
from compress.cache.code import code_digest
from compress.cache.store import Entry, StageCache
from compress.cache.trainings import Trainings
from compress.candidate import Artifact, Candidate, Numbers, Storage
from compress.data.source import Data
from compress.deploy.files import write_files
from compress.deploy.measure import measure
from compress.deploy.noise import Noise, quantization_noise
from compress.deploy.packing import write_cmp
from compress.distribution.replicas import SINGLE, Distribution
from compress.errors import CompressError
from compress.graph.rewrite import copy_model
from compress.graph.saved_graph import has_layers
from compress.metrics.tflite_file import TFLiteFile
from compress.models.source import ModelSource
from compress.networks import Networks
from compress.pipeline.layers import layer_table, whole_table
from compress.pipeline.refusals import (
    refuse_clashes,
    refuse_incomparable,
    refuse_indivisible,
    refuse_unfit,
    refuse_without_labels,
    refuse_without_layers,
)
from compress.pipeline.stage import Stage, StageResult, require_kept, result_from_json, result_to_json
from compress.reference import make_reference
from compress.strategies.strategy import Context
from compress.training import Recovery

_LOG = logging.getLogger("compress")
_WORK = ".stages-"
_QUANTIZED = ("int8", "int16", "dynamic", "weight_only")
"""Schemes whose files compute something else than the float one."""


@dataclass(frozen=True)
class Result:
    """A finished pipeline."""

    baseline: StageResult
    stages: tuple[StageResult, ...]
    candidate: Candidate | None
    """None if the model came as an exported file."""
    artifact: Artifact
    untrained: bool = False
    """The reference model has the weights that it was initialised with: accuracies mean nothing."""

    @property
    def last(self) -> StageResult:
        """The last stage; the baseline if there is none."""
        return (self.stages or (self.baseline,))[-1]

    @property
    def keras_model(self) -> tf_keras.Model | None:
        """The compressed Keras model; None if what was given has no Keras layers."""
        return self.candidate.model if self.candidate is not None and has_layers(self.candidate.model) else None

    @property
    def final(self) -> Numbers:
        """Numbers of the last stage."""
        return self.last.numbers


@dataclass(frozen=True)
class Pipeline:
    """Everything that a run needs. ``seed`` decides every random draw."""

    model: ModelSource
    data: Data
    board: Board
    stages: tuple[Stage, ...]
    cache: StageCache
    seed: int = 0
    strict: bool = False
    networks: Networks = field(default_factory=Networks)
    """What ``recovery.teachers`` and strategies name besides the reference model."""
    distribution: Distribution = SINGLE
    """Who computes the steps of trainings."""
    on_stage: Callable[[StageResult], None] = lambda result: None

    def run(self, folder: Path) -> Result:
        """Make the reference model, send it through all stages, leave the last exported file in ``folder``.

        Raises:
            CompressError: naming the stage. Stages finished before stay in the cache.
        """
        given = self.model.exported()
        if given is not None:
            return self._measure_given(given, folder)
        self.cache.open()
        refuse_indivisible(self.stages, self.model, len(self.data.train), self.distribution)
        if self.stages:
            refuse_unfit(self.stages, self.data)
            model = self.model.build(self.data, self.seed)
            refuse_without_layers(self.stages, model)
            refuse_clashes(self.stages, model)
            refuse_without_labels(self.stages, self.data)
            self.networks.refuse_misfits(model, self.data, self.seed, self._user)
            data = self.data.fitted_to(model, f"model {model.name}")
            refuse_incomparable(self.stages, self._context(model, data))
        # Stages export into a folder of their own: a run that fails leaves no file beside an older report.
        for left in folder.glob(f"{_WORK}*"):
            # By a run that was killed.
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=_WORK, dir=folder) as work:
            result = self._run(Path(work))
            final = Artifact(folder / "model.tflite", result.artifact.storage, folder / "model.cmp")
            _move(result.artifact, final)
        return dataclasses.replace(result, artifact=final)

    def _measure_given(self, path: Path, folder: Path) -> Result:
        """Measure a model that is exported already, as it is."""
        if self.stages:
            raise CompressError(
                f"stage {self.stages[0].name}",
                expected="a model that can be changed and exported",
                received=f"{path.name}, which is exported already: it can be measured and nothing else",
                fix="Measure it with strategy=none, or bring what it was made from: a .keras file, or a SavedModel "
                "for strategy=quantize.",
            )
        self._require_board()
        started = time.perf_counter()
        file = TFLiteFile.read(path)
        inputs, outputs = ([file.tensors[i].shape for i in indices] for indices in (file.inputs, file.outputs))
        data = self.data.fitted_to_shapes(inputs, outputs, f"model.path {path}")
        packed = folder / "model.cmp"
        write_cmp(packed, path)
        numbers, _ = measure(Artifact(path, Storage(), packed), file, None, data, self.board)
        final = folder / "model.tflite"
        if not (final.exists() and final.samefile(path)):
            partial = folder / ".model.tflite.partial"
            shutil.copyfile(path, partial)
            partial.replace(final)
        seconds = time.perf_counter() - started
        baseline = StageResult("baseline", {}, numbers, seconds, (), (), (), whole_table(path.stem, numbers))
        self.on_stage(baseline)
        return Result(baseline, (), None, Artifact(final, Storage(), packed))

    def _run(self, folder: Path) -> Result:
        reference, baseline, artifact, key = self._reference(folder)
        data = self.data.fitted_to(reference.model, f"model {reference.model.name}")
        context = self._context(reference.model, data)
        candidate, results = reference, []
        # Stages export over the artifact's file; this one stays, to be measured beside each of them.
        first = dataclasses.replace(artifact, path=folder / "baseline.tflite", packed=None)
        shutil.copyfile(artifact.path, first.path)
        for number, stage in enumerate(self.stages, start=1):
            code = code_digest(type(stage.strategy))
            # What the first stage measures of the reference is the same for any board.
            own = self._of_stage(context, stage, number, key if number > 1 else self._reference_key())
            others = [
                _identity(source) for source in self.networks.of(stage.recovery.teachers, stage.strategy.models())
            ]
            key = digest_of([key, stage.name, stage.config(), others, code, self.seed, self.strict])
            config = {k: v for k, v in stage.config().items() if k != "strategy"}

            def make(
                trainings: Trainings,
                stage: Stage = stage,
                before: Candidate = candidate,
                config: dict[str, Any] = config,
                own: Context = own,
            ) -> tuple[Candidate, StageResult]:
                own = dataclasses.replace(own, checkpoint=trainings.next)
                return self._measured(stage.name, config, lambda: stage.apply(before, own), data, folder, first)

            candidate, result, artifact = self._cached(key, make, folder)
            results.append(result)
            self.on_stage(result)
        return Result(baseline, tuple(results), candidate, artifact, self.model.origin().untrained)

    def _user(self, name: str) -> str:
        """Return the configuration key that names a student."""
        for stage in self.stages:
            if field := stage.strategy.models().get(name):
                return f"strategy.{stage.name}.{field}, {name}"
        return f"student, {name}"

    def before_first(self, stage: Stage, folder: Path) -> tuple[Candidate, StageResult, Context]:
        """Return what ``stage`` would be given as the only one: the reference, its numbers, and the stage's context.

        What the context remembers, a run of that stage finds again.

        Args:
            stage: it is not applied.
            folder: where the reference's files go.
        """
        self.cache.open()
        reference, baseline, *_ = self._reference(folder)
        data = self.data.fitted_to(reference.model, f"model {reference.model.name}")
        context = self._of_stage(self._context(reference.model, data), stage, 1, self._reference_key())
        own = context.for_stage(stage.name, selection=stage.selection, recovery=stage.recovery)
        return reference, baseline, own

    def _context(self, reference: tf_keras.Model, data: Data) -> Context:
        """Return what all stages have in common."""
        return Context(
            stage="",
            data=data,
            reference=reference,
            recovery=Recovery(),
            seed=self.seed,
            strict=self.strict,
            measure=self.board.measure_all,
            board=digest_of(self._board()),
            channel_multiple=self.board.channel_multiple,
            keep=self.cache.arrays,
            other_model=functools.cache(lambda name: self.networks.teacher(name, reference, self.data, self._trained)),
            distribution=self.distribution,
            untrained_model=lambda name, seed: self.networks.student(name, reference, data, seed),
            sparse=self._sparse,
            save=self.model.save,
        )

    def _trained(self, source: ModelSource) -> tf_keras.Model:
        """Return a further network with its weights: the cache keeps those that have to be trained."""
        if source.origin().schedule is None:
            return make_reference(source, self.data, self.seed)
        key = digest_of(
            ["network", *_identity(source), self.data.identity, self.seed, *self.distribution.identity],
        )
        trainings = self.cache.trainings(key)

        def make() -> dict[str, np.ndarray]:
            model = make_reference(source, self.data, self.seed, trainings.next(), self.distribution)
            return {str(place): weights for place, weights in enumerate(model.get_weights())}

        weights = self.cache.arrays(key, "weights of a teacher", make)
        trainings.forget()
        tf_keras.backend.reset_uids()
        model = copy_model(source.build(self.data, self.seed))
        model.set_weights([weights[str(place)] for place in range(len(weights))])
        return model

    def _of_stage(self, context: Context, stage: Stage, number: int, before: str) -> Context:
        """Return the context with the seed and the memory of the ``number``-th stage, given the key of what it gets."""
        start = [before, code_digest(type(stage.strategy)), self.seed, number, self.board.channel_multiple]

        def remember(name: str, settings: Sequence[Any], measure: Callable[[], Any]) -> Any:
            return self.cache.remembered(digest_of([*start, stage.name, name, *settings]), measure)

        return dataclasses.replace(context, seed=_stage_seed(self.seed, number, stage.name), remember=remember)

    def _require_board(self) -> None:
        """Refuse a board that cannot be reached: what was asked for would not be measured."""
        reason = self.board.unreachable()
        if reason is not None:
            raise CompressError(
                f"board {self.board.name}",
                expected="one that can be reached",
                received=reason,
                fix="Mend that and run the same command again, or measure on this machine: board=host. "
                "Finished stages are in the cache.",
            )

    def _board(self) -> list[Any]:
        return [type(self.board).__qualname__, dataclasses.asdict(self.board), self.board.place]  # type: ignore[call-overload]

    @property
    def _sparse(self) -> bool:
        """A board that cannot expand kernels would not run the file at all."""
        return not self.board.lacks(["DENSIFY"])

    def _reference_key(self) -> str:
        """Return a digest of what makes the reference model."""
        # A file's weights do not depend on the seed, so neither does the baseline.
        seed = self.seed if self.model.origin().schedule is not None else None
        return digest_of(
            ["reference", *_identity(self.model), self.data.identity, seed, *self.distribution.identity],
        )

    def _reference(self, folder: Path) -> tuple[Candidate, StageResult, Artifact, str]:
        key = digest_of([self._reference_key(), *self._board()])

        def make(trainings: Trainings) -> tuple[Candidate, StageResult]:
            model = make_reference(self.model, self.data, self.seed, trainings.next(), self.distribution)
            data = self.data.fitted_to(model, f"model {model.name}")
            return self._measured("baseline", {}, lambda: Candidate(model), data, folder)

        candidate, result, artifact = self._cached(key, make, folder)
        self.on_stage(result)
        return candidate, result, artifact, key

    def _cached(
        self, key: str, make: Callable[[Trainings], tuple[Candidate, StageResult]], folder: Path
    ) -> tuple[Candidate, StageResult, Artifact]:
        tflite, packed = folder / "model.tflite", folder / "model.cmp"
        with self.cache.alone(key):
            found = self.cache.load(key)
            if found is None:
                self._require_board()
                trainings = self.cache.trainings(key)
                candidate, result = make(trainings)
                found = Entry(candidate, result_to_json(result), tflite.read_bytes(), packed.read_bytes())
                self.cache.store(key, found)
                trainings.forget()
            else:
                _LOG.info("%s: taken from the cache", found.result["name"])
                result = result_from_json(found.result, cached=True)
                tflite.write_bytes(found.tflite)
                packed.write_bytes(found.packed)
        return found.candidate, result, Artifact(tflite, found.candidate.storage, packed)

    def _measured(
        self,
        name: str,
        config: dict[str, Any],
        make: Callable[[], Candidate],
        data: Data,
        folder: Path,
        baseline: Artifact | None = None,
    ) -> tuple[Candidate, StageResult]:
        _LOG.info("%s: running", name)
        started = time.perf_counter()
        candidate = make()
        artifact = write_files(candidate, data, folder, sparse=self._sparse, save=self.model.save)
        file = TFLiteFile.read(artifact.path)
        for guarantee in candidate.guarantees:
            require_kept(guarantee, guarantee.check_file(file), name, "the exported file")
        numbers, agreement = measure(artifact, file, candidate.model, data, self.board, baseline)
        if numbers.latency_failure is not None:
            # What is missing because the board has gone away must not be kept as an answer of the board's.
            self._require_board()
        noise: tuple[Noise, ...] = ()
        if candidate.storage.scheme in _QUANTIZED:
            noise = quantization_noise(candidate, data, artifact.path)
        whole = not has_layers(candidate.model)
        layers = whole_table(candidate.model.name, numbers) if whole else layer_table(candidate.model)
        seconds = time.perf_counter() - started
        _LOG.info("%s: accuracy %.2f %%, %d bytes, %.1f s", name, numbers.accuracy, numbers.tflite_bytes, seconds)
        return candidate, StageResult(
            name,
            config,
            numbers,
            seconds,
            candidate.skipped,
            tuple(f"{g.stage}: {g.describe()}" for g in candidate.guarantees),
            candidate.released,
            layers,
            measured=dict(candidate.measured),
            allocation=candidate.allocation,
            noise=noise,
            agreement=agreement,
            recovered=candidate.recovered,
        )


def _move(artifact: Artifact, target: Artifact) -> None:
    artifact.path.replace(target.path)
    if artifact.packed is not None and target.packed is not None:
        artifact.packed.replace(target.packed)


def digest_of(parts: Any) -> str:
    """Return the key of the cache for what these parts decide."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _identity(source: ModelSource) -> list[Any]:
    """Return all that decides which model, with which weights, the source makes of given data and a seed."""
    fields = dataclasses.asdict(source)  # type: ignore[call-overload]
    return [type(source).__qualname__, fields, source.origin().digest(), code_digest(type(source))]


def _stage_seed(seed: int, number: int, name: str) -> int:
    """Return a seed for one stage: of its own, and the same whether or not the stages before it were cached."""
    return int(hashlib.sha256(f"{seed}:{number}:{name}".encode()).hexdigest()[:7], 16)
