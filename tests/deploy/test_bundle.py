"""The bundle: complete, true to the run, and usable without this project."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from compress.deploy.__main__ import main
from compress.deploy.bundle import Signature, write_bundle, write_zip
from compress.deploy.c_source import c_header, c_source
from compress.deploy.card import make_card
from compress.deploy.interface import Interface, TensorType
from compress.deploy.metadata import read_metadata
from compress.deploy.packing import unpack
from compress.deploy.snippets import kotlin_snippet, python_snippet
from compress.errors import CompressError

FILES = {
    *("model.tflite", "model.cmp", "labels.txt", "predict.py", "Classifier.kt", "selected_ops.cc", "report.json"),
    *("microcontroller/model.c", "microcontroller/model.h", "microcontroller/model_ops.h"),
    *("card.md", "layers.png", "noise.png"),
}
INTERFACE = Interface(
    "tiny",
    TensorType((1, 4, 6, 3), "int8", 0.5, -3),
    TensorType((1, 2), "uint8", 1 / 256, 0),
    (-1.0, 1.0),
    ('a "quoted" one?', "h\u00e9"),
    "probabilities",
)


@pytest.fixture(scope="module")
def bundle(finished_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "bundle"
    write_bundle(finished_run, folder, Signature("A. Person", "Apache-2.0", "CC-BY-4.0"))
    return folder


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_the_folder_is_complete(bundle, finished_run, tmp_path):
    assert {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()} == FILES
    assert (bundle / "labels.txt").read_text().split() == list("0123456789")
    found = read_metadata((bundle / "model.tflite").read_bytes())
    assert found is not None
    assert (found.labels, found.mean, found.std) == (tuple("0123456789"), (0.0,), (255 / 16,))
    unpack(bundle / "model.cmp", tmp_path / "again.tflite")
    assert (tmp_path / "again.tflite").read_bytes() == (finished_run / "model.tflite").read_bytes()


def test_the_card_says_what_was_done_with_the_numbers_of_the_report(bundle, finished_run):
    card, report = (bundle / "card.md").read_text(), report_of(bundle)
    final = report["final"]
    for words in (
        f"{final['speedup']:.2f} times as fast as the original, timed in turns",
        *(f"{final['accuracy']:.2f} %", f"{final['tflite_bytes']:,} bytes", f"{final['macs']:,}"),
        *("scheme=int8", "weights are stored as int8", "`digits`", "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
        *("licence of the model | Apache-2.0", "licence of the data | CC-BY-4.0", "author | A. Person"),
        *("![weights", "(layers.png)", "(noise.png)", 'license: "Apache-2.0"', "black is 0, white is 16"),
    ):
        assert words in card, words
    for name in FILES - {"card.md"}:
        assert name in card
    # The run's own card: nobody has said whose it is.
    own = (finished_run / report["artifacts"]["card"]).read_text()
    assert own.count("not stated") == 3
    assert "## Files" not in own


def test_the_card_says_how_a_stage_trained_and_who_taught_it(finished_run):
    report = report_of(finished_run)
    (stage,) = report["stages"][-1:]
    for recovered, recovery, said in (
        (None, {"epochs": 3.0, "losses": None}, "| - |"),
        ({"method": "finetune", "teachers": []}, {"epochs": 3.0, "losses": None}, "| finetune, 3 epochs |"),
        (
            {"method": "distill", "teachers": ["reference", "my.keras"]},
            {"epochs": 0.5, "losses": {"hints": 16.0, "decoupled": 1}},
            "| distill, 0.5 epochs, taught by reference, my.keras; hints 16; decoupled 1 |",
        ),
    ):
        config = {**stage["config"], "recovery": {**stage["config"].get("recovery", {}), **recovery}}
        card = make_card({**report, "stages": [{**stage, "config": config, "recovered": recovered}]})
        assert said in card, card


def test_a_card_without_stages_claims_no_gain(finished_run):
    report = report_of(finished_run)
    card = make_card({**report, "strategy": "none", "stages": [], "notes": ["Beware."]})
    assert "as large" not in card
    assert "as fast" not in card.partition("## What to know")[0]
    assert "Nothing: the model was exported" in card
    assert "- Beware." in card
    assert "noise.png" not in card


SNIPPET_TEST = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import predict
x, y = np.load(sys.argv[2]), np.load(sys.argv[3])
right = sum(int(predict.classify(sample).argmax()) == label for sample, label in zip(x, y))
assert not [name for name in sys.modules if name.split(".")[0] in ("compress", "tensorflow", "tf_keras")]
print(100 * right / len(x))
"""


def test_the_python_program_has_the_accuracy_of_the_report_without_this_project(bundle, tmp_path):
    bunch = load_digits()
    test = np.arange(len(bunch.target)) % 5 == 4
    np.save(tmp_path / "x.npy", bunch.images[test][..., None])
    np.save(tmp_path / "y.npy", bunch.target[test])
    command = [
        sys.executable,
        "-I",
        "-B",
        "-c",
        SNIPPET_TEST,
        str(bundle),
        str(tmp_path / "x.npy"),
        str(tmp_path / "y.npy"),
    ]
    done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(report_of(bundle)["final"]["accuracy"])


def test_the_python_program_names_what_is_on_a_photo(bundle, tmp_path):
    from PIL import Image

    bunch = load_digits()
    Image.fromarray(np.round(bunch.images[4] * 255 / 16).astype(np.uint8)).save(tmp_path / "photo.png")
    command = [sys.executable, "-I", str(bundle / "predict.py"), "photo.png"]
    done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, check=False)
    assert done.stdout.startswith(f"photo.png: {bunch.target[4]} "), done.stdout + done.stderr


def test_the_c_array_holds_the_bytes_of_the_measured_file(bundle, finished_run):
    source = (bundle / "microcontroller" / "model.c").read_text()
    (body,) = re.findall(r"model_tflite\[MODEL_TFLITE_BYTES\] = \{(.*?)\};", source, re.S)
    values = bytes(int(number, 16) for number in body.replace("\n", "").rstrip(",").split(","))
    assert values == (finished_run / "model.tflite").read_bytes()
    header = (bundle / "microcontroller" / "model.h").read_text()
    assert f"#define MODEL_TFLITE_BYTES {len(values)}u" in header
    assert "#define MODEL_STD 15.9375f" in header
    assert "INPUT_SCALE" not in header


DUMP = """
#include <stdio.h>
#include <stdint.h>
#include "model.h"
int main(void) {
  fwrite(model_tflite, 1, MODEL_TFLITE_BYTES, stdout);
  fprintf(stderr, "%s|%s|%d|%g|%d", model_labels[0], model_labels[1], (int)((uintptr_t)model_tflite % 16),
          MODEL_INPUT_SCALE, MODEL_INPUT_ZERO_POINT);
  return 0;
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.parametrize("size", [1, 16, 1003])
def test_the_c_source_compiles_and_gives_the_bytes_back(tmp_path, size):
    content = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    (tmp_path / "model.h").write_text(c_header(INTERFACE, size, 99))
    (tmp_path / "model.c").write_text(c_source(content, INTERFACE))
    (tmp_path / "main.c").write_text(DUMP)
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic"]
    subprocess.run(["gcc", *flags, "main.c", "model.c", "-o", "dump"], cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "dump"], capture_output=True, check=True)
    assert done.stdout == content
    assert done.stderr.decode() == 'a "quoted" one?|h\u00e9|0|0.5|-3'


def test_programs_for_integer_inputs_quantize(tmp_path):
    python = python_snippet(INTERFACE)
    compile(python, "predict.py", "exec")
    assert "reshape([1, 4, 6, 3])" in python
    assert 'convert("RGB")' in python
    assert "resize((6, 4)," in python
    scope: dict = {"np": np}
    body = python[python.index("def classify") : python.index('if __name__ == "__main__"')]
    seen = {}

    class Fake:
        def set_tensor(self, place, values):
            seen["values"] = values

        def invoke(self):
            pass

        def get_tensor(self, place):
            return np.array([[64, 192]], np.uint8)

    scope.update(interpreter=Fake(), source=0, target=1)
    exec(body, scope)
    values = np.linspace(-100, 100, 72)
    np.testing.assert_allclose(scope["classify"](values), [0.25, 0.75])
    assert seen["values"].dtype == np.int8
    assert seen["values"].shape == (1, 4, 6, 3)
    np.testing.assert_array_equal(seen["values"].ravel(), np.clip(np.round(values / 0.5) - 3, -128, 127))


def test_the_kotlin_program_has_the_sizes_and_scales_of_the_model():
    """No Kotlin compiler here: what can be checked is that its numbers are right and its brackets close."""
    text = kotlin_snippet(INTERFACE)
    for words in (
        "createScaledBitmap(photo, 6, 4, true)",
        "FloatArray(72)",
        "(Color.red(pixel) - 127.5f) / 127.5f",
        "Math.round(value / 0.5f + -3f).coerceIn(-128, 127)",
        "allocateDirect(1 * 72)",
        "allocateDirect(1 * 2)",
        "((get().toInt() and 0xff).toFloat() - 0f) * 0.00390625f",
    ):
        assert words in text, words
    assert "exp(" not in text
    logits = kotlin_snippet(replace(INTERFACE, scores="logits", output=TensorType((1, 5), "float32")))
    assert "exp(it - largest)" in logits
    assert "allocateDirect(4 * 5)" in logits
    for program in (text, logits):
        for opening, closing in ("()", "{}", "[]"):
            assert program.count(opening) == program.count(closing)


def test_models_of_plain_numbers_read_arrays():
    plain = replace(INTERFACE, input=TensorType((1, 490), "float32"))
    assert "np.load(path)" in python_snippet(plain)
    assert "PIL" not in python_snippet(plain)
    assert "Bitmap" not in kotlin_snippet(plain)
    assert "MODEL_MEAN" not in c_header(plain, 8, 8)


def test_the_zip_holds_the_folder_and_is_the_same_every_time(bundle, tmp_path):
    for name in ("a.zip", "b.zip"):
        write_zip(bundle, tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert {name.removeprefix("bundle/") for name in archive.namelist()} == FILES
        assert all(archive.read(f"bundle/{name}") == (bundle / name).read_bytes() for name in FILES)


def test_the_command(finished_run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(finished_run), "-o", str(tmp_path / "new" / "bundle"), "--zip", "--licence", "MIT"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "model.tflite" in shown
    assert (tmp_path / "new" / "bundle.zip").is_file()
    assert "licence of the model | MIT" in (tmp_path / "new" / "bundle" / "card.md").read_text()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["bundle", "bundle.zip"]


def copied(finished_run: Path, target: Path) -> Path:
    return Path(shutil.copytree(finished_run, target))


def other_size(run: Path) -> None:
    with (run / "model.tflite").open("ab") as file:
        file.write(b"x")


def old_report(run: Path) -> None:
    report = {key: value for key, value in report_of(run).items() if key != "interface"}
    (run / "report.json").write_text(json.dumps(report))


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda run: (run / "report.json").unlink(), "without it"),
        (shutil.rmtree, "no such folder"),
        (lambda run: (run / "model.tflite").unlink(), "no such file"),
        (other_size, "bytes"),
        (old_report, "interface"),
        (lambda run: (run / "report.json").write_text("{"), "JSONDecodeError"),
    ],
)
def test_a_run_that_is_not_whole_is_refused_and_nothing_is_left(finished_run, tmp_path, damage, word):
    run = copied(finished_run, tmp_path / "run")
    damage(run)
    with pytest.raises(CompressError) as caught:
        write_bundle(run, tmp_path / "bundle", Signature())
    assert word in caught.value.received
    assert caught.value.fix
    assert [path.name for path in tmp_path.iterdir() if path != run] == []


def test_a_folder_of_several_runs_names_them(finished_run, tmp_path):
    copied(finished_run, tmp_path / "sweep" / "1")
    with pytest.raises(CompressError, match=r"several runs: 1.*Name one of them"):
        write_bundle(tmp_path / "sweep", tmp_path / "bundle", Signature())


def test_a_target_that_is_taken_is_left_alone(finished_run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CompressError, match="empty or not there"):
        write_bundle(finished_run, tmp_path, Signature())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    write_bundle(finished_run, tmp_path / "empty", Signature())
    assert (tmp_path / "empty" / "model.tflite").is_file()


def test_a_file_missing_beside_the_report_is_one_paragraph(finished_run, tmp_path, capsys):
    run = copied(finished_run, tmp_path / "run")
    (run / "layers.png").unlink()
    with pytest.raises(SystemExit) as stopped:
        main([str(run), "-o", str(tmp_path / "bundle")])
    assert stopped.value.code == 2
    assert "layers.png" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()
