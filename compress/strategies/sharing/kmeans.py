"""Weight sharing by k-means: few distinct values in each kernel, each output channel, or the whole model.

Source: Han et al., Deep Compression (arXiv 1510.00149, section 3): where k-means starts, and centroids that are trained
by the sum of the gradients of their weights; k-means++: Arthur and Vassilvitskii (SODA 2007).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Le
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate, Effect, Skipped
from compress.errors import CompressError
from compress.graph.fold import fold_batch_norm
from compress.graph.kernels import Kernel, get_variable, get_weight
from compress.strategies.options import refuse_without_effect
from compress.strategies.pruning.zeros import Zeros
from compress.strategies.sharing.centroids import TrainedCentroids
from compress.strategies.sharing.chosen import choose_kernels
from compress.strategies.sharing.codebook import Codebook
from compress.strategies.sharing.tfmot_clustering import is_clusterable, unwrap, wrapped_by_tfmot
from compress.strategies.strategy import STRICT, Context, Strategy

Start = Literal["linear", "density", "kmeans++"]

_CHUNK = 1 << 22
"""Weights that are looked up at a time: their places take eight bytes each."""
_SAMPLE = 1 << 16
"""Values that k-means++ draws from."""


@dataclass(frozen=True, config=STRICT)
class Share(Strategy):
    """Cluster the weights of the selected kernels into ``clusters`` values, zero counted as one if there are zeros.

    Batch norms that follow a selected layer are folded into it first: the exported file holds the folded kernel,
    so that is the one whose values must be few. A kernel with no more weights than clusters is left alone, and one into
    which the export merges a normalisation that could not be folded.

    Args:
        clusters: distinct values.
        scope: what has so many: each ``layer``'s kernel, each output ``channel`` of it, or the ``model`` as a whole.
        start: where k-means starts: ``linear`` between the extremes, by ``density`` (as many weights for each), or
            ``kmeans++`` (drawn, far from one another).
        iterations: of k-means, at most.
        gradient: a centroid learns from the ``mean`` of its weights' gradients, or from their ``sum``, which asks for a
            much lower learning rate.
        scheme: ``own``, or ``tfmot``: the toolkit's layers, in which weights change their cluster while they train; of
            what earlier stages establish they keep zeros only.
    """

    clusters: Annotated[int, Ge(2), Le(65536)] = 32
    scope: Literal["layer", "channel", "model"] = "layer"
    start: Start = "linear"
    iterations: Annotated[int, Ge(1)] = 100
    gradient: Literal["mean", "sum"] = "mean"
    scheme: Literal["own", "tfmot"] = "own"

    effects = frozenset({Effect.TRAIN, Effect.SHARE})
    establishes = Codebook

    def __post_init__(self) -> None:
        """Refuse fields that TFMOT's scheme does not have."""
        refuse_without_effect(self, [(self.scheme == "own", ("scope", "iterations"), "scheme=own")])

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Fold, cluster, and train the centroids."""
        names = context.selection.names(candidate.model)
        model = fold_batch_norm(candidate.model, names)
        chosen, skipped = choose_kernels(model, names, "clustered", self._obstacle)
        if not chosen:
            raise context.nothing_done(f"a kernel with more than {self.clusters} weights", skipped)
        if self.scope == "model" and (total := sum(kernel.size for kernel in chosen)) <= self.clusters:
            raise CompressError(
                f"strategy.{context.stage}.clusters",
                expected=f"fewer clusters than the {total:,} weights of the selected kernels together",
                received=f"{self.clusters:,}",
                fix=f"Lower it, or widen strategy.{context.stage}.only and skip.",
            )
        if self.scheme == "tfmot":
            return self._by_tfmot(candidate.evolve(model=model), chosen, skipped, context)
        labels = self._cluster(model, chosen, np.random.default_rng(context.seed))
        variables = [get_variable(model, kernel.name) for kernel in chosen]
        trained = TrainedCentroids(variables, labels, joint=self.scope == "model", summed=self.gradient == "sum")
        guarantee = Codebook(
            context.stage,
            self.clusters,
            {kernel.name: label for kernel, label in zip(chosen, labels, strict=True)},
            per_channel=self.scope == "channel",
        )
        shared = candidate.evolve(model=model, skipped=context.skip(skipped))
        projections = [] if trained.plain else [trained]
        if self.scope != "model":
            return context.recover(shared.with_guarantee(guarantee), projections=projections)
        shared = context.recover(shared, projections=projections)
        return shared.with_guarantee(guarantee.with_values(trained.values()))

    def _by_tfmot(
        self, candidate: Candidate, chosen: Sequence[Kernel], skipped: Sequence[Skipped], context: Context
    ) -> Candidate:
        names = {kernel.layer.name for kernel in chosen}
        bound = [guarantee for guarantee in candidate.guarantees if guarantee.layers & names]
        foreign = sorted({guarantee.stage for guarantee in bound if not isinstance(guarantee, Zeros)})
        if foreign:
            raise CompressError(
                f"strategy.{context.stage}.scheme",
                expected="scheme=own behind stages whose properties have to be kept, other than zeros",
                received=f"scheme=tfmot, whose layers know nothing of {', '.join(foreign)}",
                fix=f"Write strategy.{context.stage}.scheme=own.",
            )
        wrapped = wrapped_by_tfmot(
            candidate.model,
            names,
            self.clusters,
            start=self.start,
            gradient=self.gradient,
            keep_zeros={name for guarantee in bound for name in guarantee.layers & names},
            where=f"stage {context.stage}",
        )
        left_alone = context.skip(skipped)
        others = tuple(guarantee.without(names) for guarantee in candidate.guarantees)
        context.recover(candidate.evolve(model=wrapped, guarantees=others))
        model = unwrap(wrapped, candidate.model)
        labels = {}
        for kernel in chosen:
            value = get_weight(model, kernel.name)
            labels[kernel.name] = np.unique(value, return_inverse=True)[1].reshape(value.shape).astype(np.int32)
        result = candidate.evolve(model=model, skipped=left_alone)
        return result.with_guarantee(Codebook(context.stage, self.clusters, labels))

    def _obstacle(self, kernel: Kernel) -> Skipped | None:
        name, per_channel = kernel.layer.name, self.scope == "channel"
        if self.scheme == "tfmot" and not is_clusterable(kernel.layer):
            return Skipped(name, "TFMOT does not cluster all its kernels")
        size = kernel.size // kernel.value.shape[-1] if per_channel else kernel.size
        if size > self.clusters or self.scope == "model":
            return None
        what = "weights of a channel" if per_channel else "weights"
        return Skipped(name, f"{size} {what}, {self.clusters} clusters", True)

    def _cluster(self, model: object, chosen: Sequence[Kernel], rng: np.random.Generator) -> list[np.ndarray]:
        """Write the clustered weights into the model; return the label of each weight, an array for each kernel."""
        found = []
        if self.scope == "model":
            together = np.concatenate([kernel.value.ravel() for kernel in chosen])
            codebook, labels = cluster(together, self.clusters, self.iterations, self.start, rng)
            parts = np.split(labels, np.cumsum([kernel.size for kernel in chosen])[:-1])
            found = [(codebook, part.reshape(k.value.shape)) for k, part in zip(chosen, parts, strict=True)]
        elif self.scope == "layer":
            found = [cluster(kernel.value, self.clusters, self.iterations, self.start, rng) for kernel in chosen]
        else:
            found = [self._by_channel(kernel.value, rng) for kernel in chosen]
        for kernel, (codebook, labels) in zip(chosen, found, strict=True):
            get_variable(model, kernel.name).assign(codebook[labels])
        return [labels for _, labels in found]

    def _by_channel(self, weights: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the codebooks of all channels, one after the other, and labels into them."""
        channels = weights.shape[-1]
        flat = weights.reshape(-1, channels)
        each = [cluster(flat[:, c], self.clusters, self.iterations, self.start, rng) for c in range(channels)]
        labels = np.stack([labels.astype(np.int32) + self.clusters * c for c, (_, labels) in enumerate(each)], axis=-1)
        return np.concatenate([codebook for codebook, _ in each]), labels.reshape(weights.shape)


def cluster(
    weights: np.ndarray,
    clusters: int,
    iterations: int = 100,
    start: Start = "linear",
    rng: np.random.Generator | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (codebook float32 [clusters], labels uint16 of the shape of ``weights``) by one-dimensional k-means.

    Exact zeros keep a cluster of their own, whose value is zero. On sorted values a cluster is an interval, so an
    iteration costs ``clusters`` binary searches.

    Args:
        weights: float32, of any shape.
        clusters: values of the codebook.
        iterations: at most.
        start: as in :class:`Share`.
        rng: what ``kmeans++`` draws with.
    """
    flat = weights.ravel().astype(np.float32, copy=False)
    values = np.sort(flat)
    zeros = _zeros(values)
    has_zeros = zeros.stop > zeros.start
    if has_zeros:
        values = np.concatenate([values[: zeros.start], values[zeros.stop :]])
    count = clusters - has_zeros
    centroids = _lloyd(values, count, iterations, start, rng) if values.size else np.zeros(0, np.float32)
    borders = ((centroids[1:].astype(np.float64) + centroids[:-1]) / 2).astype(np.float32)
    labels = np.zeros(flat.size, np.uint16)
    for first in range(0, flat.size, _CHUNK):
        part = flat[first : first + _CHUNK]
        nearest = np.searchsorted(borders, part)
        labels[first : first + _CHUNK] = np.where(part == 0, 0, nearest + 1) if has_zeros else nearest
    codebook = np.zeros(clusters, np.float32)
    codebook[has_zeros : has_zeros + centroids.size] = centroids
    return codebook, labels.reshape(weights.shape)


def _zeros(values: np.ndarray) -> slice:
    """Return where the zeros are in sorted values."""
    return slice(int(np.searchsorted(values, 0, side="left")), int(np.searchsorted(values, 0, side="right")))


def _lloyd(
    values: np.ndarray, count: int, iterations: int, start: Start, rng: np.random.Generator | None
) -> np.ndarray:
    """Return up to ``count`` centroids float32, rising, of sorted values."""
    changes = np.flatnonzero(values[1:] != values[:-1])
    if len(changes) < count:
        return values[np.concatenate([[0], changes + 1])]
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    centroids = _START[start](values, count, rng or np.random.default_rng(0))
    for _ in range(iterations):
        edges = np.searchsorted(values, ((centroids[1:] + centroids[:-1]) / 2).astype(np.float32))
        bounds = np.concatenate([[0], edges, [values.size]])
        sizes = np.diff(bounds)
        means = np.diff(sums[bounds]) / np.maximum(sizes, 1)
        renewed = np.where(sizes > 0, means, centroids)
        if np.array_equal(renewed, centroids):
            break
        centroids = renewed
    return np.sort(centroids).astype(np.float32)


def _linear(values: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    return np.linspace(float(values[0]), float(values[-1]), count)


def _density(values: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    places = ((np.arange(count) + 0.5) / count * values.size).astype(np.int64)
    # Values that come often would start several centroids at one place, where all but one would stay idle.
    distinct = np.unique(values[places].astype(np.float64))
    idle = count - distinct.size
    return np.sort(np.concatenate([distinct, np.linspace(float(values[0]), float(values[-1]), idle)]))


def _plus_plus(values: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    sample = values[:: max(1, values.size // _SAMPLE)].astype(np.float64)
    centroids = np.empty(count)
    centroids[0] = sample[rng.integers(sample.size)]
    distance = (sample - centroids[0]) ** 2
    for number in range(1, count):
        total = distance.sum()
        chosen = rng.choice(sample.size, p=distance / total) if total else rng.integers(sample.size)
        centroids[number] = sample[chosen]
        distance = np.minimum(distance, (sample - centroids[number]) ** 2)
    return np.sort(centroids)


_START = {"linear": _linear, "density": _density, "kmeans++": _plus_plus}
