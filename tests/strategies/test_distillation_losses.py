"""Every distillation loss: its value and gradients against the paper's formula in NumPy, and a training that lowers it.

A new file in ``losses/`` is picked up by itself, and must have its formula here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.data.digits import Digits
from compress.data.source import Data
from compress.strategies.distillation import losses as losses_package
from compress.strategies.distillation.loss import LayerLoss, LogitsLoss, Loss
from compress.strategies.distillation.losses import losses
from compress.strategies.distillation.pairing import Pair
from compress.strategies.distillation.teacher import Teacher, keep_nothing
from compress.strategies.distillation.terms import distillation_terms
from compress.training import Recovery, train

FILES = sorted(file.stem for file in Path(losses_package.__file__).parent.glob("[!_]*.py"))
Arrays = Sequence[np.ndarray]
layers = tf_keras.layers


def softened(logits: np.ndarray, temperature: float) -> np.ndarray:
    powers = np.exp((logits - logits.max(1, keepdims=True)) / temperature)
    return powers / powers.sum(1, keepdims=True)


# Formulas of logits: (student's logits, teacher's logits, labels, temperature, the loss) -> number.


def soft_targets(student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, t: float, loss: Loss) -> float:
    """Hinton, section 2: cross-entropy with the teacher minus the teacher's entropy, times T^2."""
    p, q = softened(teacher, t), softened(student, t)
    return t**2 * float(np.mean((-p * np.log(q)).sum(1) - (-p * np.log(p)).sum(1)))


def decoupled(student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, t: float, loss: Loss) -> float:
    """DKD, equation 7; a sample without a label (-1) has only other classes."""
    total = 0.0
    for p, q, label in zip(softened(teacher, t), softened(student, t), labels, strict=True):
        rest = [k for k in range(len(p)) if k != label]
        others_p, others_q = (sum(x[k] for k in rest) for x in (p, q))
        if label >= 0:
            binary = p[label] * np.log(p[label] / q[label]) + others_p * np.log(others_p / others_q)
            total += loss.alpha * binary
        total += loss.beta * sum(p[k] / others_p * np.log((p[k] / others_p) / (q[k] / others_q)) for k in rest)
    return t**2 * total / len(labels)


# Formulas of layers: (student's features, teacher's, what is trained beside them, samples, the loss) -> number.


def hints(student: Arrays, teacher: Arrays, learned: Arrays, samples: int, loss: Loss) -> float:
    """FitNets, equation 3, with a regressor without padding."""
    learned, total = list(learned), 0.0
    for s, t in zip(student, teacher, strict=True):
        if s.shape != t.shape:
            kernel, bias = learned.pop(0), learned.pop(0)
            if s.ndim == 4:
                height, width = t.shape[1:3]
                windows = itertools.product(range(kernel.shape[0]), range(kernel.shape[1]))
                s = sum(s[:, y : y + height, x : x + width] @ kernel[y, x] for y, x in windows) + bias
            else:
                s = s @ kernel + bias
        spread = np.mean([t[..., c].var() for c in range(t.shape[-1])])
        total += np.mean((s - t) ** 2) / spread
    return float(total)


def attention(student: Arrays, teacher: Arrays, learned: Arrays, samples: int, loss: Loss) -> float:
    """AT, equation 2."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        maps = [(a**2).sum(-1) for a in (s, t)]
        height, width = (min(m.shape[axis] for m in maps) for axis in (1, 2))
        q = []
        for m in maps:
            down, right = m.shape[1] // height, m.shape[2] // width
            blocks = [[m[:, y * down :][:, :down, x * right :][:, :, :right].mean((1, 2)) for x in range(width)]
                      for y in range(height)]  # fmt: skip
            vector = np.moveaxis(np.array(blocks), -1, 0).reshape(len(m), -1)
            q.append(vector / np.linalg.norm(vector, axis=1, keepdims=True))
        total += np.mean((q[0] - q[1]) ** 2)
    return float(total)


def huber(x: float, y: float) -> float:
    return 0.5 * (x - y) ** 2 if abs(x - y) <= 1 else abs(x - y) - 0.5


def relational_distance(student: Arrays, teacher: Arrays, learned: Arrays, samples: int, loss: Loss) -> float:
    """RKD-D: Huber of distances relative to their mean."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        count, psi = len(s), []
        for x in (s.reshape(count, -1), t.reshape(count, -1)):
            d = np.array([[np.linalg.norm(x[i] - x[j]) for j in range(count)] for i in range(count)])
            psi.append(d / d[~np.eye(count, dtype=bool)].mean())
        total += np.mean([huber(a, b) for a, b in zip(psi[0].ravel(), psi[1].ravel(), strict=True)])
    return float(total)


def relational_angle(student: Arrays, teacher: Arrays, learned: Arrays, samples: int, loss: Loss) -> float:
    """RKD-A: Huber of cosines of angles at the sample in the middle."""

    def unit(vector: np.ndarray) -> np.ndarray:
        length = np.linalg.norm(vector)
        return vector / length if length else vector

    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        count = len(s)
        a, b = s.reshape(count, -1), t.reshape(count, -1)
        for i, j, k in itertools.product(range(count), repeat=3):
            one, other = (unit(x[i] - x[j]) @ unit(x[k] - x[j]) for x in (a, b))
            total += huber(one, other) / count**3
    return float(total)


def similarity(student: Arrays, teacher: Arrays, learned: Arrays, samples: int, loss: Loss) -> float:
    """SP, equations 1 to 3."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        count, g = len(s), []
        for x in (s, t):
            q = x.reshape(count, -1)
            gram = q @ q.T
            g.append(np.array([row / np.sqrt((row**2).sum()) for row in gram]))
        total += np.linalg.norm(g[0] - g[1], "fro") ** 2 / count**2
    return float(total)


def flow(student: Arrays, teacher: Arrays, learned: Arrays, samples: int, loss: Loss) -> float:
    """FSP, equations 1 and 2; of maps of two sizes, the larger max-pooled by 2."""

    def matrix(one: np.ndarray, two: np.ndarray) -> np.ndarray:
        if one.shape[1] == 2 * two.shape[1]:
            one = np.max([one[:, y::2, x::2] for y in (0, 1) for x in (0, 1)], axis=0)
        height, width = one.shape[1:3]
        g = np.zeros((len(one), one.shape[-1], two.shape[-1]))
        for y, x in itertools.product(range(height), range(width)):
            g += one[:, y, x, :, None] * two[:, y, x, None, :] / (height * width)
        return g

    sizes = [s.shape[1] for s in student]
    stages = [[i for i, size in enumerate(sizes) if size == wanted] for wanted in dict.fromkeys(sizes)]
    ways = [(stage[0], stage[-1]) for stage in stages if len(stage) > 1] or [(i, i + 1) for i in range(len(sizes) - 1)]
    differences = [matrix(student[a], student[b]) - matrix(teacher[a], teacher[b]) for a, b in ways]
    return float(sum((d**2).sum() for d in differences) / len(student[0]))


def contrastive(student: Arrays, teacher: Arrays, learned: Arrays, samples: int, loss: Loss) -> float:
    """CRD: the critic h and minus its objective, with the batch's other samples as the N negatives."""
    total = 0.0
    for number, (s, t) in enumerate(zip(student, teacher, strict=True)):
        count = len(s)
        own, own_bias, other, other_bias = learned[4 * number : 4 * number + 4]
        a, b = s.reshape(count, -1) @ own + own_bias, t.reshape(count, -1) @ other + other_bias
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
        noise = (count - 1) / samples
        for i, j in itertools.product(range(count), repeat=2):
            e = np.exp(b[i] @ a[j] / loss.temperature)
            h = e / (e + noise)
            total -= np.log(h if i == j else noise / (e + noise)) / count
    return float(total)


def activation_boundary(student: Arrays, teacher: Arrays, learned: Arrays, samples: int, loss: Loss) -> float:
    """AB: rho(t) * relu(mu - s)^2 + (1 - rho(t)) * relu(mu + s)^2, summed over neurons."""
    total = 0.0
    for number, (s, t) in enumerate(zip(student, teacher, strict=True)):
        kernel, bias = learned[2 * number : 2 * number + 2]
        s = s @ kernel.reshape(kernel.shape[-2:]) + bias
        rho = (t > 0).astype(float)
        value = (rho * np.maximum(0, loss.margin - s) + (1 - rho) * np.maximum(0, loss.margin + s)) ** 2
        total += value.sum() / len(s)
    return float(total)


@dataclass(frozen=True)
class Case:
    """A formula, what it is tried on (shapes of student and teacher), and how the loss is trained."""

    formula: Callable[..., float]
    shapes: tuple[tuple[tuple[tuple[int, ...], tuple[int, ...]], ...], ...] = ()
    fields: dict[str, float] = field(default_factory=dict)
    weight: float = 1.0
    same_channels: bool = False


VECTORS = (((5,), (7,)),)
MAPS = (((4, 4, 3), (4, 4, 2)), ((2, 2, 2), (2, 2, 5)))
EQUAL_MAPS = (((4, 4, 3), (4, 4, 3)), ((4, 4, 2), (4, 4, 2)), ((2, 2, 2), (2, 2, 2)))
CASES = {
    "soft_targets": Case(soft_targets),
    "decoupled": Case(decoupled, fields={"alpha": 0.7, "beta": 2.5}),
    "hints": Case(hints, (VECTORS, MAPS, EQUAL_MAPS, (((4, 5, 3), (2, 4, 2)),))),
    "attention": Case(attention, (MAPS, (((4, 4, 3), (2, 2, 5)),), (((2, 4, 3), (4, 2, 1)),)), weight=1000),
    "relational_distance": Case(relational_distance, (VECTORS, MAPS)),
    "relational_angle": Case(relational_angle, (VECTORS, MAPS)),
    "similarity": Case(similarity, (VECTORS, MAPS), weight=100),
    "flow": Case(flow, (EQUAL_MAPS, EQUAL_MAPS[1:]), same_channels=True),
    "contrastive": Case(contrastive, (VECTORS, MAPS), fields={"dimensions": 3, "temperature": 0.4}, weight=0.1),
    "activation_boundary": Case(activation_boundary, (VECTORS, MAPS), fields={"margin": 0.8}, weight=0.001),
}


def drawn(seed: int, count: int, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(0.2, 1, (count, *shape)).astype(np.float32) for shape in shapes]


def slopes(formula: Callable[[list[np.ndarray]], float], arrays: Arrays) -> list[np.ndarray]:
    """Return the formula's gradients by central differences, in double precision."""
    arrays = [np.array(a, np.float64) for a in arrays]
    found = [np.zeros_like(a) for a in arrays]
    for array, slope in zip(arrays, found, strict=True):
        for place in np.ndindex(array.shape):
            before = array[place]
            values = []
            for step in (1e-5, -1e-5):
                array[place] = before + step
                values.append(formula(arrays))
            array[place] = before
            slope[place] = (values[0] - values[1]) / 2e-5
    return found


def test_every_file_is_a_loss_with_a_formula():
    assert set(FILES) == set(losses()) == set(CASES)
    for name, kind in losses().items():
        assert kind.__module__.rpartition(".")[2] == name
        assert "arXiv" in str(__import__(kind.__module__, fromlist=["x"]).__doc__) or name == "flow"


LOGITS = [name for name in FILES if issubclass(losses()[name], LogitsLoss)]
OF_LAYERS = [
    pytest.param(name, shapes, id=f"{name}-{number}")
    for name in FILES
    if issubclass(losses()[name], LayerLoss)
    for number, shapes in enumerate(CASES[name].shapes)
]


@pytest.mark.parametrize("name", LOGITS)
@given(seed=st.integers(0, 1000), count=st.integers(1, 6), classes=st.integers(3, 12), temperature=st.floats(1.0, 10.0))
@settings(deadline=None, max_examples=8)
def test_of_logits_the_value_and_the_gradient_are_the_formula(name, seed, count, classes, temperature):
    case = CASES[name]
    loss = losses()[name](**case.fields)
    student, teacher = (3 * array for array in drawn(seed, count, [(classes,)] * 2))
    labels = np.random.default_rng(seed).integers(-1, classes, count)
    logits = tf.constant(student)
    targets = tf.constant(np.log(softened(teacher.astype(np.float64), temperature)), tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        value = loss.value(logits, targets, tf.constant(labels), temperature)
    double = teacher.astype(np.float64)

    def formula(arrays: list[np.ndarray]) -> float:
        return case.formula(arrays[0], double, labels, temperature, loss)

    assert value.shape == ()
    assert float(value) == pytest.approx(formula([student.astype(np.float64)]), rel=1e-3, abs=1e-4)
    np.testing.assert_allclose(tape.gradient(value, logits), slopes(formula, [student])[0], rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize(("name", "shapes"), OF_LAYERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_of_layers_the_value_and_the_gradients_are_the_formula(name, shapes, seed):
    case, samples = CASES[name], 1000
    loss = losses()[name](**case.fields)
    assert isinstance(loss, LayerLoss)
    pairs = [Pair("ours", "theirs", own, other) for own, other in shapes]
    assert [loss.misfit(pair) for pair in pairs] == [None] * len(pairs)
    student = [tf.constant(array) for array in drawn(seed, 4, [own for own, _ in shapes])]
    teacher = [tf.constant(array) for array in drawn(seed + 10, 4, [other for _, other in shapes])]
    connectors = [loss.connectors(pair, seed + number) for number, pair in enumerate(pairs)]
    learned = [v for both in connectors for one in both if one is not None for v in one.variables]
    for number, variable in enumerate(learned):
        variable.assign(variable + 0.1 * np.random.default_rng(number).normal(size=variable.shape))
    with tf.GradientTape() as tape:
        tape.watch(student)
        ours = [s if own is None else own(s) for s, (own, _) in zip(student, connectors, strict=True)]
        theirs = [t if other is None else other(t) for t, (_, other) in zip(teacher, connectors, strict=True)]
        value = loss.value(ours, theirs, samples)
    double = [np.array(t, np.float64) for t in teacher]

    def formula(arrays: list[np.ndarray]) -> float:
        return case.formula(arrays[: len(student)], double, arrays[len(student) :], samples, loss)

    arrays = [np.array(a, np.float64) for a in (*student, *learned)]
    assert value.shape == ()
    assert float(value) == pytest.approx(formula(arrays), rel=1e-4)
    gradients = tape.gradient(value, [*student, *learned], unconnected_gradients="zero")
    for found, expected in zip(gradients, slopes(formula, arrays), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", FILES)
def test_it_is_zero_for_equals_or_learns_more(name):
    """Where nothing is trained beside the student, a student that equals its teacher has nothing to learn."""
    loss = losses()[name]()
    if isinstance(loss, LogitsLoss):
        (logits,) = drawn(0, 4, [(6,)])
        targets = tf.nn.log_softmax(logits / 2.0)
        assert float(loss.value(tf.constant(logits), targets, tf.range(4), 2.0)) == pytest.approx(0, abs=1e-5)
        return
    assert isinstance(loss, LayerLoss)
    features = [tf.constant(array) for array in drawn(0, 4, [(4, 4, 3), (4, 4, 2)])]
    alone = loss.connectors(Pair("a", "b", (4, 4, 3), (4, 4, 3)), 0) == (None, None)
    value = float(loss.value(features, features, 100)) if alone else None
    assert value is None or value == pytest.approx(0, abs=1e-6)
    assert alone or name in ("contrastive", "activation_boundary")


@pytest.fixture(scope="module")
def data() -> Data:
    return Digits(train_limit=256, test_limit=32).load()


def network(data: Data, width: int, seed: int) -> tf_keras.Model:
    tf_keras.utils.set_random_seed(seed)
    image = tf_keras.Input(data.train.x.shape[1:])
    x = layers.Rescaling(1 / 16)(image)
    for number, (filters, strides) in enumerate(((width, 1), (2 * width, 1), (2 * width, 2), (2 * width, 1))):
        x = layers.Conv2D(filters, 3, strides, padding="same", name=f"conv{seed}_{number}")(x)
        x = layers.ReLU(name=f"active{seed}_{number}")(layers.BatchNormalization()(x))
    return tf_keras.Model(image, layers.Dense(10)(layers.Flatten()(x)))


@pytest.fixture(scope="module")
def teacher(data) -> Teacher:
    model = network(data, 8, seed=0)
    train(model, data, Recovery(epochs=8, batch_size=32, optimizer="adam"), seed=0)
    return Teacher(model)


class Losses:
    """Stands in for the progress display, and notes the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def advance(self, done: int, total: int, note: str = "") -> None:
        self.values.append(float(note.removeprefix("loss ")))


@pytest.mark.parametrize("name", FILES)
def test_a_short_training_on_digits_lowers_it(name, data, teacher):
    case = CASES[name]
    student = network(data, 8 if case.same_channels else 5, seed=1)
    recovery = Recovery(
        method="distill",
        epochs=8,
        optimizer="adam",
        batch_size=32,
        temperature=2.0,
        soft_weight=float(name == "soft_targets"),
        label_weight=0.0,
        losses=None if name == "soft_targets" else {name: case.weight},
    )
    terms = distillation_terms(recovery, [teacher], student, seed=0, where="recovery", keep=keep_nothing)
    seen = Losses()
    train(student, data, recovery, seed=0, terms=terms, progress=seen)
    assert len(seen.values) == 64
    assert np.mean(seen.values[-8:]) < 0.7 * np.mean(seen.values[:4])
