"""The reference model: what every pipeline starts from, and the default teacher."""

from __future__ import annotations

import dataclasses

import tf_keras

from compress.checkpoints import Checkpoint
from compress.data.source import Data
from compress.distribution.replicas import SINGLE, Distribution
from compress.graph.rewrite import copy_model
from compress.models.source import ModelSource, check_finite
from compress.progress import progress
from compress.training import Recovery, train


def make_reference(
    source: ModelSource,
    data: Data,
    seed: int,
    checkpoint: Checkpoint | None = None,
    distribution: Distribution = SINGLE,
) -> tf_keras.Model:
    """Return the model of ``source`` with its weights; trained on ``data``, as scheduled, if there are none for it.

    ``checkpoint``: where that training leaves its state; ``distribution``: who computes it.

    Raises:
        CompressError: if the model does not fit the data, or its weights are not finite.
    """
    # Keras counts the layers that it names by itself; the exported bytes must not depend on what was built before.
    tf_keras.backend.reset_uids()
    model = copy_model(source.build(data, seed))
    fitted = data.fitted_to(model, f"model {model.name}")
    origin = source.origin()
    schedule = origin.schedule
    if schedule is not None and not origin.untrained:
        with progress(f"training {model.name} from scratch") as shown:
            train(
                model,
                fitted,
                Recovery(**dataclasses.asdict(schedule)),
                seed=seed,
                progress=shown,
                where=f"model {model.name}, training",
                rate_key="model.train.learning_rate",
                checkpoint=checkpoint,
                distribution=distribution,
            )
    check_finite(model)
    return model
