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

import tf_keras

from compress.boards.board import Board
from compress.cache.code import code_digest
from compress.cache.store import Entry, StageCache
from compress.cache.trainings import Trainings
from compress.candidate import (
    Allocated,
    Artifact,
    Candidate,
    Coder,
    Effect,
    Guarantee,
    Numbers,
    Recovered,
    Skipped,
    Storage,
    Violation,
)
from compress.data.source import Data
from compress.deploy.measure import measure
from compress.deploy.noise import Noise, quantization_noise
from compress.deploy.packing import packed_bytes, write_cmp
from compress.deploy.tflite import export
from compress.deploy.verification import Agreement
from compress.errors import CompressError
from compress.graph.saved_graph import has_layers
from compress.graph.selection import Selection
from compress.metrics.tflite_file import TFLiteFile
from compress.models.source import ModelSource
from compress.networks import Networks
from compress.reference import make_reference
from compress.strategies.distillation.recovering import Recovering
from compress.strategies.quantization.stored import Stored
from compress.strategies.strategy import Context, Strategy, require_labels
from compress.training import Recovery

_LOG = logging.getLogger("compress")
_LAYER_CODERS: tuple[Coder, ...] = ("none", "huffman", "ans")
_WORK = ".stages-"
_QUANTIZED = ("int8", "int16", "dynamic", "weight_only")
"""Schemes whose files compute something else than the float one."""


@dataclass(frozen=True)
class Stage(Strategy):
    """A strategy in a pipeline, with the wrappers around it: which layers, how often, what recovery."""

    name: str
    strategy: Strategy
    selection: Selection = field(default_factory=Selection)
    recovery: Recovery = field(default_factory=Recovery)
    repeat: int = 1
    release: tuple[str, ...] = ()

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Apply the strategy ``repeat`` times to the selected layers, and check every guarantee afterwards."""
        gone = [guarantee for guarantee in candidate.guarantees if guarantee.stage in self.release]
        left = tuple(guarantee for guarantee in candidate.guarantees if guarantee.stage not in self.release)
        notes = (f"{guarantee.stage}: {guarantee.describe()} (released by {self.name})" for guarantee in gone)
        candidate = candidate.evolve(guarantees=left, released=(*candidate.released, *notes))
        if any(isinstance(g, Stored) for g in gone) and not any(isinstance(g, Stored) for g in left):
            candidate = candidate.evolve(storage=Storage(), samples=None)
        inner = context.for_stage(self.name, selection=self.selection, recovery=self.recovery)
        recovering = Recovering(inner, candidate.model)
        candidate = candidate.evolve(measured={}, allocation=(), recovered=None)
        for turn in range(self.repeat):
            inner = recovering.context(candidate.model, turn, self.strategy)
            candidate = self.strategy.apply(candidate, inner)
        for guarantee in candidate.guarantees:
            require_kept(guarantee, guarantee.check(candidate.model), self.name, "the model")
        recovered = recovering.done(candidate.model)
        return candidate.evolve(lineage=(*candidate.lineage, self.name), recovered=recovered)

    def config(self) -> dict[str, Any]:
        """Return everything that decides what the stage does, as plain values."""
        return {
            "strategy": f"{type(self.strategy).__module__}.{type(self.strategy).__qualname__}",
            **dataclasses.asdict(self.strategy),  # type: ignore[call-overload]
            "only": [_plain(rule) for rule in self.selection.only],
            "skip": [_plain(rule) for rule in self.selection.skip],
            "recovery": dataclasses.asdict(self.recovery),
            "repeat": self.repeat,
            "release": list(self.release),
        }


@dataclass(frozen=True)
class StageResult:
    """A finished stage: its numbers, measured on the exported file, and what is to be said about it."""

    name: str
    config: dict[str, Any]
    numbers: Numbers
    seconds: float
    skipped: tuple[Skipped, ...]
    guarantees: tuple[str, ...]
    released: tuple[str, ...]
    layers: dict[str, dict[str, int]]
    """The :func:`layer_table` of the stage's model."""
    cached: bool = False
    measured: dict[str, float] = field(default_factory=dict)
    """What the stage has measured of its own work."""
    allocation: tuple[Allocated, ...] = ()
    """What a search has chosen for each layer."""
    noise: tuple[Noise, ...] = ()
    """What each tensor of an integer file has lost against the float one."""
    agreement: Agreement | None = None
    """How the exported file's outputs agree with those of its Keras model."""
    recovered: Recovered | None = None
    """How the stage has won accuracy back."""


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
        if self.stages:
            model = self.model.build(self.data, self.seed)
            refuse_without_layers(self.stages, model)
            refuse_clashes(self.stages, model)
            refuse_without_labels(self.stages, self.data)
            self.networks.refuse_misfits(model, self.data, self.seed, self._user)
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
        baseline = StageResult("baseline", {}, numbers, seconds, (), (), (), _whole(path.stem, numbers))
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
            own = self._of_stage(context, stage, number, key)
            others = [
                _identity(source) for source in self.networks.of(stage.recovery.teachers, stage.strategy.models())
            ]
            key = _digest([key, stage.name, stage.config(), others, code, self.seed, self.strict])
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
        """Return the configuration key that names a network."""
        for stage in self.stages:
            if name in stage.strategy.models():
                return f"strategy.{stage.name}, {name}"
        return f"recovery.teachers, {name}"

    def before_first(self, stage: Stage, folder: Path) -> tuple[Candidate, StageResult, Context]:
        """Return what ``stage`` would be given as the only one: the reference, its numbers, and the stage's context.

        What the context remembers, a run of that stage finds again.

        Args:
            stage: it is not applied.
            folder: where the reference's files go.
        """
        self.cache.open()
        reference, baseline, _, key = self._reference(folder)
        data = self.data.fitted_to(reference.model, f"model {reference.model.name}")
        context = self._of_stage(self._context(reference.model, data), stage, 1, key)
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
            measure=self.board.measure,
            channel_multiple=self.board.channel_multiple,
            keep=self.cache.arrays,
            other_model=functools.cache(lambda name: self.networks.teacher(name, reference, self.data, self.seed)),
            untrained_model=lambda name, seed: self.networks.student(name, reference, data, seed),
        )

    def _of_stage(self, context: Context, stage: Stage, number: int, before: str) -> Context:
        """Return the context with the seed and the memory of the ``number``-th stage, given the key of what it gets."""
        start = [before, code_digest(type(stage.strategy)), self.seed, number]

        def remember(name: str, settings: Sequence[Any], measure: Callable[[], Any]) -> Any:
            return self.cache.remembered(_digest([*start, stage.name, name, *settings]), measure)

        return dataclasses.replace(context, seed=_stage_seed(self.seed, number, stage.name), remember=remember)

    def _reference(self, folder: Path) -> tuple[Candidate, StageResult, Artifact, str]:
        origin = self.model.origin()
        key = _digest(
            [
                "reference",
                *_identity(self.model),
                self.data.identity,
                # A file's weights do not depend on the seed, so neither does the baseline.
                self.seed if origin.schedule is not None else None,
                dataclasses.asdict(self.board),  # type: ignore[call-overload]
            ]
        )

        def make(trainings: Trainings) -> tuple[Candidate, StageResult]:
            model = make_reference(self.model, self.data, self.seed, trainings.next())
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
                trainings = self.cache.trainings(key)
                candidate, result = make(trainings)
                found = Entry(candidate, _result_to_json(result), tflite.read_bytes(), packed.read_bytes())
                self.cache.store(key, found)
                trainings.forget()
            else:
                _LOG.info("%s: taken from the cache", found.result["name"])
                result = _result_from_json(found.result, cached=True)
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
        # A board that cannot expand kernels would not run the file at all.
        sparse = not self.board.lacks(["DENSIFY"])
        artifact = export(candidate, data, folder / "model.tflite", sparse=sparse)
        file = TFLiteFile.read(artifact.path)
        for guarantee in candidate.guarantees:
            require_kept(guarantee, guarantee.check_file(file), name, "the exported file")
        artifact = self._packed(candidate, artifact)
        numbers, agreement = measure(artifact, file, candidate.model, data, self.board, baseline)
        noise: tuple[Noise, ...] = ()
        if candidate.storage.scheme in _QUANTIZED:
            noise = quantization_noise(candidate, data, artifact.path)
        whole = not has_layers(candidate.model)
        layers = _whole(candidate.model.name, numbers) if whole else layer_table(candidate.model)
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

    def _packed(self, candidate: Candidate, artifact: Artifact) -> Artifact:
        """Write the packed file beside the exported one."""
        target = artifact.path.with_suffix(".cmp")
        hashes = [found for guarantee in candidate.guarantees for found in guarantee.hashes().values()]
        transfers = [found for guarantee in candidate.guarantees for found in guarantee.transfers().values()]
        # Whole numbers are the exported file's; floats are the Keras model's, which conversion only copies.
        if candidate.storage.scheme == "float32" and has_layers(candidate.model):
            with tempfile.TemporaryDirectory(prefix="compress-") as folder:
                source = Path(folder, "model.keras")
                self.model.save(candidate.model, source)
                write_cmp(target, source, candidate.coder, hashes, transfers)
        else:
            write_cmp(target, artifact.path, candidate.coder, hashes, transfers)
        return dataclasses.replace(artifact, packed=target)


def _move(artifact: Artifact, target: Artifact) -> None:
    artifact.path.replace(target.path)
    if artifact.packed is not None and target.packed is not None:
        artifact.packed.replace(target.packed)


def refuse_without_layers(stages: Sequence[Stage], model: tf_keras.Model) -> None:
    """Refuse stages that change layers or weights of a model that came as a graph without Keras layers.

    Raises:
        CompressError: naming the first such stage.
    """
    for stage in stages:
        changes = sorted(effect.value for effect in stage.strategy.effects - {Effect.STORE})
        if changes and not has_layers(model):
            raise CompressError(
                f"stage {stage.name}",
                expected=f"a model with Keras layers (of each, {stage.name} {' and '.join(changes)})",
                received=f"the SavedModel {model.name}, a graph without Keras layers",
                fix="Save the model with model.save('model.keras') and bring that file. A SavedModel can be quantized "
                "(strategy=quantize) and measured (strategy=none).",
            )


def refuse_clashes(stages: Sequence[Stage], model: tf_keras.Model) -> None:
    """Refuse a pipeline in which a stage cannot keep what an earlier one establishes, before anything runs.

    Raises:
        CompressError: naming both stages.
    """
    for index, later in enumerate(stages):
        unknown = set(later.release) - {stage.name for stage in stages[:index]}
        if unknown:
            raise CompressError(
                f"strategy.{later.name}.release",
                expected=f"stages before it ({', '.join(s.name for s in stages[:index]) or 'there is none'})",
                received=", ".join(sorted(unknown)),
                fix="Name a stage as it appears under strategy in the configuration.",
            )
        released = {name for stage in stages[: index + 1] for name in stage.release}
        kept = [earlier for earlier in stages[:index] if earlier.name not in released]
        for earlier in kept:
            _refuse_another_scheme(later, earlier)
        try:
            targets = later.strategy.targets(model, later.selection)
        except CompressError:
            # Its rules may mean layers that an earlier stage will make; if not, the stage itself refuses them.
            if not any(Effect.REPLACE in earlier.strategy.effects for earlier in stages[:index]):
                raise
            continue
        for earlier in kept:
            reason = later.strategy.clashes_with(earlier.strategy)
            both = targets & earlier.strategy.targets(model, earlier.selection)
            if reason is not None and both:
                raise CompressError(
                    f"stage {later.name} after stage {earlier.name}",
                    expected=f"a strategy that keeps what {earlier.name} establishes on {_few(both)}",
                    received=f"{later.name}, which cannot: {reason}",
                    fix=f"Put {later.name} before {earlier.name}, keep them on different layers with only and skip, "
                    f"or write strategy.{later.name}.release=[{earlier.name}].",
                )


def refuse_without_labels(stages: Sequence[Stage], data: Data) -> None:
    """Refuse stages that learn from labels where the training images have none.

    Raises:
        CompressError: naming the first such stage.
    """
    for stage in stages:
        if stage.strategy.needs_labels:
            require_labels(data, stage.name, f"{stage.name} learns from them")
        trains = Effect.TRAIN in stage.strategy.effects and not stage.strategy.own_recovery and stage.recovery.trains
        if trains and stage.recovery.method == "finetune":
            require_labels(data, stage.name, "recovery.method=finetune learns from nothing else")


def _refuse_another_scheme(later: Stage, earlier: Stage) -> None:
    """Refuse a stage that would write the file otherwise than an earlier one says, on whatever layers."""
    before, after = earlier.strategy.stores, later.strategy.stores
    if before is not None and after is not None and before != after:
        raise CompressError(
            f"stage {later.name} after stage {earlier.name}",
            expected=f"one way to store the weights: {before}, which {earlier.name} establishes",
            received=f"{later.name}, which would store them as {after}",
            fix=f"Leave one of the two stages out, or write strategy.{later.name}.release=[{earlier.name}].",
        )


def require_kept(guarantee: Guarantee, violations: Sequence[Violation], stage: str, where: str) -> None:
    """Raise if a guarantee does not hold.

    Raises:
        CompressError: naming the stage that broke it and the one that established it.
    """
    if violations:
        first = violations[0]
        raise CompressError(
            f"stage {stage}, {first.layer}",
            expected=f"what stage {guarantee.stage} established ({guarantee.describe()}), in {where}",
            received=f"{first.found}" + (f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""),
            fix=f"Leave the layer out with strategy.{stage}.skip."
            if guarantee.stage == stage
            else f"Skip the layer in one of the two stages, or write strategy.{stage}.release=[{guarantee.stage}].",
        )


def layer_table(model: tf_keras.Model) -> dict[str, dict[str, int]]:
    """Return for every layer with kernels: output channels, weights (no biases), non-zero weights, multiply-adds.

    And about how many bytes its kernels take in a packed file of float weights, by coder.
    """
    from compress.graph.kernels import kernel_attributes, kernels
    from compress.graph.rewrite import positions

    channels = {
        layer.name: int(shapes[0][-1] or 0) for layer, _, shapes in positions(model) if kernel_attributes(layer)
    }
    table: dict[str, dict[str, int]] = {}
    for kernel in kernels(model):
        name = kernel.layer.name
        row = table.setdefault(name, {"channels": channels[name], "params": 0, "nonzero": 0, "macs": 0})
        row["params"] += kernel.size
        row["nonzero"] += int((kernel.value != 0).sum())
        row["macs"] += kernel.macs
        for coder in _LAYER_CODERS:
            key = f"packed_{coder}"
            row[key] = row.get(key, 0) + packed_bytes(kernel.value, coder)
    return table


def _whole(name: str, numbers: Numbers) -> dict[str, dict[str, int]]:
    return {name: {"params": numbers.params, "nonzero": numbers.nonzero_params, "macs": numbers.macs}}


def _few(names: frozenset[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more layers" if len(listed) > 3 else "")


def _plain(rule: Any) -> Any:
    return rule if isinstance(rule, str) else dataclasses.asdict(rule)


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _identity(source: ModelSource) -> list[Any]:
    """Return all that decides which model, with which weights, the source makes of given data and a seed."""
    fields = dataclasses.asdict(source)  # type: ignore[call-overload]
    return [type(source).__qualname__, fields, source.origin().digest(), code_digest(type(source))]


def _stage_seed(seed: int, number: int, name: str) -> int:
    """Return a seed for one stage: of its own, and the same whether or not the stages before it were cached."""
    return int(hashlib.sha256(f"{seed}:{number}:{name}".encode()).hexdigest()[:7], 16)


def _result_to_json(result: StageResult) -> dict[str, Any]:
    return dataclasses.asdict(result)


def _result_from_json(value: dict[str, Any], *, cached: bool) -> StageResult:
    return StageResult(
        **{
            **value,
            "numbers": Numbers.from_json(value["numbers"]),
            "skipped": tuple(Skipped(**item) for item in value["skipped"]),
            "guarantees": tuple(value["guarantees"]),
            "released": tuple(value["released"]),
            "allocation": tuple(Allocated(**{**row, "chosen": tuple(row["chosen"])}) for row in value["allocation"]),
            "noise": tuple(Noise(**item) for item in value["noise"]),
            "agreement": None if value["agreement"] is None else Agreement(**value["agreement"]),
            "recovered": Recovered.from_json(value["recovered"]) if value.get("recovered") else None,
            "cached": cached,
        }
    )
