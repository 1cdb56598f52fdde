"""A finished pipeline to record, without one having run."""

from __future__ import annotations

from pathlib import Path

import tf_keras

from compress.candidate import Artifact, Candidate, Latency, Numbers, Storage
from compress.pipeline.pipeline import Result
from compress.pipeline.stage import StageResult
from compress.tracking.report import make_report, write_report
from compress.tracking.store import TrackingSettings

SECRET = "hunter2"
NUMBERS = Numbers(
    accuracy=91.0,
    accuracy_keras=91.5,
    params=100,
    nonzero_params=50,
    macs=1000,
    tflite_bytes=4000,
    gzip_bytes=3000,
    packed_bytes=None,
    peak_memory_bytes=64,
    latency_ms=Latency(1.0, 2.0, 3.0, 1.5, 200, 1),
)


def finished(folder: Path, **changes) -> tuple[dict, Result]:
    values = tf_keras.Input((2,))
    numbers = Numbers(**{**vars(NUMBERS), **changes})
    layers = {"dense": {"channels": 2, "params": 4, "nonzero": 2, "macs": 8}}
    baseline = StageResult("baseline", {}, NUMBERS, 1.0, (), (), (), layers)
    last = StageResult("prune", {}, numbers, 2.5, (), (), (), layers)
    candidate = Candidate(tf_keras.Model(values, values, name="tiny"))
    result = Result(baseline, (last,), candidate, Artifact(folder / "model.tflite", Storage()))
    config = {"data": {"_target_": "a.Digits"}, "board": {"_target_": "b.Host"}, "seed": 0}
    report = make_report(result, config, seconds=3.0)
    folder.mkdir(exist_ok=True)
    write_report(report, folder / "report.json")
    (folder / "model.tflite").write_bytes(b"file")
    (folder / "model.cmp").write_bytes(b"packed")
    (folder / "layers.png").write_bytes(b"picture")
    return report, result


def config_of(store: TrackingSettings, seed: int = 0) -> dict:
    secret = {"enabled": True, "experiment": store.experiment, "uri": f"https://me:{SECRET}@mlflow.example"}
    return {"seed": seed, "strategy": {"prune": {"sparsity": 0.5}}, "tracking": secret, "long": "x" * 2000}
