"""An Optuna sampler for few, costly trials: Gaussian processes say where the front is expected to grow most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import qmc

from compress.search.improvement import expected_improvement
from compress.search.space import Space, Value
from compress.search.surrogate import WEIGHTS, Ended, Open, Surrogate
from compress.tracking.pareto import Objective, non_dominated

_CANDIDATES = 2048
"""Of each kind; then, in rounds, more around each of the best."""
_ROUNDS, _BEST, _AROUND = 2, 8, 64
_CLOSE = 0.05
"""How far these are from the best, as _NEAR is for candidates near the front."""
_CHANGED = 2.0
"""Keys that a candidate near the front has other values for, on average."""
_NEAR = 0.1
_MOST = 300
"""Trials that a surrogate is fitted to; it takes some seconds for each objective by then."""


class GaussianSampler(BaseSampler):
    """Draws the first trials evenly (Sobol), then what is expected to raise the hypervolume most.

    One surrogate for each objective, over the settings as places in [0, 1] and categories as columns. Trials that are
    at work are taken for done with what is expected of them, those that failed or were given up as hopeless for as bad
    as the worst. A draw depends on the seed, the trial's number and the ended trials.

    Source: Emmerich et al., Hypervolume-based expected improvement (IEEE CEC 2011); Knowles, ParEGO (IEEE TEC 2006) for
    candidates that are changed settings of the front.

    Args:
        space: what may be set.
        distributions: the same in Optuna's terms.
        objectives: what is optimised, in the study's order.
        seed: of the search.
        first: how many trials are drawn before there are surrogates.
        reference: the study's attribute with where its hypervolume is counted from, by objective; None: from the worst.
    """

    def __init__(
        self,
        space: Space,
        distributions: dict[str, BaseDistribution],
        objectives: Sequence[Objective],
        seed: int,
        first: int,
        reference: str,
    ) -> None:
        self._reference_key = reference
        self._space, self._distributions, self._seed, self._first = space, distributions, seed, first
        self._ended = ["accuracy" in objective.metric for objective in objectives]
        self._signs = np.array([-1.0 if objective.maximise else 1.0 for objective in objectives])

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All keys are drawn together; what they may be is known."""
        return self._distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw the setting of a trial."""
        # Another process stores what it draws key by key.
        whole = [t for t in study.get_trials(deepcopy=False) if t.params.keys() >= self._space.keys()]
        values = [t for t in whole if t.state is TrialState.COMPLETE]
        if trial.number < self._first or len(values) < 2:
            return self._setting(self._evenly(trial.number))
        outcomes = self._signs * np.array([t.values for t in values])
        worst = outcomes.max(axis=0)
        # One that was killed is made again.
        again = [t.params for t in whole if t.state in (TrialState.COMPLETE, TrialState.RUNNING)]
        failed = [t for t in whole if t.state is TrialState.FAIL and t.params not in again]
        bad = [*failed, *(t for t in whole if t.state is TrialState.PRUNED)]
        known = np.concatenate([outcomes, np.tile(worst, (len(bad), 1))])
        seen = self._places([*values, *bad])
        working = self._places([t for t in whole if t.state is TrialState.RUNNING and t.number != trial.number])
        return self._setting(self._best(known, seen, working, self._reference(study, worst), trial.number))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw a key by itself: none, as all are drawn together."""
        raise NotImplementedError(f"{param_name} is not in the search space")

    def _reference(self, study: Study, worst: np.ndarray) -> np.ndarray:
        given = study.user_attrs.get(self._reference_key, [None] * len(worst))
        return np.array([w if g is None else s * g for g, s, w in zip(given, self._signs, worst, strict=True)])

    def _evenly(self, number: int) -> np.ndarray:
        count = 1 << (number + 1).bit_length()
        return np.asarray(qmc.Sobol(len(self._space), rng=np.random.default_rng(self._seed)).random(count)[number])

    def _best(
        self, known: np.ndarray, seen: np.ndarray, working: np.ndarray, reference: np.ndarray, number: int
    ) -> np.ndarray:
        """Return the places of the candidate that is expected to raise the hypervolume most, [keys]."""
        rng = np.random.default_rng([self._seed, number])
        scale = np.maximum(np.ptp(np.concatenate([known, reference[None]]), axis=0), 1e-12)
        known, reference = known / scale, reference / scale
        # Of many trials: those of the front, and the last ones.
        part = np.argsort(_on_front(known), kind="stable")[-_MOST:]
        fitted_to = self._features(seen[part])
        surrogates = [
            Surrogate(fitted_to, outcome[part], Ended if ends else Open)
            for outcome, ends in zip(known.T, self._ended, strict=True)
        ]
        candidates = self._candidates(seen[_on_front(known)], rng)
        if len(working):
            expected = [surrogate.expect(self._features(working)) @ WEIGHTS for surrogate in surrogates]
            known = np.concatenate([known, np.stack(expected, axis=1)])
        front = known[_on_front(known)]

        def gain_of(places: np.ndarray) -> np.ndarray:
            features = self._features(places)
            outcomes = np.stack([surrogate.expect(features) for surrogate in surrogates], axis=1)
            return expected_improvement(front, reference, outcomes, WEIGHTS)

        gain = gain_of(candidates)
        for _ in range(_ROUNDS):
            around = self._around(candidates[np.argsort(-gain, kind="stable")[:_BEST]], rng)
            candidates, gain = np.concatenate([candidates, around]), np.concatenate([gain, gain_of(around)])
        tried = {tuple(row) for row in self._features(np.concatenate([seen, working]))}
        features, order = self._features(candidates), np.argsort(-gain, kind="stable")
        new = (place for place in order if tuple(features[place]) not in tried)
        return np.asarray(candidates[next(new, order[0])])

    def _candidates(self, front: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return places, [n, keys]: any, and settings of the front with some keys changed, a little or anyhow."""
        keys = len(self._space)
        anywhere = rng.random((_CANDIDATES, keys))
        base = front[rng.integers(len(front), size=_CANDIDATES)]
        other = rng.random(base.shape)
        near = np.clip(base + _NEAR * rng.standard_normal(base.shape), 0.0, 1.0)
        moved = np.where(rng.random(base.shape) < 0.5, other, near)
        changed = np.where(rng.random(base.shape) < min(_CHANGED / keys, 1.0), moved, base)
        return np.concatenate([anywhere, changed])

    def _around(self, places: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return places close to some, [n, keys]: each with two fifths of its keys moved a little."""
        base = np.repeat(places, _AROUND, axis=0)
        moved = np.where(rng.random(base.shape) < 0.4, _CLOSE * rng.standard_normal(base.shape), 0.0)
        return np.asarray(np.clip(base + moved, 0.0, 1.0))

    def _features(self, places: np.ndarray) -> np.ndarray:
        columns = [values.features(place) for values, place in zip(self._space.values(), places.T, strict=True)]
        return np.concatenate(columns, axis=1)

    def _places(self, trials: Sequence[FrozenTrial]) -> np.ndarray:
        rows = [[values.place(trial.params[key]) for key, values in self._space.items()] for trial in trials]
        return np.array(rows).reshape(len(rows), len(self._space))

    def _setting(self, places: np.ndarray) -> dict[str, Value]:
        return {key: values.at(float(place)) for (key, values), place in zip(self._space.items(), places, strict=True)}


def _on_front(values: np.ndarray) -> np.ndarray:
    return non_dominated(values, [False] * values.shape[1])
