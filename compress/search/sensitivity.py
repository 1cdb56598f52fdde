"""Sensitivity: what the outputs lose when one layer alone is compressed, for each layer, technique and level."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from compress.candidate import Candidate
from compress.errors import CompressError
from compress.graph.fold import fold_batch_norm
from compress.graph.kernels import kernels
from compress.graph.rewrite import copy_model
from compress.graph.softmax import gives_probabilities, logits_of
from compress.metrics.accuracy import accuracy
from compress.progress import progress
from compress.search.stored import as_stored, grids_by_name
from compress.search.technique import (
    UNTRAINED,
    Kind,
    Technique,
    Value,
    kernels_by_origin,
    same_shapes,
    stage,
    weighted_layers,
)
from compress.strategies.repair import outputs_of
from compress.strategies.strategy import Context, Strategy

Level = tuple[Technique, Value]
_UNCHANGED = "the strategy leaves it as it is"


@dataclass(frozen=True)
class Probe:
    """One layer at one level of a technique, everything else as it was."""

    layer: str
    technique: str
    field: str
    value: Value
    refused: str | None = None
    """Why the strategy does not do it; then there are no numbers."""
    divergence: float = 0.0
    """Mean Kullback-Leibler divergence of the class probabilities from the reference's, in nats."""
    accuracy_change: float = 0.0
    """In points."""
    macs_saved: int = 0
    """Of the whole model: a layer that loses channels saves work in the layers that read them."""
    bytes_saved: int = 0
    """In the packed file, of all kernels."""
    macs_kept: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Layer -> share of its multiply-adds that is left, for the layers where that is not all."""
    bytes_kept: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def per_mmac(self) -> float | None:
        """Divergence for each million of multiply-adds saved."""
        return self.divergence / (self.macs_saved / 1e6) if self.macs_saved > 0 else None

    @property
    def per_kilobyte(self) -> float | None:
        """Divergence for each thousand bytes saved."""
        return self.divergence / (self.bytes_saved / 1e3) if self.bytes_saved > 0 else None


@dataclass(frozen=True)
class Cost:
    """What a layer's kernels cost: multiply-adds for one sample, bytes in the packed file."""

    macs: int
    bytes: int


@dataclass(frozen=True)
class Pair:
    """What is left of a layer's bytes where weights are zero *and* values few: less is saved than by each alone.

    Few levels are coded in few bits, zeros or not: the shares that both leave must not be multiplied.
    """

    layer: str
    zeros: tuple[str, Value]
    """Technique and level."""
    values: tuple[str, Value]
    bytes_kept: float


@dataclass(frozen=True)
class Interaction:
    """What layers at one level lose together besides what each of them loses: so much for each pair of them."""

    technique: str
    value: Value
    layers: frozenset[str]
    per_pair: float


@dataclass(frozen=True)
class Sensitivity:
    """The table: what each layer costs as it is, and all probes; what zeros and few values save together."""

    layers: Mapping[str, Cost]
    probes: tuple[Probe, ...]
    images: int
    pairs: tuple[Pair, ...] = ()
    interactions: tuple[Interaction, ...] = ()

    def takers(self, technique: Technique, value: Value, among: Collection[str] | None = None) -> list[str]:
        """Return the layers that a level does not refuse; ``among``: of these only."""
        return [
            probe.layer
            for probe in self.probes
            if (probe.technique, probe.value) == (technique.name, value)
            and probe.refused is None
            and (among is None or probe.layer in among)
        ]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        rows = [{**asdict(p), "per_mmac": p.per_mmac, "per_kilobyte": p.per_kilobyte} for p in self.probes]
        return {
            "images": self.images,
            "layers": {name: asdict(cost) for name, cost in self.layers.items()},
            "probes": rows,
            "pairs": [asdict(pair) for pair in self.pairs],
        }


def measure_sensitivity(
    candidate: Candidate, techniques: Sequence[Technique], context: Context, images: int
) -> Sensitivity:
    """Measure every selected layer at every level of every technique, each probe once and for all.

    The images are the first ``images`` of the validation part, which nothing is calibrated or trained on; where
    training images are augmented, divergences are taken on augmented, partly mixed ones of these (as in calibration),
    of which the reference is less sure. No recovery is done.

    A technique that keeps the shapes of all weights is applied once for each level, to all selected layers, and each
    layer is looked at with its new weights in the network that is else as it was. Where layers make up for changes
    before them (rounding in closed form), that is what they would do in the whole. Other techniques are applied to each
    layer alone. Of two such techniques, zeros and few values, the bytes are measured that both leave of a layer.

    Args:
        candidate: the model.
        techniques: what to try.
        context: of the stage; it remembers each probe, so that a pass that was stopped goes on where it was.
        images: how many, at most.

    Raises:
        CompressError: if there is no layer with a kernel among the selected ones.
    """
    chosen = context.selection.names(candidate.model)
    layers = [name for name in weighted_layers(candidate.model) if name in chosen]
    if not layers:
        raise context.nothing_done("a layer with a kernel", ())
    bench = Bench(candidate, context, layers, images)
    total = sum(len(technique.levels) for technique in techniques) * len(layers)
    probes: list[Probe] = []
    pairs: list[Pair] = []
    with progress("sensitivity") as shown:
        # Zeros are there when the values are asked what they save beside them.
        for technique in sorted(techniques, key=lambda technique: technique.kind):
            for value in technique.levels:
                probe = bench.prober(technique, value)
                for layer in layers:
                    settings = [*technique.config(value), layer, layers, images]
                    plain = context.remember("sensitivity", settings, functools.partial(_plain_probe, probe, layer))
                    probes.append(Probe(**plain))
                    shown.advance(len(probes), total, f"{technique.label(value)}, {layer}")
                if technique.kind is Kind.VALUES:
                    pairs += _pairs(bench, techniques, (technique, value), layers, context)
                    bench.forget(technique, value)
    return Sensitivity(bench.costs, tuple(probes), bench.images, tuple(pairs))


def _pairs(
    bench: Bench, techniques: Sequence[Technique], values: Level, layers: Sequence[str], context: Context
) -> list[Pair]:
    """Return what the values leave of each layer beside each level of zeros."""
    found = []
    for technique in (t for t in techniques if t.kind is Kind.ZEROS):
        for zeros in ((technique, value) for value in technique.levels):
            settings = [*zeros[0].config(zeros[1]), *values[0].config(values[1]), layers]
            kept = context.remember("sensitivity of both", settings, functools.partial(bench.both, zeros, values))
            names = [(level[0].name, level[1]) for level in (zeros, values)]
            found += [Pair(layer, names[0], names[1], share) for layer, share in kept.items()]
    return found


def _plain_probe(probe: Callable[[str], Probe], layer: str) -> dict[str, Any]:
    return asdict(probe(layer))


class Bench:
    """Applies techniques and compares outputs with those of the candidate as it is."""

    def __init__(self, candidate: Candidate, context: Context, layers: Sequence[str], images: int) -> None:
        held_out = context.data.validation.take(images)
        self.images = len(held_out)
        self.costs = costs_of(candidate, list(weighted_layers(candidate.model)))
        self.layers = layers
        self.candidate = candidate
        self.context = context
        self._x, self._y = held_out.x.astype(np.float32), held_out.y
        unlabelled = context.for_stage(context.stage, data=replace(context.data, train=held_out))
        self._samples = unlabelled.calibration_samples(self.images) if context.data.augmentation else self._x
        self._applied: dict[tuple[str, Value], _Spliced | CompressError | None] = {}

    @functools.cached_property
    def _wanted(self) -> tf.Tensor:
        return self._log_probabilities(outputs_of(self.candidate.model, self._samples))

    @functools.cached_property
    def _accuracy(self) -> float:
        return accuracy(outputs_of(self.candidate.model, self._x), self._y)

    def _log_probabilities(self, outputs: np.ndarray) -> tf.Tensor:
        logits = logits_of(tf.constant(outputs), gives_probabilities(self.candidate.model))
        return tf.nn.log_softmax(tf.cast(logits, tf.float64))

    def loss(self, model: tf_keras.Model) -> tuple[float, float]:
        """Return the mean divergence of a model's outputs, and the change of its accuracy in points."""
        outputs = outputs_of(model, self._samples)
        found = self._log_probabilities(outputs)
        divergence = tf.reduce_sum(tf.exp(self._wanted) * (self._wanted - found), axis=-1)
        plain = outputs if self._samples is self._x else outputs_of(model, self._x)
        return max(float(tf.reduce_mean(divergence)), 0.0), accuracy(plain, self._y) - self._accuracy

    def prober(self, technique: Technique, value: Value) -> Callable[[str], Probe]:
        """Return what probes a layer at a level; work that all layers share is done when the first one asks for it."""
        if technique.kind is Kind.STRUCTURE:
            return lambda layer: self._alone(technique, value, layer)

        def probe(layer: str) -> Probe:
            found = self._at(technique, value)
            if isinstance(found, CompressError):
                return _refusal(technique, value, layer, found)
            return found.probe(layer) if found is not None else self._alone(technique, value, layer)

        return probe

    def both(self, zeros: Level, values: Level) -> dict[str, float]:
        """Return what zeros and few values together leave of the bytes of the layers that both change.

        Values that a file stores as integers stay the levels that they are without the zeros: rounding in closed form
        takes long. Others are found anew.
        """
        one, other = self._at(*zeros), self._at(*values)
        if not isinstance(one, _Spliced) or not isinstance(other, _Spliced):
            return {}
        alive, made = one.alive, other.changed
        if values[0].strategy.stores is None:
            made = self._apply(*values, self.layers, one.changed)
        grids = grids_by_name(made)
        left = {
            layer: sum(as_stored(made, k, grids, alive[k.name])[1] for k in found)
            for layer, found in kernels_by_origin(made.model, list(self.costs)).items()
            if layer in self.layers
            and found
            and all(k.name in alive and alive[k.name].shape == k.value.shape for k in found)
        }
        return {layer: size / self.costs[layer].bytes for layer, size in left.items()}

    def forget(self, technique: Technique, value: Value) -> None:
        """Let go of the weights of a level."""
        self._applied.pop((technique.name, value), None)

    def _at(self, technique: Technique, value: Value) -> _Spliced | CompressError | None:
        """Return what a level makes of all layers; made when it is first asked for."""
        key = (technique.name, value)
        if key not in self._applied:
            self._applied[key] = self._together(technique, value)
        return self._applied[key]

    def _apply(
        self, technique: Technique, value: Value, layers: Sequence[str], candidate: Candidate | None = None
    ) -> Candidate:
        made = stage(technique.name, technique.levels[value], layers)
        return made.apply(candidate or self.candidate, inner_context(self.context, technique.name))

    def _together(self, technique: Technique, value: Value) -> _Spliced | CompressError | None:
        """Return the weights of all layers at a level; why it is refused; None if the shapes are others."""
        try:
            changed = self._apply(technique, value, self.layers)
        except CompressError as error:
            return error if len(self.layers) == 1 else None
        for base in (copy_model(self.candidate.model), fold_batch_norm(self.candidate.model)):
            if same_shapes(base, changed.model):
                return _Spliced(self, technique, value, base, changed)
        return None

    def _alone(self, technique: Technique, value: Value, layer: str) -> Probe:
        try:
            changed = self._apply(technique, value, [layer])
        except CompressError as error:
            return _refusal(technique, value, layer, error)
        divergence, change = self.loss(with_stored_values(changed, {layer}, list(self.costs)))
        left = {
            n: sum(k.macs for k in found) for n, found in kernels_by_origin(changed.model, list(self.costs)).items()
        }
        macs = {name: count / self.costs[name].macs for name, count in left.items() if count != self.costs[name].macs}
        # Drafting the packed file of a kernel takes a while: only of what has changed.
        costs = costs_of(changed, list(self.costs), {*macs, layer})
        kept = {name: cost.bytes / self.costs[name].bytes for name, cost in costs.items()}
        return _probe(self, technique, value, layer, divergence, change, macs, kept)


@dataclass(frozen=True)
class _Spliced:
    """A level's weights for all layers, to be put into the unchanged model layer by layer."""

    bench: Bench
    technique: Technique
    value: Value
    base: tf_keras.Model
    changed: Candidate

    @functools.cached_property
    def _stored(self) -> Candidate:
        return self.changed.evolve(model=with_stored_values(self.changed, self.bench.layers, list(self.bench.costs)))

    @functools.cached_property
    def alive(self) -> dict[str, np.ndarray]:
        """Kernel -> which of its values are not zero."""
        return {kernel.name: kernel.value != 0 for kernel in kernels(self.changed.model)}

    @functools.cached_property
    def _costs(self) -> dict[str, Cost]:
        return costs_of(self.changed, list(self.bench.costs))

    def probe(self, layer: str) -> Probe:
        """Measure one layer."""
        known, skipped = self.bench.costs, {item.layer: item.reason for item in self.changed.skipped}
        target = self.base.get_layer(layer)
        before, after = target.get_weights(), self._stored.model.get_layer(layer).get_weights()
        same = all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
        if same and self._costs[layer].bytes >= known[layer].bytes:
            return Probe(layer, self.technique.name, self.technique.field, self.value, skipped.get(layer, _UNCHANGED))
        target.set_weights(after)
        divergence, change = self.bench.loss(self.base)
        target.set_weights(before)
        kept = {layer: self._costs[layer].bytes / known[layer].bytes}
        return _probe(self.bench, self.technique, self.value, layer, divergence, change, {}, kept)


def _probe(
    bench: Bench,
    technique: Technique,
    value: Value,
    layer: str,
    divergence: float,
    change: float,
    macs_kept: Mapping[str, float],
    bytes_kept: Mapping[str, float],
) -> Probe:
    saved = sum((1 - share) * bench.costs[name].macs for name, share in macs_kept.items())
    spared = sum((1 - share) * bench.costs[name].bytes for name, share in bytes_kept.items())
    return Probe(
        layer,
        technique.name,
        technique.field,
        value,
        divergence=divergence,
        accuracy_change=change,
        macs_saved=round(saved),
        bytes_saved=round(spared),
        macs_kept=dict(macs_kept),
        bytes_kept=dict(bytes_kept),
    )


def _refusal(technique: Technique, value: Value, layer: str, error: CompressError) -> Probe:
    reason = f"{error.received}; it takes {error.expected}" if error.received else str(error)
    return Probe(layer, technique.name, technique.field, value, " ".join(reason.split())[:300])


def with_stored_values(candidate: Candidate, layers: Collection[str], originals: Sequence[str]) -> tf_keras.Model:
    """Return the model with the values that the file will hold of the kernels in the place of ``layers``.

    ``originals``: all layers with kernels that there were: names begin alike.
    """
    grids, model = grids_by_name(candidate), candidate.model
    if candidate.storage.scheme == "float32":
        return model
    model = copy_model(model)
    copied = candidate.evolve(model=model)
    for layer, found in kernels_by_origin(model, originals).items():
        for kernel in found if layer in layers else ():
            getattr(kernel.layer, kernel.attribute).assign(as_stored(copied, kernel, grids)[0])
    return model


def costs_of(candidate: Candidate, layers: Sequence[str], wanted: Collection[str] | None = None) -> dict[str, Cost]:
    """Return what stands in the place of each layer costs; of the ``wanted`` ones only, if that is not None."""
    grids = grids_by_name(candidate)
    return {
        name: Cost(sum(k.macs for k in found), sum(as_stored(candidate, k, grids)[1] for k in found))
        for name, found in kernels_by_origin(candidate.model, layers).items()
        if wanted is None or name in wanted
    }


def inner_context(context: Context, name: str) -> Context:
    """Return the context of a stage inside a search. It remembers nothing: it sees many candidates."""

    def anew(_name: str, _settings: Sequence[Any], make: Callable[[], Any]) -> Any:
        return make()

    return context.for_stage(name, recovery=UNTRAINED, strict=False, remember=anew)


@dataclass(frozen=True)
class Survey(Strategy):
    """Measures sensitivities and changes nothing: what ``compress.sensitivity`` does before any search."""

    techniques: tuple[Technique, ...]
    images: int

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Measure; a search on the same model finds every probe remembered."""
        measure_sensitivity(candidate, self.techniques, context, self.images)
        return candidate
