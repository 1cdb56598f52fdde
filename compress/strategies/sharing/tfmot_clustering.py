"""Clustering as the TensorFlow Model Optimization Toolkit does it, for layers that it can carry.

Its layers train their weights and their centroids, and choose anew at every step which centroid a weight belongs to.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Literal

import tf_keras

from compress.errors import CompressError
from compress.graph.kernels import kernel_attributes
from compress.graph.rewrite import copy_model
from compress.graph.softmax import without_softmax

STARTS: Mapping[str, str] = MappingProxyType(
    {"linear": "LINEAR", "density": "DENSITY_BASED", "kmeans++": "KMEANS_PLUS_PLUS"}
)
"""Its names of where clustering starts."""


def is_clusterable(layer: tf_keras.layers.Layer) -> bool:
    """Say whether its registry clusters all kernels of the layer."""
    from tensorflow_model_optimization.python.core.clustering.keras.clustering_registry import ClusteringRegistry

    clustered = ClusteringRegistry._LAYERS_WEIGHTS_MAP.get(type(layer), ())
    return bool(clustered) and set(clustered) == set(kernel_attributes(layer))


def wrapped_by_tfmot(
    model: tf_keras.Model,
    layers: Collection[str],
    clusters: int,
    *,
    start: Literal["linear", "density", "kmeans++"],
    gradient: Literal["mean", "sum"],
    keep_zeros: Collection[str],
    where: str,
) -> tf_keras.Model:
    """Return a copy whose ``layers`` cluster their kernels while they train, and that gives logits.

    Args:
        model: a flat model.
        layers: names of layers for which :func:`is_clusterable` holds.
        clusters: centroids of each kernel.
        start: where they start.
        gradient: of a centroid: the mean or the sum of those of its weights.
        keep_zeros: layers whose zeros stay.
        where: for the error.

    Raises:
        CompressError: with TFMOT's own reason, if it refuses the model.
    """
    from tensorflow_model_optimization.python.core.clustering.keras.cluster_config import (
        CentroidInitialization,
        GradientAggregation,
    )
    from tensorflow_model_optimization.python.core.clustering.keras.experimental.cluster import cluster_weights

    def wrapped(layer: tf_keras.layers.Layer) -> tf_keras.layers.Layer:
        if layer.name not in layers:
            return layer
        return cluster_weights(
            layer,
            clusters,
            CentroidInitialization[STARTS[start]],
            preserve_sparsity=layer.name in keep_zeros,
            cluster_gradient_aggregation=GradientAggregation.AVG if gradient == "mean" else GradientAggregation.SUM,
        )

    # Under TFMOT's layers nobody sees a softmax at the end.
    ending = without_softmax(copy_model(model))
    try:
        return tf_keras.models.clone_model(ending, clone_function=wrapped)
    except Exception as error:
        # It raises what it likes; any of it is a refusal.
        raise CompressError(
            where,
            expected="a model that TFMOT's cluster_weights takes",
            received=" ".join(str(error).split())[:200],
            fix="Use the scheme that any model can be trained with: scheme=own.",
        ) from error


def unwrap(wrapped: tf_keras.Model, model: tf_keras.Model) -> tf_keras.Model:
    """Return ``model`` with the trained and clustered weights."""
    from tensorflow_model_optimization.python.core.clustering.keras.cluster import strip_clustering

    stripped, trained = strip_clustering(wrapped), copy_model(model)
    for layer in stripped.layers:
        trained.get_layer(layer.name).set_weights(layer.get_weights())
    return trained
