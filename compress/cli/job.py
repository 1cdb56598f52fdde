"""One pipeline, from its configuration to its report: what ``compress.run`` and ``compress.reproduce`` share."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from omegaconf import DictConfig

from compress.cli.build import make_plan
from compress.cli.construct import to_plain
from compress.cli.distributed import folder_of, start_distribution
from compress.cli.errors import translate
from compress.cli.failures import record_failure
from compress.deploy.card import make_card
from compress.deploy.interface import interface_of
from compress.deploy.verification import verify
from compress.errors import CompressError, GivenUp
from compress.metrics.tflite_file import TFLiteFile
from compress.pipeline.folder import alone_in
from compress.pipeline.stage import StageResult
from compress.search.trial import note_given_up, refuse_hopeless
from compress.tracking.charts import layers_picture, noise_picture
from compress.tracking.recorder import Recorder, metrics_of, open_recorder
from compress.tracking.report import make_report, model_name, print_table, write_report

_LOG = logging.getLogger("compress")


def run_job(
    config: DictConfig,
    folder: Path,
    sweep: Path | None,
    overrides: Sequence[str] = (),
    give_up: Mapping[str, float] = MappingProxyType({}),
) -> float:
    """Run one pipeline; leave ``report.json``, the models and an MLflow run; return the final accuracy.

    Args:
        config: the composed configuration.
        folder: where the files go.
        sweep: the folder of the multirun that the job belongs to, if any.
        overrides: what the command line changed for this job.
        give_up: metric -> the limit below which, after any stage, there is no hope.

    Raises:
        GivenUp: if there is none.
    """
    import tf_keras

    plain = to_plain(config)
    # Before TensorFlow runs its first operation.
    distribution = start_distribution(plain, sweep)
    folder = folder_of(distribution, folder)
    tf_keras.backend.clear_session()
    started = time.perf_counter()
    plan = make_plan(config)
    tracking = replace(plan.tracking, enabled=plan.tracking.enabled and distribution.chief)
    with (
        alone_in(folder, "hydra.run.dir" if sweep is None else "hydra.sweep.dir"),
        open_recorder(tracking, plain, sweep, command=sys.argv[1:], overrides=overrides) as recorder,
    ):
        pipeline = replace(plan.pipeline(), distribution=distribution)
        pipeline = replace(pipeline, on_stage=lambda result: _record(recorder, result, give_up))
        result = pipeline.run(folder)
        keras_file = folder / "model.keras"
        keras_file.unlink(missing_ok=True)
        if result.keras_model is not None:
            plan.model.save(result.keras_model, keras_file)
        file = TFLiteFile.read(result.artifact.path)
        report = make_report(
            result,
            plain,
            seconds=time.perf_counter() - started,
            interface=interface_of(file, model_name(result, plain), pipeline.data.pixels, pipeline.data.labels),
            verification=verify(file.content, result.last.agreement, plan.board),
        )
        layers_picture(result.baseline.layers, result.last.layers, str(report["strategy"]), folder / "layers.png")
        noise_file = folder / "noise.png"
        noise_file.unlink(missing_ok=True)
        if result.last.noise:
            noise_picture(result.last.noise, f"{report['strategy']}, against the float file", noise_file)
        (folder / "card.md").write_text(make_card(report))
        write_report(report, folder / "report.json")
        recorder.finish(report, result, folder)
    distribution.wait()
    print_table(report)
    _LOG.info("report: %s", folder / "report.json")
    return result.final.accuracy


def run_one_of_many(
    config: DictConfig,
    folder: Path,
    sweep: Path,
    number: int,
    overrides: Sequence[str],
    give_up: Mapping[str, float] = MappingProxyType({}),
) -> float | None:
    """Run one job of a multirun and return its accuracy; None if it failed or was given up: the other jobs go on.

    Why is left in the job's folder, and told at the end of the multirun.
    """
    note_given_up(folder, None)
    try:
        return run_job(config, folder, sweep, overrides, give_up)
    except GivenUp as reason:
        note_given_up(folder, str(reason))
        _LOG.info("job %s given up: %s", number, reason)
    except Exception as error:
        if config.debug:
            raise
        mistake = translate(error, overrides) if isinstance(error, (CompressError, OSError)) else None
        record_failure(folder, str(number), overrides, mistake or error)
        if mistake is not None:
            _LOG.error("job %s stopped: %s", number, mistake)
        else:
            _LOG.exception("job %s crashed", number)
    return None


def _record(recorder: Recorder, result: StageResult, give_up: Mapping[str, float]) -> None:
    recorder.stage(result)
    # The baseline is the same for all pipelines: it says nothing about this one.
    if result.name != "baseline":
        refuse_hopeless(result.name, metrics_of(result.numbers), give_up)
