"""Run in a process of its own by ``test_distribution``: trains small models and leaves their weights.

python -m tests.distributed_training mirrored|multi_worker <folder> <case>...
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import compress  # noqa: F401  (sets TF_USE_LEGACY_KERAS before anything imports TensorFlow)
from compress.quiet import import_tensorflow

import_tensorflow()

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
import tf_keras  # noqa: E402

from compress.candidate import Guarantee  # noqa: E402
from compress.checkpoints import draws_by_step  # noqa: E402
from compress.data.source import NO_LABEL, Augmentation, Data, Split  # noqa: E402
from compress.distribution.replicas import Distribution  # noqa: E402
from compress.distribution.settings import Mirrored, MultiWorker  # noqa: E402
from compress.errors import CompressError  # noqa: E402
from compress.graph.kernels import get_variable, get_weight  # noqa: E402
from compress.strategies.distillation.losses.hints import Hints  # noqa: E402
from compress.strategies.distillation.losses.soft_targets import SoftTargets  # noqa: E402
from compress.strategies.distillation.mutual import PeerTerm  # noqa: E402
from compress.strategies.distillation.pairing import Pair  # noqa: E402
from compress.strategies.distillation.teacher import Teacher  # noqa: E402
from compress.strategies.distillation.terms import LayerTerm, LogitsTerm  # noqa: E402
from compress.strategies.pruning.masks import Axes, Masking, Pattern  # noqa: E402
from compress.strategies.pruning.schedules import Movement  # noqa: E402
from compress.strategies.pruning.zeros import Zeros  # noqa: E402
from compress.strategies.quantization.trained_ternary import TrainedTernaryQuantizer  # noqa: E402
from compress.training import Recovery, train  # noqa: E402

layers = tf_keras.layers
STEPS = 4
BATCH = 12
MASK = np.random.default_rng(1).random((3, 3, 1, 4)) < 0.6


def model(seed: int = 0) -> tf_keras.Model:
    """A fused batch norm, one that is not, and a regulariser."""
    tf_keras.utils.set_random_seed(seed)
    image = tf_keras.Input((6, 6, 1))
    x = layers.Conv2D(4, 3, use_bias=False, name="conv")(layers.Rescaling(1 / 255)(image))
    x = layers.Flatten()(layers.ReLU()(layers.BatchNormalization(name="fused")(x)))
    x = layers.Dense(8, use_bias=False, name="inner", kernel_regularizer=tf_keras.regularizers.L2(0.01))(x)
    x = layers.ReLU()(layers.BatchNormalization(name="plain")(x))
    return tf_keras.Model(image, layers.Dense(3, name="dense")(x))


def data(unlabelled: int = 0) -> Data:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (60, 6, 6, 1)).astype(np.uint8), rng.integers(0, 3, 60)
    y[:unlabelled] = NO_LABEL
    return Data("random", Split(x, y), None, None, 3, Augmentation(shift=1, mirror=True), "identity")  # type: ignore[arg-type]


def recovery(steps: int = STEPS, **changes: Any) -> Recovery:
    values = {"learning_rate": 0.1, "weight_decay": 0.05, "mixup": 0.7, "batch_size": BATCH, "schedule": "constant"}
    return Recovery(epochs=steps * BATCH / 60, **{**values, **changes})


def gradients(net: tf_keras.Model) -> dict[str, Any]:
    """One step without momentum: how far the weights go is the gradient. Most samples have no label."""
    return {"data": data(45), "recovery": recovery(1, momentum=0.0)}


def guaranteed(net: tf_keras.Model) -> dict[str, Any]:
    """Augmentation, mixup, weight decay, batch norms, zeros; soft targets and hints of a teacher in the step."""
    guarantees: tuple[Guarantee, ...] = (Zeros("prune", {"conv/kernel": MASK}),)
    teacher = Teacher(model(1))
    hints = LayerTerm(Hints(weight=0.003), teacher, [Pair("inner", "inner", (8,), (8,))])
    terms = [LogitsTerm(SoftTargets(weight=0.5), [teacher], 2.0, 0.5), hints]
    return {"recovery": recovery(clip_norm=0.5), "guarantees": guarantees, "terms": terms}


def quantized(net: tf_keras.Model) -> dict[str, Any]:
    """Variables of a strategy's own: latent weights, levels, masks, a peer with batch norms."""
    quantizers = {"inner/kernel": TrainedTernaryQuantizer(get_weight(net, "inner/kernel"), 0.05)}
    masking = Masking([Axes(-2, (-1,))], Pattern(), "layer", [1.0])
    schedule = Movement([get_variable(net, "dense/kernel")], masking, 0.0, 0.6, ramp=0.5)
    terms = [PeerTerm([model(2)], 1.0, 1e-2)]
    return {
        "recovery": recovery(mixup=0.0, clip_norm=0.5),
        "quantizers": quantizers,
        "projections": [schedule],
        "terms": terms,
    }


CASES: tuple[Callable[[tf_keras.Model], dict[str, Any]], ...] = (gradients, guaranteed, quantized)


def trained(distribution: Distribution, cases: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the loss of each case and the weights that it ends with."""
    arrays = {}
    for case in CASES:
        if case.__name__ in cases:
            net = model()
            history = train(net, seed=3, distribution=distribution, **{"data": data(), **case(net)})
            arrays[f"{case.__name__}/loss"] = np.array(history.loss)
            arrays |= {f"{case.__name__}/{weight.name}": np.asarray(weight) for weight in net.weights}
    return arrays


def dropped(distribution: Distribution) -> np.ndarray:
    """Return what dropout leaves of ones in each replica of this process."""
    image = tf_keras.Input((64,))
    net = tf_keras.Model(image, layers.Dropout(0.5)(image))

    @tf.function
    def run() -> Any:
        return distribution.strategy.run(lambda: net(tf.ones([1, 64]), training=True))

    with draws_by_step([net], 0, tf.Variable(0, dtype=tf.int64)):
        return np.concatenate([np.asarray(v) for v in distribution.strategy.experimental_local_results(run())])


def other_models(distribution: Distribution) -> str:
    """Return what the training of a model that differs between the workers is refused with."""
    try:
        train(model(distribution.worker), data(), recovery(), seed=3, distribution=distribution, where="stage second")
    except CompressError as error:
        return str(error)
    return ""


def main(kind: str, folder: Path, cases: Sequence[str]) -> None:
    """Train the cases, and leave what came out of them."""
    settings = Mirrored(("CPU:0", "CPU:1")) if kind == "mirrored" else MultiWorker()
    distribution = settings.start()
    arrays = trained(distribution, cases)
    if kind == "mirrored":
        arrays["dropped"] = dropped(distribution)
    else:
        arrays["refused"] = np.array(other_models(distribution))
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "weights.npz", **arrays)
    distribution.wait()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
