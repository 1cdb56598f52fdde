"""A folder with all that it takes to use a finished run's model elsewhere, without this project."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.deploy.c_source import c_header, c_source
from compress.deploy.card import make_card, plots_of
from compress.deploy.interface import Interface
from compress.deploy.metadata import LABELS_FILE, add_metadata, read_metadata
from compress.deploy.snippets import kotlin_snippet, python_snippet
from compress.deploy.verification import micro_resolver, selective_build, uses_from_json
from compress.errors import CompressError

REPORT = "report.json"
_DATE = (1980, 1, 1, 0, 0, 0)
_FILES = {
    "model.tflite": "the model; input, normalisation and labels are described in its metadata",
    "model.cmp": "the same network, packed; `python -m compress.deploy.unpack` opens it",
    LABELS_FILE: "names of the classes, one a line, in the order of the outputs",
    "predict.py": "a Python program that classifies photos with it",
    "Classifier.kt": "the same for Android",
    "microcontroller/model.c": "the file as a C array",
    "microcontroller/model.h": "its header: sizes, scales and labels",
    "microcontroller/model_ops.h": "the kernels to register with TensorFlow Lite for Microcontrollers",
    "selected_ops.cc": "the kernels to register with a LiteRT runtime that has no others",
    REPORT: "every number and setting of the run",
}


@dataclass(frozen=True)
class Signature:
    """Whose model it is, and under which licences; empty: nobody has said."""

    author: str = ""
    licence: str = ""
    data_licence: str = ""


def write_bundle(run: Path, target: Path, signature: Signature) -> list[Path]:
    """Write the bundle of the run in the folder ``run`` and return its files.

    Args:
        run: the output folder of a finished ``compress.run``.
        target: the folder to write; written under a temporary name and renamed.
        signature: goes into the model card and the metadata.

    Raises:
        CompressError: if there is no finished run, if its files do not belong together, or if the target is taken.
    """
    report, content = read_run(run)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CompressError(
            f"-o {target}",
            expected="a folder that is empty or not there yet",
            received="one with files in it" if target.is_dir() else "a file",
            fix="Name another one, or remove it.",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bundle-", dir=target.parent) as work:
        folder = Path(work, target.name or "bundle")
        folder.mkdir()
        _fill(folder, run, report, content, signature)
        if target.exists():
            target.rmdir()
        folder.replace(target)
    return sorted(path for path in target.rglob("*") if path.is_file())


def write_zip(folder: Path, target: Path) -> None:
    """Write the folder's files into a zip archive, under the folder's name; the same files give the same bytes."""
    partial = target.with_name(f".{target.name}.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            place = zipfile.ZipInfo((Path(folder.resolve().name) / path.relative_to(folder)).as_posix(), _DATE)
            place.external_attr = 0o644 << 16
            archive.writestr(place, path.read_bytes(), zipfile.ZIP_DEFLATED)
    partial.replace(target)


def read_run(run: Path) -> tuple[dict[str, Any], bytes]:
    """Return the report and the ``.tflite`` file of a finished run.

    Raises:
        CompressError: if one of them is missing, or they are not of the same run.
    """
    file = run / REPORT
    if not file.is_file():
        inside = sorted(path.parent.name for path in run.glob(f"*/{REPORT}"))
        raise CompressError(
            str(run),
            expected=f"the output folder of a finished run, with {REPORT} in it",
            received=f"a folder of several runs: {', '.join(inside[:6])}"
            if inside
            else "a folder without it"
            if run.is_dir()
            else "no such folder",
            fix=f"Name one of them: {run / inside[0]}."
            if inside
            else "The last line of compress.run names its folder; hydra.run.dir=<folder> chooses it.",
        )
    try:
        report = json.loads(file.read_text())
        interface, size = report["interface"], report["final"]["tflite_bytes"]
        Interface.from_json(interface)
        model = run / report["artifacts"]["tflite"]
    except (ValueError, KeyError, TypeError) as error:
        raise CompressError(
            str(file),
            expected="the report of a run, with the description of the model's input and output",
            received=f"one without ({type(error).__name__}: {str(error)[:80]})",
            fix="Run compress.run again: finished stages come from the cache.",
        ) from error
    if not model.is_file() or model.stat().st_size != size:
        found = f"{model.stat().st_size:,} bytes" if model.is_file() else "no such file"
        raise CompressError(
            str(model), expected=f"the file of this run, {size:,} bytes", received=found, fix="Run compress.run again."
        )
    return report, model.read_bytes()


def _fill(folder: Path, run: Path, report: Mapping[str, Any], content: bytes, signature: Signature) -> None:
    interface = Interface.from_json(report["interface"])
    given = read_metadata(content)
    if not interface.labels and given is not None:
        interface = replace(interface, labels=given.labels[: interface.output.shape[-1]])
    verified = report["verification"]
    operators = uses_from_json(verified["operators"])
    described = add_metadata(content, interface, author=signature.author, licence=signature.licence)
    texts = {
        LABELS_FILE: "\n".join(interface.class_names) + "\n",
        "predict.py": python_snippet(interface),
        "Classifier.kt": kotlin_snippet(interface),
        "microcontroller/model.c": c_source(content, interface),
        "microcontroller/model.h": c_header(interface, len(content), report["final"]["peak_memory_bytes"]),
        "microcontroller/model_ops.h": micro_resolver(operators, verified["micro_lacking"]),
        "selected_ops.cc": selective_build(operators),
        "card.md": make_card(
            report,
            licence=signature.licence,
            author=signature.author,
            data_licence=signature.data_licence,
            files={**_FILES, **dict.fromkeys(plots_of(report), "a plot")},
        ),
    }
    (folder / "microcontroller").mkdir()
    (folder / "model.tflite").write_bytes(described)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name in (REPORT, report["artifacts"]["packed"], *plots_of(report)):
        shutil.copyfile(run / name, folder / name)
