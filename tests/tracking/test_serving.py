"""The run's MLflow model: answers over HTTP with what the file computes, and says what is wrong with a request."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from compress.deploy.interface import Interface
from compress.deploy.predictor import load_predictor
from compress.tracking.serving import save_served_model

BATCH = load_digits().images[[4, 9, 14]][..., None]


@pytest.fixture(scope="module")
def saved(finished_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "model"
    report = json.loads((finished_run / "report.json").read_text())
    save_served_model(folder, finished_run / "model.tflite", Interface.from_json(report["interface"]))
    return folder


LOAD = """
import json, sys
import numpy as np
import mlflow.pyfunc
model = mlflow.pyfunc.load_model(sys.argv[1])
print(json.dumps(model.predict(np.load(sys.argv[2]).astype(np.float32))))
assert not [name for name in sys.modules if name.split(".")[0] in ("compress", "tensorflow", "tf_keras")], "heavy"
"""


def test_the_model_runs_without_this_project_and_without_pickles(saved, finished_run, tmp_path):
    names = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert names == {"MLmodel", "served_model.py", "requirements.txt", "python_env.yaml", "artifacts/model.tflite"}
    assert (saved / "artifacts/model.tflite").read_bytes() == (finished_run / "model.tflite").read_bytes()
    np.save(tmp_path / "x.npy", BATCH)
    command = [sys.executable, "-P", "-c", LOAD, str(saved), str(tmp_path / "x.npy")]
    plain = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    wanted = load_predictor(finished_run / "model.tflite").of_values(BATCH)
    np.testing.assert_allclose([answer["probabilities"] for answer in answers], wanted, atol=1e-5)
    assert [answer["label"] for answer in answers] == [str(row.argmax()) for row in wanted]
    np.testing.assert_allclose([answer["probability"] for answer in answers], wanted.max(axis=1), atol=1e-5)


@pytest.fixture(scope="module")
def server(saved, tmp_path_factory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(saved), "--env-manager", "local"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    log = tmp_path_factory.mktemp("log") / "server.log"
    with log.open("w") as file:
        running = subprocess.Popen(
            [*command, "-h", "127.0.0.1", "-p", str(port)], env=environment, stdout=file, stderr=file, process_group=0
        )
        try:
            deadline = time.monotonic() + 180
            while running.poll() is None and time.monotonic() < deadline:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.3)
            else:
                pytest.fail(f"no server: {log.read_text()[-2000:]}")
            yield f"http://127.0.0.1:{port}/invocations"
        finally:
            # The server is a child of the command: both are of the group that this test opened.
            os.killpg(running.pid, 15)
            running.wait(30)


def post(address: str, body: object) -> tuple[int, dict]:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.mark.slow
def test_a_server_answers_over_http(server, finished_run):
    wanted = load_predictor(finished_run / "model.tflite").of_values(BATCH)
    for values, expected in ((BATCH, wanted), (BATCH[:1], wanted[:1])):
        status, answer = post(server, {"inputs": values.tolist()})
        assert status == 200
        rows = answer["predictions"]
        np.testing.assert_allclose([row["probabilities"] for row in rows], expected, atol=1e-5)
        assert [row["label"] for row in rows] == [str(row.argmax()) for row in expected]

    status, answer = post(server, {"inputs": BATCH[..., 0].tolist()})
    assert status == 400
    assert "(-1, 8, 8, 1)" in json.dumps(answer)
    status, answer = post(server, {"inputs": "hello"})
    assert status == 400
    status, answer = post(server, {"picture": 1})
    assert status == 400
    # It is still there.
    assert post(server, {"inputs": BATCH.tolist()})[0] == 200
