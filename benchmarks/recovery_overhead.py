"""Training throughput of every strategy's recovery against a bare ``tf_keras`` ``fit`` of the same model.

    python benchmarks/recovery_overhead.py [overrides]     e.g. model=digits_cnn data=digits

For each strategy the model that comes out of it is trained twice, side by side: by the strategy's own recovery, and by
``compile`` and ``fit`` on the same batches. Both are timed from the tenth step on, without the compilation. The pairs
are interleaved; the median of the ratios counts. Writes ``results/recovery_overhead.md``.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from compress.quiet import import_tensorflow

import_tensorflow()

import tf_keras  # noqa: E402

from compress.batches import training_batches  # noqa: E402
from compress.candidate import Candidate  # noqa: E402
from compress.cli.build import make_plan  # noqa: E402
from compress.cli.compose import compose_config  # noqa: E402
from compress.cli.experiment import machine, provenance  # noqa: E402
from compress.cli.places import conf_dir  # noqa: E402
from compress.graph.rewrite import copy_model  # noqa: E402
from compress.reference import make_reference  # noqa: E402
from compress.strategies.strategy import Context  # noqa: E402
from compress.training import train  # noqa: E402
from compress.training_step import LossTerm, Projection, WeightQuantizer  # noqa: E402

SHORT, LONG, ROUNDS = 10, 60, 3
DEFAULT = ("model=resnet20", "data=cifar10")
NOTES = {
    "distill": "teacher outputs computed once before training (no augmentation), its time left out",
    "distill, live teacher": "augmented images: the teacher runs in every step, one forward pass more than a bare fit "
    "has. Folding its batch norms helped; running it in the input pipeline, beside the step, did not",
}


@dataclass(frozen=True)
class TimedContext(Context):
    """A context whose ``recover`` times itself against a bare ``fit`` instead of finishing the job."""

    ratios: list[float] | None = None

    def recover(
        self,
        candidate: Candidate,
        *,
        projections: Sequence[Projection] = (),
        terms: Sequence[LossTerm] = (),
        quantizers: Mapping[str, WeightQuantizer] = MappingProxyType({}),
    ) -> Candidate:
        """Time ``ROUNDS`` interleaved pairs."""
        batch = self.recovery.batch_size
        epochs = LONG / -(-len(self.data.train) // batch)
        prepared = [_Prepared(term, self) for term in (*terms, *self.distillation(candidate.model))]

        def ours() -> float:
            clock = _Clock()
            train(
                candidate.model,
                self.data,
                replace(self.recovery, epochs=epochs),
                seed=self.seed,
                guarantees=candidate.guarantees,
                projections=projections,
                terms=prepared,
                quantizers=quantizers,
                progress=clock,
            )
            return clock.seconds()

        def bare() -> float:
            model = copy_model(candidate.model)
            model.compile(
                tf_keras.optimizers.SGD(1e-4, momentum=0.9, nesterov=True),
                tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            )
            batches = training_batches(self.data.train, batch, LONG, self.seed, self.data.augmentation)
            pairs = batches.map(lambda x, y, indices: (x, y))
            clock = _Clock()
            read = tf_keras.callbacks.LambdaCallback(
                on_batch_end=lambda step, logs: clock.advance(step + 1, LONG, f"{logs['loss']}")
            )
            model.fit(pairs, epochs=1, steps_per_epoch=LONG, verbose=0, callbacks=[read])
            return clock.seconds()

        for _ in range(ROUNDS):
            ours_seconds = ours()
            self.ratios.append(bare() / ours_seconds)
        return candidate


class _Clock:
    """Stands in for the progress display and takes the time of every step."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def advance(self, done: int, total: int, note: str = "") -> None:
        """Take the time."""
        self._times.append(time.perf_counter())

    def seconds(self) -> float:
        """Return the seconds between step SHORT and the last."""
        return self._times[-1] - self._times[SHORT - 1]


class _Prepared:
    """A loss term that is prepared once, so that the time of it is not counted as training."""

    def __init__(self, term: LossTerm, context: Context) -> None:
        self.task_weight, self.layers, self.variables = term.task_weight, term.layers, term.variables
        self._term = term
        if not getattr(term, "_prepared_for_benchmark", False):
            same_images = not (context.data.augmentation or context.recovery.mixup)
            term.prepare(context.data, context.recovery.batch_size, same_images=same_images)
            term._prepared_for_benchmark = True

    def prepare(self, data, batch_size, *, same_images) -> None:
        pass

    def __call__(self, batch):
        return self._term(batch)


def measure(strategy: str, overrides: Sequence[str], augment: bool) -> list[float]:
    """Return the ratios of throughput, ours over bare, one for each round."""
    plain = [] if augment else ["data.shift=0", *(["data.mirror=false"] if "data=cifar10" in overrides else [])]
    plan = make_plan(
        compose_config(
            [f"strategy={strategy}", "recovery=finetune", "recovery.learning_rate=0.0001", *overrides, *plain]
        )
    )
    pipeline = plan.pipeline()
    reference = make_reference(pipeline.model, pipeline.data, 0)
    data = pipeline.data.fitted_to(reference, "benchmark")
    stage = plan.stages[0]
    ratios: list[float] = []
    context = TimedContext(strategy, data, reference, stage.recovery, 0, ratios=ratios)
    stage.strategy.apply(Candidate(reference), context)
    return ratios


def main() -> None:
    overrides = sys.argv[1:] or list(DEFAULT)
    strategies = sorted(file.stem for file in (conf_dir() / "strategy").glob("*.yaml"))
    rows = []
    for label, strategy, augment in [
        *((name, name, name != "distill") for name in strategies),
        ("distill, live teacher", "distill", True),
    ]:
        ratios = measure(strategy, overrides, augment)
        if not ratios:
            rows.append((label, None, None, None, "does not train"))
            continue
        rows.append((label, statistics.median(ratios), min(ratios), max(ratios), NOTES.get(label, "")))
        print(f"{label}: {statistics.median(ratios):.3f}", flush=True)
    lines = [
        "# Training throughput of every strategy's recovery, relative to a bare fit",
        "",
        "1.00 is the throughput of `tf_keras` `compile` and `fit` on the same model and batches, in the same process, "
        f"interleaved, {ROUNDS} pairs of {LONG - SHORT} steps of 128 images. At least 0.90 is required.",
        "",
        "| strategy | median | lowest | highest | note |",
        "|---|---|---|---|---|",
        *(
            f"| {label} | {note} | | | |"
            if median is None
            else f"| {label} | {median:.3f} | {low:.3f} | {high:.3f} | {note} |"
            for label, median, low, high, note in rows
        ),
        *provenance(f"python benchmarks/recovery_overhead.py {' '.join(overrides)}", [0], machine()),
    ]
    target = Path("results/recovery_overhead.md")
    target.parent.mkdir(exist_ok=True)
    target.write_text("\n".join(lines))
    print(target.read_text())


if __name__ == "__main__":
    main()
