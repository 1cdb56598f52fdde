"""TFMOT's MNIST tutorials by the toolkit itself: what its own functions reach with the tutorials' settings.

    python benchmarks/tfmot_tutorials.py [seed]

``python -m compress.reproduce tfmot_mnist_tutorials`` is the other side. Here the same images (without the validation
part), the same network, and Adam as in the tutorials; files are plain conversions, sizes those of the ``.tflite`` file
under gzip. Writes ``results/tfmot_tutorials.md``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from compress.quiet import import_tensorflow

import_tensorflow()

import tensorflow as tf  # noqa: E402
import tensorflow_model_optimization as tfmot  # noqa: E402
import tf_keras  # noqa: E402

from compress.cli.experiment import machine, provenance  # noqa: E402
from compress.data.npz import KerasDataset  # noqa: E402
from compress.data.source import Data, Split  # noqa: E402
from compress.metrics.accuracy import file_accuracy  # noqa: E402
from compress.metrics.size import file_bytes, gzip_bytes  # noqa: E402

Model, layers = tf_keras.Model, tf_keras.layers


@dataclass(frozen=True)
class Measured:
    """An exported file: accuracy in percent, its bytes, and its bytes under gzip."""

    accuracy: float
    size: int
    zipped: int


def network() -> Model:
    """Return the tutorials' network, untrained; it reads images between 0 and 1."""
    image = layers.Input((28, 28))
    x = layers.Conv2D(12, 3, activation="relu")(layers.Reshape((28, 28, 1))(image))
    return Model(image, layers.Dense(10)(layers.Flatten()(layers.MaxPooling2D()(x))))


def fit(model: Model, part: Split, epochs: int, batch: int, rate: float = 1e-3, callbacks: tuple = ()) -> Model:
    """Train as the tutorials do."""
    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(tf_keras.optimizers.Adam(rate), loss)
    model.fit(part.x, part.y, batch_size=batch, epochs=epochs, verbose=0, callbacks=list(callbacks))
    return model


def measured(model: Model, data: Data, small: bool) -> Measured:
    """Convert, with the converter's default optimisation if ``small``, and measure the file on the test part."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT] if small else []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.tflite")
        file.write_bytes(converter.convert())
        return Measured(file_accuracy(file, data.test), file_bytes(file), gzip_bytes(file))


def pruned(model: Model, data: Data, sparsity: tuple[float, float], epochs: int) -> Model:
    """Prune by magnitude, from the first to the second sparsity."""
    schedule = tfmot.sparsity.keras.PolynomialDecay(*sparsity, 0, epochs * -(-len(data.train) // 128))
    wrapped = tfmot.sparsity.keras.prune_low_magnitude(_copy(model), pruning_schedule=schedule)
    fit(wrapped, data.train, epochs, 128, callbacks=(tfmot.sparsity.keras.UpdatePruningStep(),))
    return tfmot.sparsity.keras.strip_pruning(wrapped)


def clustered(model: Model, data: Data, clusters: int, start: str, *, keep_zeros: bool = False) -> Model:
    """Cluster, and train the centroids for an epoch."""
    starts = tfmot.clustering.keras.CentroidInitialization
    settings = {"number_of_clusters": clusters, "cluster_centroids_init": getattr(starts, start)}
    if keep_zeros:
        from tensorflow_model_optimization.python.core.clustering.keras.experimental import cluster

        wrapped = cluster.cluster_weights(_copy(model), preserve_sparsity=True, **settings)
    else:
        wrapped = tfmot.clustering.keras.cluster_weights(_copy(model), **settings)
    return tfmot.clustering.keras.strip_clustering(fit(wrapped, data.train, 1, 500, 1e-5))


def quantization_aware(model: Model, data: Data) -> Model:
    """Train with rounded weights, for an epoch of 1,000 images."""
    return fit(tfmot.quantization.keras.quantize_model(_copy(model)), data.train.take(1000), 1, 500)


def _scaled(part: Split) -> Split:
    return Split((part.x / 255).astype("float32"), part.y)


def _copy(model: Model) -> Model:
    copied = tf_keras.models.clone_model(model)
    copied.set_weights(model.get_weights())
    return copied


def rows(data: Data) -> list[tuple[str, str, Measured, Measured]]:
    """Return recipe, claim, baseline and result of each tutorial."""
    base = fit(network(), data.train, 4, 32)
    plain = measured(base, data, small=False)
    found: list[tuple[str, str, Measured, Measured]] = []

    def add(recipe: str, claim: str, make: Callable[[], Model], small: bool) -> Model:
        model = make()
        found.append((recipe, claim, plain, measured(model, data, small)))
        print(found[-1], flush=True)
        return model

    zeros = add("pruning: 50 to 80 % zeros", "3x", lambda: pruned(base, data, (0.5, 0.8), 2), False)
    add("pruning, then 8 bits after training", "10x", lambda: zeros, True)
    few = add("clustering: 16 values", "6x", lambda: clustered(base, data, 16, "LINEAR"), False)
    add("clustering, then 8 bits after training", "8x", lambda: few, True)
    add("quantization-aware training", "4x (not zipped)", lambda: quantization_aware(base, data), True)
    half = pruned(base, data, (0.5, 0.5), 3)
    for keep, name, claim in ((False, "lost", "1x"), (True, "kept", "1.6x less than the row above")):
        add(
            f"50 % zeros, 8 values, zeros {name}",
            claim,
            lambda keep=keep: clustered(half, data, 8, "KMEANS_PLUS_PLUS", keep_zeros=keep),
            True,
        )
    return found


def main() -> None:
    """Measure and write the page."""
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    tf_keras.utils.set_random_seed(seed)
    data = KerasDataset(dataset="mnist").load()
    data = replace(data, **{name: _scaled(getattr(data, name)) for name in ("train", "validation", "test")})
    lines = [
        "# TFMOT's MNIST tutorials by TFMOT's own functions",
        "",
        "Settings as in the tutorials; `results/tfmot_mnist_tutorials.md` has the same recipes by this project's "
        "strategies.",
        "",
        "| recipe | claim | top-1 %, reference | top-1 % | points | times smaller, zipped .tflite | .tflite as it is |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {recipe} | {claim} | {base.accuracy:.2f} | {own.accuracy:.2f} | {own.accuracy - base.accuracy:+.2f} "
            f"| {base.zipped / own.zipped:.2f} | {base.size / own.size:.2f} |"
            for recipe, claim, base, own in rows(data)
        ),
        *provenance(f"python benchmarks/tfmot_tutorials.py {seed}", [seed], machine()),
    ]
    Path("results/tfmot_tutorials.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
