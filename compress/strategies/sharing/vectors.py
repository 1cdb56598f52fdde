"""Few vectors for many: k-means over sub-vectors of a matrix, each group of inputs with what its errors mean.

Sources: Gong et al. (arXiv 1412.6115) and Wu et al. (arXiv 1512.06473) for product quantization of weights; Stock et
al., And the Bit Goes Down (arXiv 1907.05686), for errors weighed by the layer's inputs; van Baalen et al., GPTVQ (arXiv
2402.15319), for vectors that make up for one another's errors.

A matrix [inputs, outputs] is cut into ``groups`` of ``length`` inputs: its vectors are [groups, length, outputs]. A
``book`` [codewords, length] holds what they may be, and ``labels`` int32 [groups, outputs] say which each is.
"""

from __future__ import annotations

import numpy as np

_PART = 1 << 22
"""Distances that are looked at together."""
_SAMPLE = 1 << 19
"""Vectors that k-means moves its codewords by, at most."""
_START_SAMPLE = 1 << 14
"""Vectors that k-means++ draws from, at most."""
_NO_PROGRESS = 1e-4
_STEPS = 12
"""Of conjugate gradients."""


def cut(matrix: np.ndarray, length: int) -> np.ndarray:
    """Return the vectors [groups, length, outputs] of a matrix [inputs, outputs]."""
    return matrix.reshape(len(matrix) // length, length, -1)


def together(book: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the matrix [inputs, outputs] that codewords make."""
    groups, outputs = labels.shape
    return book[labels].transpose(0, 2, 1).reshape(groups * book.shape[1], outputs)


def blocks_of(gram: np.ndarray, length: int) -> np.ndarray:
    """Return the square blocks [groups, length, length] on the diagonal of a matrix."""
    groups = len(gram) // length
    places = np.arange(groups)
    return gram.reshape(groups, length, groups, length)[places, :, places]


def assign(vectors: np.ndarray, metrics: np.ndarray, book: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest codeword of each vector, and how far it is.

    Args:
        vectors: [groups, length, outputs].
        metrics: positive definite [groups, length, length]: the square of a difference d is d^T metric d.
        book: [codewords, length].

    Returns:
        Labels int32 and squared distances float32, [groups, outputs].
    """
    groups, _, outputs = vectors.shape
    labels, distances = np.empty((groups, outputs), np.int32), np.empty((groups, outputs), np.float32)
    columns = max(1, _PART // len(book))
    rows = max(1, columns // outputs)
    for start in range(0, groups, rows):
        part = slice(start, start + rows)
        metric = metrics[part].astype(np.float32)
        # Of (c - v)^T M (c - v) only c^T M c - 2 c^T M v tells codewords apart: one product, with a 1 below the vector.
        weighed = np.matmul(book.astype(np.float32), metric)
        sides = np.concatenate([-2 * weighed, np.einsum("gkl,kl->gk", weighed, book)[..., None]], 2).transpose(0, 2, 1)
        for first in range(0, outputs, columns):
            place = (part, slice(first, first + columns))
            own = vectors[part, :, first : first + columns].astype(np.float32)
            ones = np.concatenate([own, np.ones_like(own[:, :1])], 1).transpose(0, 2, 1)
            scores = np.matmul(ones, sides)
            labels[place] = scores.argmin(-1)
            nearest = np.take_along_axis(scores, labels[place][..., None], -1)[..., 0]
            distances[place] = nearest + np.einsum("glo,glm,gmo->go", own, metric, own, optimize=True)
    return labels, np.maximum(distances, 0)


def cluster(
    vectors: np.ndarray, metrics: np.ndarray, codewords: int, rng: np.random.Generator, iterations: int = 25
) -> np.ndarray:
    """Return the book float64 [codewords, length] of k-means; arguments as for :func:`assign`.

    Of many vectors a part of the outputs stands for all.
    """
    groups, _, outputs = vectors.shape
    used = min(outputs, max(1, _SAMPLE // groups))
    if used < outputs:
        vectors = vectors[:, :, np.sort(rng.permutation(outputs)[:used])]
    book = _start(vectors, metrics, codewords, rng)
    before = np.inf
    for _ in range(iterations):
        labels, distances = assign(vectors, metrics, book)
        counts = np.bincount(labels.ravel(), minlength=codewords)
        book = _centres(vectors, metrics, labels, book)
        error = float(distances.sum(dtype=np.float64))
        idle = np.flatnonzero(counts == 0)
        if len(idle):
            # A codeword that no vector is near to goes where the error is the largest.
            worst = np.argpartition(-distances, len(idle) - 1, axis=None)[: len(idle)]
            group, output = np.unravel_index(worst, distances.shape)
            book[idle] = vectors[group, :, output]
        elif error > (1 - _NO_PROGRESS) * before:
            break
        before = error
    return book


def descend(gram: np.ndarray, wanted: np.ndarray, book: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return labels, chosen group after group so that each makes up for the errors of all others.

    Args:
        gram: positive definite [inputs, inputs]: an output's squared error for a difference d of its weights is
            d^T gram d.
        wanted: the matrix [inputs, outputs] to be near to.
        book: the codewords.
        labels: where to start.
    """
    length = book.shape[1]
    labels = labels.copy()
    result = together(book, labels)
    slope = gram @ (wanted - result)
    for group, block in enumerate(blocks_of(gram, length)):
        rows = slice(group * length, (group + 1) * length)
        weighed = book @ block
        scores = (weighed * book).sum(1)[:, None] - 2 * book @ (block @ result[rows] + slope[rows])
        labels[group] = scores.argmin(0)
        moved = book[labels[group]].T - result[rows]
        changed = np.flatnonzero(moved.any(0))
        result[rows] += moved
        slope[:, changed] -= gram[:, rows] @ moved[:, changed]
    return labels


def refit(gram: np.ndarray, wanted: np.ndarray, book: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the book that is best for these labels, by conjugate gradients; arguments as for :func:`descend`."""
    metrics = blocks_of(gram, book.shape[1])
    known = _weights_of(metrics, labels, len(book))

    def gathered(slope: np.ndarray) -> np.ndarray:
        return _sums(cut(slope, book.shape[1]), labels, len(book))

    def nearer(rest: np.ndarray) -> np.ndarray:
        return np.linalg.solve(known, rest[..., None])[..., 0]

    rest = gathered(gram @ (wanted - together(book, labels)))
    ahead = way = nearer(rest)
    size = start = float((rest * ahead).sum())
    for _ in range(_STEPS):
        if size <= 1e-10 * start:
            break
        pushed = gathered(gram @ together(way, labels))
        pace = size / float((way * pushed).sum())
        book, rest = book + pace * way, rest - pace * pushed
        ahead = nearer(rest)
        size, last = float((rest * ahead).sum()), size
        way = ahead + size / last * way
    return book


def error_of(gram: np.ndarray, difference: np.ndarray) -> float:
    """Return the squared error of all outputs for a difference [inputs, outputs] of the weights."""
    return float(np.einsum("io,io->", difference, gram @ difference, optimize=True))


def _start(vectors: np.ndarray, metrics: np.ndarray, codewords: int, rng: np.random.Generator) -> np.ndarray:
    """Draw codewords among the vectors, far from one another (k-means++, by the metrics' mean)."""
    groups, _, outputs = vectors.shape
    drawn = rng.permutation(groups * outputs)[: max(_START_SAMPLE, 4 * codewords)]
    sample = vectors[drawn // outputs, :, drawn % outputs].astype(np.float64)
    root = np.linalg.cholesky(metrics.mean(0, dtype=np.float64))
    seen = sample @ root
    chosen = np.empty(codewords, np.int64)
    distance = np.full(len(sample), np.inf)
    for number in range(codewords):
        total = distance.sum() if number else np.inf
        even = not np.isfinite(total) or total <= 0
        chosen[number] = rng.integers(len(sample)) if even else rng.choice(len(sample), p=distance / total)
        distance = np.minimum(distance, ((seen - seen[chosen[number]]) ** 2).sum(1))
    return sample[chosen]


def _centres(vectors: np.ndarray, metrics: np.ndarray, labels: np.ndarray, book: np.ndarray) -> np.ndarray:
    """Return the codewords with the least error for these labels; one without vectors stays where it is."""
    weighed = _sums(np.matmul(metrics, vectors), labels, len(book))
    centres = np.linalg.solve(_weights_of(metrics, labels, len(book)), weighed[..., None])[..., 0]
    used = np.bincount(labels.ravel(), minlength=len(book)) > 0
    return np.where(used[:, None], centres, book)


def _weights_of(metrics: np.ndarray, labels: np.ndarray, codewords: int) -> np.ndarray:
    """Return the sum [codewords, length, length] of the metrics of all vectors of a codeword, the identity if none."""
    groups, length, _ = metrics.shape
    places = labels + codewords * np.arange(groups)[:, None]
    counts = np.bincount(places.ravel(), minlength=groups * codewords).reshape(groups, codewords)
    known = (counts.T.astype(np.float64) @ metrics.reshape(groups, -1)).reshape(codewords, length, length)
    known[counts.sum(0) == 0] = np.eye(length)
    return known


def _sums(vectors: np.ndarray, labels: np.ndarray, codewords: int) -> np.ndarray:
    """Return the sum [codewords, length] of the vectors [groups, length, outputs] of each codeword."""
    flat = labels.ravel()
    places = [np.bincount(flat, vectors[:, place].ravel(), codewords) for place in range(vectors.shape[1])]
    return np.stack(places, 1)
