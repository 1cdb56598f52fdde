"""The kernels for 64-bit ARM processors, emulated on this machine: do they answer as this machine's do?

QEMU's user mode runs the arm64 build of LiteRT in an unpacked Debian for arm64, which
``python -m compress.boards.aarch64_root`` makes. Emulated times say nothing of a real processor, so none are given.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Ge, Gt, Le, MinLen
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from compress.boards.board import Board
from compress.boards.command import BoardFailure, check_file, run_program
from compress.boards.timing import with_next_step
from compress.candidate import Artifact, Measurement

_WORKER = Path(__file__).with_name("host_worker.py")
_LARGEST_OUTPUTS = 1 << 30
_LOST = ("LD_PRELOAD", "LD_LIBRARY_PATH")
"""Variables that name this machine's libraries."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Aarch64(Board):
    """Runs the file in LiteRT for arm64, emulated, and compares the outputs with those of LiteRT here.

    Attributes:
        root: folder of the unpacked Debian for arm64, with LiteRT.
        emulator: QEMU's user mode: a name in PATH, or a path.
        cpu: the processor that is emulated, by QEMU's name; its instructions decide which kernels run.
        xnnpack: use LiteRT's fast kernels; without, its reference ones.
        samples: inputs that are run, made from a seed.
        tolerance: outputs may differ by this share of what an output's integers can hold, or of the largest float.
        timeout: seconds for one file.
    """

    root: Annotated[str, MinLen(1)] = "~/.cache/compress/aarch64"
    emulator: Annotated[str, MinLen(1)] = "qemu-aarch64-static"
    cpu: Annotated[str, Field(pattern=r"^\w[\w.,=-]*$")] = "cortex-a76"
    xnnpack: bool = True
    samples: Annotated[int, Ge(1), Le(10_000)] = 8
    tolerance: Annotated[float, Ge(0), Le(1)] = 0.02
    timeout: Annotated[float, Gt(0), Le(1e6)] = 600.0
    channel_multiple: Annotated[int, Ge(1), Le(1024)] = 1

    name: ClassVar[str] = "aarch64"

    def lacks(self, operators: Collection[str]) -> frozenset[str]:
        """Return the operators of TensorFlow itself, which LiteRT has no kernels for."""
        return frozenset(name for name in operators if name.startswith("Flex"))

    def unreachable(self) -> str | None:
        """Say what of the emulator and the root for it is not there, if anything is not."""
        try:
            self._guest()
        except BoardFailure as failure:
            return str(failure)
        return None

    def measure(self, artifact: Artifact) -> Measurement:
        """Return how far the outputs are from those of this machine, and how often the highest score is the same."""
        try:
            guest = self._guest()
            check_file(artifact.path)
            with tempfile.TemporaryDirectory(prefix="compress-aarch64-") as name:
                folder = Path(name)
                # Names without a folder: the emulator looks for absolute ones in the root first.
                (folder / "worker.py").symlink_to(_WORKER)
                (folder / "model.tflite").symlink_to(artifact.path.resolve())
                host, here = self._run([sys.executable, "-P"], folder, "here", "here")
                arm, there = self._run([*guest, "-I"], folder, "there", "emulated")
            return self._compare((host, here), (arm, there))
        except BoardFailure as failure:
            return Measurement(self.name, failure=str(failure))

    def _guest(self) -> list[str | Path]:
        """Return the command that starts the root's Python."""
        emulator = shutil.which(self.emulator)
        if emulator is None:
            raise BoardFailure(
                f"{self.emulator} is not there; install QEMU's user mode (Debian: apt-get install qemu-user-static), "
                "or name it: board.emulator"
            )
        root = Path(self.root).expanduser().absolute()
        # Without a description of an ARM processor LiteRT reads that of this machine, and crashes.
        for needed in ("usr/bin/python3", "proc/cpuinfo"):
            if not (root / needed).is_file():
                raise BoardFailure(
                    f"{root} has no {needed}, it is no root for arm64; python -m compress.boards.aarch64_root makes "
                    "one, or name another: board.root"
                )
        lost = [word for name in _LOST for word in ("-U", name)]
        return [emulator, "-cpu", self.cpu, *lost, "-L", root, root / "usr/bin/python3"]

    def _run(
        self, python: Sequence[str | Path], folder: Path, name: str, where: str
    ) -> tuple[Mapping[str, Any], dict[str, np.ndarray]]:
        """Return what the worker says of itself, and the outputs."""
        written = f"{name}.npz"
        options = {"samples": self.samples, "outputs": written, "threads": 1, "xnnpack": self.xnnpack}
        command = [*python, "worker.py", "--outputs", "model.tflite", json.dumps(options)]
        answer = run_program(command, self.timeout, folder=folder)
        if answer.code != 0:
            reason = f"LiteRT, {where}, ended with code {answer.code}: {answer.last_error}".rstrip(": ")
            if "unable to find CPU model" in reason:
                reason += f"; {self.emulator} -cpu help lists those it has: board.cpu"
            if "No module named" in reason:
                raise BoardFailure(f"{reason}; make the root anew: python -m compress.boards.aarch64_root")
            raise BoardFailure(with_next_step(reason))
        try:
            said = json.loads(answer.output.strip().splitlines()[-1])
            if set(said) != {"machine", "litert", "inputs"}:
                raise ValueError("other fields than expected")
            file = folder / written
            if file.stat().st_size > _LARGEST_OUTPUTS:
                raise ValueError("more outputs than can be meant")
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as outputs:
                return said, {key: outputs[key] for key in outputs.files}
        except (ValueError, IndexError, TypeError, RecursionError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise BoardFailure(f"unreadable answer {answer.output[:100]!r} ({where}; {str(error)[:100]})") from error

    def _compare(
        self,
        host: tuple[Mapping[str, Any], dict[str, np.ndarray]],
        arm: tuple[Mapping[str, Any], dict[str, np.ndarray]],
    ) -> Measurement:
        (said, wanted), (said_there, given) = host, arm
        if said_there["machine"] != "aarch64":
            raise BoardFailure(f"the root is for {str(said_there['machine'])[:30]}, not for aarch64; make it anew")
        if said_there["inputs"] != said["inputs"]:
            raise BoardFailure("NumPy there makes other random numbers than here; make the root anew, for this NumPy")
        if {key: value.shape for key, value in given.items()} != {key: value.shape for key, value in wanted.items()}:
            raise BoardFailure("outputs of other shapes than here")
        difference = largest_difference(given, wanted)
        if not difference <= self.tolerance:
            raise BoardFailure(
                f"outputs differ from this machine's by {difference:.2%} of their range, more than "
                f"board.tolerance={self.tolerance:g}"
            )
        values = {"max_difference": difference, "samples": float(self.samples)}
        same = same_class(given, wanted)
        if same is not None:
            values["same_class_percent"] = same
        litert, here = str(said_there["litert"])[:30], said["litert"]
        versions = f"LiteRT {litert}" if litert == here else f"LiteRT {litert}, compared with {here}"
        return Measurement(self.name, values=values, notes=(f"{versions}, {self.cpu} emulated: no time is given",))


def largest_difference(given: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> float:
    """Return how far outputs are apart at most; keys are ``<output>_<sample>``."""
    return max((_difference(given[key], wanted[key]) for key in wanted), default=0.0)


def _difference(given: np.ndarray, wanted: np.ndarray) -> float:
    """Return a share of all that an integer can be, or of the largest float; infinite, where only one is a number."""
    if given.dtype != wanted.dtype:
        return math.inf
    if wanted.dtype.kind not in "iuf":
        return float(np.any(given != wanted))
    one, other = given.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(other)
    if not np.array_equal(one[~finite], other[~finite], equal_nan=True) or not np.isfinite(one[finite]).all():
        return math.inf
    most = float(np.abs(other[finite]).max(initial=0))
    if wanted.dtype.kind in "iu":
        most = float(np.iinfo(wanted.dtype).max) - float(np.iinfo(wanted.dtype).min)
    distance = float(np.abs(one[finite] - other[finite]).max(initial=0))
    return distance / most if most else distance


def same_class(given: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> float | None:
    """Return for how many percent of the samples the first output's highest score is the same; None: it has none."""
    keys = [key for key in wanted if key.startswith("0_")]
    if not keys or any(wanted[key].ndim != 2 or wanted[key].shape[-1] < 2 for key in keys):
        return None
    return 100.0 * float(np.mean([np.array_equal(given[key].argmax(-1), wanted[key].argmax(-1)) for key in keys]))
