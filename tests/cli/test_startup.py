"""Help, configuration and completion answer at once, without TensorFlow and MLflow."""

from __future__ import annotations

import time

import pytest

PROBE = """
import sys
from compress.run import main
try:
    main({arguments!r})
except SystemExit as stopped:
    code = stopped.code
heavy = [name for name in ("tensorflow", "tf_keras", "keras", "mlflow", "ai_edge_litert", "sklearn", "matplotlib")
         if name in sys.modules]
print("HEAVY", heavy, "CODE", code or 0)
"""


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--cfg", "job"], ["--cfg", "job", "--resolve", "strategy=lowrank+prune+quantize"], ["--hydra-help"]],
    ids=lambda a: " ".join(a),
)
def test_no_heavy_module_is_imported(outside, arguments):
    done = outside("-c", PROBE.format(arguments=arguments))
    assert "HEAVY [] CODE 0" in done.stdout, done.stdout[-500:] + done.stderr[-2000:]


@pytest.mark.parametrize("module", ["compress.predict", "compress.deploy.__main__", "compress.deploy.export"])
def test_help_of_the_other_commands(outside, module):
    done = outside("-c", PROBE.format(arguments=["--help"]).replace("compress.run", module))
    assert "HEAVY [] CODE 0" in done.stdout, done.stdout[-500:] + done.stderr[-2000:]


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"]], ids=lambda a: " ".join(a))
def test_answers_within_a_second(outside, arguments):
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        assert outside("-m", "compress.run", *arguments).returncode == 0
        seconds.append(time.perf_counter() - started)
    # The best of five: the machine may be busy with other tests.
    assert min(seconds) < 1.0


def test_a_misspelt_strategy_is_answered_without_tensorflow(outside):
    done = outside("-c", PROBE.format(arguments=["strategy=lowrnk"]))
    assert "HEAVY [] CODE 2" in done.stdout
    assert "Did you mean strategy=lowrank?" in " ".join(done.stderr.split())


def complete(outside, line: str) -> list[str]:
    environment = {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    done = outside("-m", "compress.run", "-sc", "query=bash", env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_shell_completion(outside):
    assert {"strategy=lowrank", "strategy=prune"} <= set(complete(outside, "compress-run strategy="))
    assert "strategy=lowrank+prune" in complete(outside, "compress-run strategy=lowrank+pr")
    assert "strategy.prune.sparsity=" in complete(outside, "compress-run strategy=prune strategy.prune.sp")
    assert "model=resnet20" in complete(outside, "compress-run model=resnet2")
