"""One sensitivity pass, from its configuration to its table: what ``compress.sensitivity`` does."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from omegaconf import DictConfig, OmegaConf

from compress.cli.build import make_plan, make_selection
from compress.cli.construct import check, to_plain
from compress.cli.techniques import make_techniques
from compress.distribution.settings import Single
from compress.errors import CompressError
from compress.pipeline.folder import alone_in
from compress.pipeline.stage import Stage
from compress.search.sensitivity import Sensitivity, Survey, measure_sensitivity
from compress.search.table import heat_map, markdown, print_table
from compress.search.technique import UNTRAINED
from compress.tracking.recorder import log_survey, meet_store

_LOG = logging.getLogger("compress")
_OWN = ("images", "only", "skip")
_STAGE = "auto"
"""Under whose name the probes are remembered: that of the stage that will look for them."""


def run_survey(config: DictConfig, folder: Path) -> Sensitivity:
    """Measure; leave ``sensitivity.md``, ``.json`` and ``.png`` in ``folder`` and in MLflow; print the table.

    Raises:
        CompressError: at the first value that is not valid, or if the model cannot be changed.
    """
    import tf_keras

    tf_keras.backend.clear_session()
    plain = to_plain(config)
    own = {key: plain.pop(key, None) for key in _OWN}
    if plain.get("strategy"):
        raise CompressError(
            "strategy",
            expected="none: the model is looked at as it is",
            received="+".join(plain["strategy"]),
            fix="Leave strategy=... out, or bring the compressed model: model=file model.path=model.keras.",
        )
    plan = make_plan(OmegaConf.create(plain))
    if plan.distribution != Single():
        raise CompressError(
            "distribution",
            expected="none: probes are no trainings",
            received=type(plan.distribution).__name__,
            fix="Leave distribution=... out.",
        )
    techniques = make_techniques(plain["techniques"], "techniques")
    images = check(Annotated[int, Ge(1)], own["images"], "images")
    stage = Stage(_STAGE, Survey(techniques, images), make_selection(own["only"], own["skip"], ""), UNTRAINED)
    given = plan.model.exported()
    if given is not None:
        raise CompressError(
            "model", expected="a model with Keras layers", received=given.name, fix="Bring what it was made from."
        )
    meet_store(plan.tracking)
    with (
        alone_in(folder, "hydra.run.dir"),
        tempfile.TemporaryDirectory(prefix=".stages-", dir=folder) as work,
    ):
        candidate, _, context = plan.pipeline().before_first(stage, Path(work))
        found = measure_sensitivity(candidate, techniques, context, images)
    title = f"{candidate.model.name}, {context.data.name}, seed {plan.seed}"
    _write(folder / "sensitivity.json", json.dumps(found.to_json(), indent=2) + "\n")
    _write(folder / "sensitivity.md", markdown(found, title))
    heat_map(found, title, folder / "sensitivity.png")
    print_table(found, title)
    log_survey(plan.tracking, plain, folder, sys.argv[1:], _metrics(found))
    _LOG.info("sensitivity: %s", folder / "sensitivity.md")
    return found


def _metrics(found: Sensitivity) -> dict[str, Any]:
    return {
        "probes": len(found.probes),
        "refused": sum(probe.refused is not None for probe in found.probes),
        "images": found.images,
    }


def _write(target: Path, text: str) -> None:
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text(text)
    partial.replace(target)
