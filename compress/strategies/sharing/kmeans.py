"""Weight sharing by k-means: each kernel keeps a codebook of few values.

Source: Han et al., Deep Compression (arXiv 1510.00149, section 3): linear initialisation, k-means within a layer,
centroids trained on.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from annotated_types import Ge, Le
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate, Effect, Skipped
from compress.graph.fold import fold_batch_norm, merged_on_export
from compress.graph.kernels import get_variable, kernels, without_kernel
from compress.strategies.sharing.codebook import Codebook
from compress.strategies.strategy import STRICT, Context, Strategy


@dataclass(frozen=True, config=STRICT)
class Share(Strategy):
    """Cluster the weights of every selected kernel into ``clusters`` values, zero counted as one if there are zeros.

    Batch norms that follow a selected layer are folded into it first: the exported file holds the folded kernel,
    so that is the one whose values must be few. A kernel with no more weights than clusters is left alone, and one into
    which the export merges a normalisation that could not be folded.
    """

    clusters: Annotated[int, Ge(2), Le(65536)] = 32
    iterations: Annotated[int, Ge(1)] = 100

    effects = frozenset({Effect.TRAIN, Effect.SHARE})
    establishes = Codebook

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Fold, cluster, and train the centroids."""
        names = context.selection.names(candidate.model)
        model = fold_batch_norm(candidate.model, names)
        merged = merged_on_export(model)
        labels: dict[str, np.ndarray] = {}
        skipped = [
            Skipped(layer.name, f"weights of {type(layer).__name__} layers are not clustered")
            for layer in without_kernel(model)
            if layer.name in names
        ]
        for kernel in kernels(model):
            if kernel.layer.name not in names:
                continue
            if kernel.layer.name in merged:
                skipped.append(
                    Skipped(kernel.layer.name, "the export merges a normalisation next to it into its kernel")
                )
                continue
            if kernel.size <= self.clusters:
                skipped.append(Skipped(kernel.layer.name, f"{kernel.size} weights, {self.clusters} clusters", True))
                continue
            weights = kernel.value
            codebook, labels[kernel.name] = cluster(weights, self.clusters, self.iterations)
            get_variable(model, kernel.name).assign(codebook[labels[kernel.name]])
        if not labels:
            raise context.nothing_done(f"a kernel with more than {self.clusters} weights", skipped)
        shared = candidate.evolve(model=model, skipped=context.skip(skipped)).with_guarantee(
            Codebook(context.stage, self.clusters, {k: v.astype(np.uint16) for k, v in labels.items()})
        )
        return context.recover(shared)


def cluster(weights: np.ndarray, clusters: int, iterations: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Return (codebook float32 [clusters], labels of the shape of ``weights``) by one-dimensional k-means.

    Starts linearly between the extremes. Exact zeros keep a cluster of their own, whose value is zero. On sorted
    values a cluster is an interval, so an iteration costs ``clusters`` binary searches.
    """
    flat = weights.ravel().astype(np.float64)
    has_zeros = bool((flat == 0).any())
    values = np.sort(flat[flat != 0]) if has_zeros else np.sort(flat)
    count = clusters - has_zeros
    centroids = _lloyd(values, count, iterations) if values.size else np.zeros(0)
    nearest = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, flat) if centroids.size else np.zeros(flat.size)
    codebook = np.zeros(clusters)
    codebook[has_zeros : has_zeros + centroids.size] = centroids
    labels = np.where(flat == 0, 0, nearest + 1) if has_zeros else nearest
    return codebook.astype(np.float32), labels.astype(np.int64).reshape(weights.shape)


def _lloyd(values: np.ndarray, count: int, iterations: int) -> np.ndarray:
    distinct = np.unique(values)
    if distinct.size <= count:
        return distinct
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centroids = np.linspace(values[0], values[-1], count)
    for _ in range(iterations):
        edges = np.searchsorted(values, (centroids[1:] + centroids[:-1]) / 2)
        bounds = np.concatenate([[0], edges, [values.size]])
        sizes = np.diff(bounds)
        means = np.diff(sums[bounds]) / np.maximum(sizes, 1)
        renewed = np.where(sizes > 0, means, centroids)
        if np.array_equal(renewed, centroids):
            break
        centroids = renewed
    return np.sort(centroids)
