"""The nouns that flow through the program: Candidate, Guarantee, Storage, Artifact, Numbers, Skipped.

A strategy receives a :class:`Candidate` and returns a new one. Nothing here knows how a model is
compressed, trained, exported or measured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

if TYPE_CHECKING:
    import tensorflow as tf
    import tf_keras

    from compress.metrics.tflite_file import TFLiteFile

Scheme = Literal["float32", "float16", "weight_only", "dynamic", "int8", "int16"]
Coder = Literal["ans", "huffman", "smallest", "none"]


class Effect(Enum):
    """What a strategy does to a layer that it touches."""

    TRAIN = "changes the values of its weights"
    ZERO = "sets some of its weights to zero"
    FILL = "leaves none of its weights at zero"
    SHARE = "lets its weights share values"
    LEVEL = "brings its weights to few levels of its own"
    ROUND = "rounds its weights to a grid"
    SPREAD = "gives the weights of each output values of their own"
    CUT = "removes channels of it"
    REPLACE = "puts other layers in its place"
    STORE = "chooses how its weights are written"


@dataclass(frozen=True)
class Violation:
    """One place where a guarantee does not hold: the layer, and what was found there."""

    layer: str
    found: str


@dataclass(frozen=True)
class Guarantee(ABC):
    """A property that a stage established and that everything after it must keep.

    Subclasses hold, besides ``stage`` (the name of the stage that established it), plain values and
    mappings from weight name (``"conv1/kernel"``) to NumPy array; so each can be written to disk.
    """

    broken_by: ClassVar[frozenset[Effect]] = frozenset()
    one_scale_per_tensor: ClassVar[bool] = False
    """Whether integer weights must share one scale per tensor for the property to survive quantization."""

    comes_first: ClassVar[bool] = False
    """Whether it is restored before the others, which then see weights that keep it (a zero before a mean)."""

    stage: str

    @property
    @abstractmethod
    def layers(self) -> frozenset[str]:
        """Names of the layers that it binds."""

    @abstractmethod
    def describe(self) -> str:
        """Say in a few words what is guaranteed, for the report."""

    def weights(self) -> frozenset[str]:
        """Names of the weights that :meth:`project` has something to say about."""
        return frozenset()

    def project(self, weight: str, value: tf.Tensor) -> tf.Tensor:
        """Return the value nearest to ``value`` that keeps the property (traced inside the training step)."""
        return value

    def grids(self) -> Mapping[str, Grid]:
        """Return the grids that weights lie on, by name: how the file has to write them."""
        return {}

    def hashes(self) -> Mapping[str, Hash]:
        """Return the hashes by which weights share their numbers, by name: how the packed file can write them."""
        return {}

    def transfers(self) -> Mapping[str, Transfer]:
        """Return how filters follow from fewer ones, by name of the weight: how the packed file can write them."""
        return {}

    def cut(self, left: Callable[[str, np.ndarray], np.ndarray]) -> Guarantee:
        """Return the property of the model that has lost channels.

        Args:
            left: returns, for the name of a weight and an array of its shape, what is left of the array.
        """
        arrays: dict[str, Any] = {
            item.name: {weight: left(weight, array) for weight, array in value.items()}
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Mapping)
            and all(isinstance(array, np.ndarray) for array in value.values())
        }
        return replace(self, **arrays)

    def replaced(self, layers: Mapping[str, Collection[str]]) -> Guarantee:
        """Return the property of a model in which other layers (the values) have taken the place of some (the keys)."""
        return self

    def without(self, layers: Collection[str]) -> Guarantee:
        """Return the property of a model that has lost whole layers."""
        tables: dict[str, Any] = {
            item.name: {k: v for k, v in value.items() if k not in layers and k.rpartition("/")[0] not in layers}
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Mapping)
        }
        return replace(self, **tables)

    @abstractmethod
    def check(self, model: tf_keras.Model) -> list[Violation]:
        """Return where the Keras model breaks the property."""

    @abstractmethod
    def check_file(self, file: TFLiteFile) -> list[Violation]:
        """Return where the exported file breaks the property, read from its bytes."""


@dataclass(frozen=True)
class Calibration:
    """How the ranges of integer activations are chosen."""

    images: int = 256
    ranges: Literal["minmax", "percentile", "mse", "entropy"] = "minmax"
    percentile: float = 99.99
    """Of ``percentile``: the share of the values that lies below the upper limit, and above the lower one."""


@dataclass(frozen=True)
class Storage:
    """How the weights will be written.

    ``float32``; ``float16`` weights; ``weight_only``: int8 weights, expanded to floats before they are used;
    ``dynamic``: int8 weights, activations quantized as they come; ``int8``, ``int16``: int8 weights and
    activations of that type, calibrated on data.
    """

    scheme: Scheme = "float32"
    calibration: Calibration = field(default_factory=Calibration)
    float_layers: tuple[str, ...] = ()
    """Layers that compute with floats all the same."""
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Layer -> the range of its output, where training has settled it; ``layer:1`` is that of its second call."""
    packed: bool = True
    """Two weights of four bits and fewer to a byte, where LiteRT reads them so; it expands them in each call."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Storage:
        """Rebuild from :func:`dataclasses.asdict`."""
        ranges = {layer: (low, high) for layer, (low, high) in value["ranges"].items()}
        calibration, floats = Calibration(**value["calibration"]), tuple(value["float_layers"])
        return cls(value["scheme"], calibration, floats, ranges, value["packed"])


@dataclass(frozen=True)
class Grid:
    """The levels of a weight: whole multiples of ``steps``, up to ``2**(bits - 1) - 1`` of them to each side."""

    steps: np.ndarray
    """One for each output, in a shape that spreads over the weight's."""
    bits: int


@dataclass(frozen=True)
class Hash:
    """Which of few numbers, its *bucket*, each weight of a kernel holds, up to its sign: a hash of its place.

    ``key`` (0 to 255) chooses the hash; ``outputs`` is the length of the kernel's last axis.
    """

    key: int
    buckets: int
    outputs: int = 1


@dataclass(frozen=True)
class Transfer:
    """How the filters of a kernel follow from fewer *meta filters* by a group of transformations.

    ``size`` says how many there are: shifts along each axis, turns, channels of a circle. ``slots``: for each filter
    its meta filter, times the number of transformations, plus the number of its own.
    """

    transform: Literal["translation", "rotation", "circulant"]
    size: int
    shape: tuple[int, int, int]
    """Height, width and channels of a filter."""
    slots: tuple[int, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A layer that a stage left alone, and why."""

    layer: str
    reason: str
    by_choice: bool = False
    """True if the stage could have changed it but did not need to."""


@dataclass(frozen=True)
class Recovered:
    """How a stage has won accuracy back. Accuracies in percent, of Keras models, on images of the validation part."""

    method: str
    why: str | None = None
    """What ``recovery=auto`` has seen."""
    teachers: tuple[str, ...] = ()
    teacher_accuracy: float | None = None
    received_accuracy: float | None = None
    """Of the model that the stage received."""
    student_accuracy: float | None = None
    """Of the one that it made."""
    images: int = 0
    warning: str | None = None
    seconds: float | None = None
    """That its trainings took, also before a stop that they went on after, with what their teachers gave first."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Recovered:
        """Rebuild from :func:`dataclasses.asdict`."""
        return cls(**{**value, "teachers": tuple(value["teachers"])})


@dataclass(frozen=True)
class Allocated:
    """What a search has chosen for a layer: techniques with their levels, and what it expects of it."""

    layer: str
    chosen: tuple[str, ...]
    divergence: float
    """Of the outputs from the reference's, in nats, by this layer: alone, and half of what pairs with others add."""
    bytes: int
    """Of its kernels in the packed file."""
    milliseconds: float | None
    """None if latency was no budget."""


@dataclass(frozen=True)
class Candidate:
    """A model on its way through the pipeline, with all that must be remembered about it. Immutable."""

    model: tf_keras.Model
    guarantees: tuple[Guarantee, ...] = ()
    storage: Storage = field(default_factory=Storage)
    coder: Coder = "ans"
    """What the streams of the packed file are written with."""
    samples: np.ndarray | None = None
    """What integer ranges are calibrated on instead of training images: inputs [n, ...]."""
    lineage: tuple[str, ...] = ()
    """Names of the stages that made it."""
    skipped: tuple[Skipped, ...] = ()
    """Layers that the latest stage left alone."""
    released: tuple[str, ...] = ()
    """Guarantees that a stage was allowed to break, described."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """What the latest stage has measured of its own work, for the report."""
    recovered: Recovered | None = None
    """How the latest stage has won accuracy back; None if it trained nothing and nobody asked."""
    allocation: tuple[Allocated, ...] = ()
    """What the latest stage has chosen for each layer, if it is a search."""

    def evolve(self, **changes: Any) -> Candidate:
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    def replaced(self, layers: Mapping[str, Collection[str]]) -> Candidate:
        """Return a copy in which what is said of a layer's storage holds for the layers that have taken its place.

        Args:
            layers: name of a layer that was replaced -> names of the new ones.
        """
        storage = self.storage
        floats = tuple(dict.fromkeys(new for old in storage.float_layers for new in (old, *layers.get(old, ()))))
        guarantees = tuple(guarantee.replaced(layers) for guarantee in self.guarantees)
        return replace(self, storage=replace(storage, float_layers=floats), guarantees=guarantees)

    def with_guarantee(self, guarantee: Guarantee) -> Candidate:
        """Return a copy that is bound by one more guarantee."""
        return replace(self, guarantees=(*self.guarantees, guarantee))


@dataclass(frozen=True)
class Artifact:
    """An exported file on disk, how its weights are written, and the packed file beside it."""

    path: Path
    storage: Storage
    packed: Path | None = None


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one inference of one sample on a board."""

    p50: float
    p90: float | None
    """None where the board does not tell it, as of ``p99``."""
    p99: float | None
    mean: float
    runs: int
    threads: int
    first: float | None = None
    """The first run after loading, which the others do not count."""
    interval: float | None = None
    """Width of the 95 % confidence interval of ``p50``, as a share of it."""


@dataclass(frozen=True)
class OperatorTime:
    """What one operator of the file takes: milliseconds measured or estimated, as the measurement itself is."""

    name: str
    ms: float


@dataclass(frozen=True)
class Measurement:
    """What a board says about an artifact: what it has measured or estimated, or why it says nothing."""

    board: str
    latency_ms: Latency | None = None
    failure: str | None = None
    estimate_ms: float | None = None
    """Milliseconds for one sample as computed by a board that runs nothing; it is never called a latency."""
    values: Mapping[str, float] = field(default_factory=dict)
    """What else it says, by name and unit: ``arena_bytes``, ``cycles``."""
    operators: tuple[OperatorTime, ...] = ()
    """Times by operator, where the board tells."""
    notes: tuple[str, ...] = ()
    """What a reader must know, such as operators that fall back to the processor."""

    @property
    def cost_ms(self) -> float | None:
        """What a budget in latency compares: the median, or the estimate of a board that runs nothing."""
        return self.estimate_ms if self.latency_ms is None else self.latency_ms.p50


@dataclass(frozen=True)
class Numbers:
    """What is known about one exported candidate. Keys as in ``report.json``."""

    accuracy: float
    """Of the exported file, run by LiteRT, percent."""
    accuracy_keras: float | None
    """Of the model before its export; None if it came as an exported file."""
    params: int
    nonzero_params: int
    macs: int
    tflite_bytes: int
    gzip_bytes: int
    packed_bytes: int | None
    peak_memory_bytes: int
    latency_ms: Latency | None
    latency_failure: str | None = None
    sparse_kernels: int = 0
    """Kernels that the ``.tflite`` stores without their zeros."""
    estimate_ms: float | None = None
    """One sample as a board computes it that runs nothing; not a latency."""
    speedup: float | None = None
    """Times as fast as the baseline, both on the board in turns; None of the baseline itself."""
    on_board: Mapping[str, float] = field(default_factory=dict)
    """What else the board says, by name and unit."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Numbers:
        """Rebuild from :func:`dataclasses.asdict`."""
        latency = value["latency_ms"]
        return cls(**{**value, "latency_ms": None if latency is None else Latency(**latency)})
