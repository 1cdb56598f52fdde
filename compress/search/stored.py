"""What kernels take in the packed file, and the values that the file holds of them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from compress.candidate import Candidate, Grid
from compress.deploy.packing import packed_bytes
from compress.graph.kernels import Kernel
from compress.strategies.quantization.stored import stays_float
from compress.strategies.strategy import Context

_INTEGERS = ("int8", "int16", "dynamic", "weight_only")


def as_stored(
    candidate: Candidate, kernel: Kernel, grids: Mapping[str, Grid], alive: np.ndarray | None = None
) -> tuple[np.ndarray, int]:
    """Return the values of a kernel as the file holds them, and about how many bytes they take in the packed file.

    Floats, with few distinct values or many zeros or none, are drafted as the packed file's coder would write them. Of
    integers that is done with the levels, entropy-coded, and with one float for the step of each output. What the
    kernels of other layers could lend one another (a frequency table) is not counted, nor are biases.

    Args:
        candidate: its storage says how weights are written.
        kernel: of its model.
        grids: weight name -> grid, of the weights that lie on one.
        alive: which values of the kernel are not set to zero; all if None.
    """
    storage, value = candidate.storage, kernel.value if alive is None else kernel.value * alive
    floats = kernel.layer.name in storage.float_layers or stays_float(storage.scheme, kernel.size)
    if storage.scheme == "float16":
        value = value.astype(np.float16)
        return value.astype(np.float32), packed_bytes(value, candidate.coder)
    if storage.scheme not in _INTEGERS or floats:
        return value, packed_bytes(value, candidate.coder)
    grid = grids.get(kernel.name)
    if grid is None:
        largest = np.abs(value).max(axis=kernel.inner_axes, keepdims=True)
        grid = Grid(np.maximum(largest, 1e-12).astype(np.float32) / np.float32(127), 8)
    most = 2 ** (grid.bits - 1) - 1
    levels = np.clip(np.rint(value / grid.steps), -most, most).astype(np.int8)
    steps = np.ascontiguousarray(grid.steps, np.float32).ravel()
    size = packed_bytes(levels, candidate.coder) + packed_bytes(steps, candidate.coder)
    return levels * grid.steps, size


def grids_by_name(candidate: Candidate) -> dict[str, Grid]:
    """Return the grids that weights of the candidate lie on."""
    return {name: grid for guarantee in candidate.guarantees for name, grid in guarantee.grids().items()}


def measure_files(candidate: Candidate, context: Context, *, latency: bool) -> tuple[int, float | None]:
    """Return the bytes of the packed file and, if asked for, the milliseconds that the exported file takes.

    Raises:
        CompressError: if the board gives no latency.
    """
    with tempfile.TemporaryDirectory(prefix=".measured-") as folder:
        artifact = context.write_files(candidate, Path(folder))
        assert artifact.packed is not None
        milliseconds = context.median_latency(artifact, "bytes") if latency else None
        return artifact.packed.stat().st_size, milliseconds
