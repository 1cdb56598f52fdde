"""What a training step costs with a teacher of the student's size, against a plain step on the labels.

    python benchmarks/distillation_overhead.py [losses]     e.g. attention flow

ResNet-20 on CIFAR-10, batches of 128. Each kind of training runs in a thread of its own, only one of them at a time:
after a few steps it waits until all others have made as many. So each is compiled once, and whatever else the machine
does falls on all alike. Soft targets are measured twice: with the teacher inside the step (augmented images), and with
its outputs computed before training (images as they are), each against a plain step on the same images. For every loss
named, soft targets and this loss, with the teacher inside. Writes ``results/distillation_overhead.md``.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from compress.quiet import import_tensorflow

import_tensorflow()

from compress.cli.build import make_plan  # noqa: E402
from compress.cli.compose import compose_config  # noqa: E402
from compress.cli.experiment import machine, provenance  # noqa: E402
from compress.data.source import Augmentation  # noqa: E402
from compress.graph.rewrite import copy_model  # noqa: E402
from compress.reference import make_reference  # noqa: E402
from compress.strategies.distillation.losses import losses  # noqa: E402
from compress.strategies.strategy import Context  # noqa: E402
from compress.training import Recovery, train  # noqa: E402

STEPS, ROUNDS, WARM_UP = 5, 25, 2
BATCH, IMAGES = 128, 2048
LIMITS = {"soft targets": 1.45, "soft targets, outputs known": 1.05}


@dataclass
class Kind:
    """A kind of training, and the seconds that its turns have taken."""

    name: str
    context: Context
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    """Seconds that all threads have computed."""
    error: BaseException | None = None


class Clock:
    """Stands in for the progress display: takes the time of a turn, then lets the next kind of training go on."""

    def __init__(self, kind: Kind, following: Kind) -> None:
        self._kind, self._following = kind, following
        self._started = time.perf_counter(), time.process_time()

    def advance(self, done: int, total: int, note: str = "") -> None:
        """Count a step."""
        if done % STEPS == 0:
            self._kind.seconds.append(time.perf_counter() - self._started[0])
            self._kind.processor.append(time.process_time() - self._started[1])
            self._following.turn.release()
            if done < total:
                self._kind.turn.acquire()
            self._started = time.perf_counter(), time.process_time()


def run(kind: Kind, following: Kind) -> None:
    """Train, a turn at a time."""
    kind.turn.acquire()
    context = kind.context
    student = copy_model(context.reference)
    epochs = STEPS * (ROUNDS + WARM_UP) * BATCH / len(context.data.train)
    recovery = replace(context.recovery, epochs=epochs)
    try:
        terms = context.distillation(student)
        train(student, context.data, recovery, seed=0, terms=terms, progress=Clock(kind, following))
    except BaseException as error:
        kind.error = error
        following.turn.release()


def kinds(chosen: Sequence[str]) -> list[Kind]:
    """Return what is compared: plain and soft targets on both kinds of images, and each loss that was chosen."""
    plan = make_plan(compose_config(["model=resnet20", "data=cifar10", f"data.train_limit={IMAGES}", "strategy=none"]))
    pipeline = plan.pipeline()
    reference = make_reference(pipeline.model, pipeline.data, 0)
    augmented = pipeline.data.fitted_to(reference, "benchmark")
    same = replace(augmented, augmentation=Augmentation())
    plain = Recovery(method="finetune", learning_rate=1e-4, batch_size=BATCH)
    soft = replace(plain, method="distill")
    made = [
        ("plain", augmented, plain),
        ("soft targets", augmented, soft),
        ("plain, images as they are", same, plain),
        ("soft targets, outputs known", same, soft),
        *((f"soft targets and {name}", augmented, replace(soft, losses={name: 1.0})) for name in chosen),
    ]
    return [Kind(name, Context(name, data, reference, recovery, 0)) for name, data, recovery in made]


def main() -> None:
    chosen = sys.argv[1:]
    unknown = set(chosen) - set(losses())
    if unknown:
        sys.exit(f"no losses: {', '.join(sorted(unknown))}; there are {', '.join(losses())}")
    compared = kinds(chosen)
    threads = [
        threading.Thread(target=run, args=(kind, compared[(number + 1) % len(compared)]))
        for number, kind in enumerate(compared)
    ]
    for thread in threads:
        thread.start()
    compared[0].turn.release()
    for thread in threads:
        thread.join()
    for kind in compared:
        if kind.error is not None:
            raise kind.error
    lines = [
        "# What a training step costs with a teacher of the student's size",
        "",
        f"ResNet-20 taught by ResNet-20, CIFAR-10, {ROUNDS} turns of {STEPS} steps of {BATCH} images for each kind of "
        "training, all in one process in turns. The ratio is the median over the turns, against the plain step on the "
        "same images in the same round; of processor time, too, which other work on the machine hardly changes.",
        "",
        "| step | milliseconds, median | times a plain step | lowest | highest | processor time | at most |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in compared:
        plain = compared[0] if kind.context.data.augmentation else compared[2]
        ratios, computed = (
            [one / other for one, other in zip(taken[WARM_UP:], against[WARM_UP:], strict=True)]
            for taken, against in ((kind.seconds, plain.seconds), (kind.processor, plain.processor))
        )
        row = [kind.name, f"{1000 * statistics.median(kind.seconds[WARM_UP:]) / STEPS:.0f}"]
        found = (statistics.median(ratios), min(ratios), max(ratios), statistics.median(computed))
        row += [f"{value:.3f}" for value in found]
        lines.append(f"| {' | '.join(row)} | {LIMITS.get(kind.name, '')} |")
    lines += provenance(f"python benchmarks/distillation_overhead.py {' '.join(chosen)}".strip(), [0], machine())
    target = Path("results/distillation_overhead.md")
    target.parent.mkdir(exist_ok=True)
    target.write_text("\n".join(lines))
    print(target.read_text())


if __name__ == "__main__":
    main()
