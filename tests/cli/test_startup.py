"""Help, configuration and completion take little more than Hydra itself, without TensorFlow and MLflow."""

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
def test_answers_at_once(outside, arguments):
    seconds: dict[tuple[str, ...], list[float]] = {("-c", "import hydra"): [], ("-m", "compress.run", *arguments): []}
    for _ in range(5):
        for command, taken in seconds.items():
            started = time.perf_counter()
            assert outside(*command).returncode == 0
            taken.append(time.perf_counter() - started)
    # In turns, the best of five: machines differ, and this one may be busy with other tests. Help took 6 times Hydra's
    # import, of which most is Hydra's listing of the groups; TensorFlow alone takes 15 times as long.
    plain, ours = (min(taken) for taken in seconds.values())
    assert ours < 9 * plain


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
