"""The integer program against trying everything."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compress.search import allocation
from compress.search.allocation import Allocator, Limits, Way
from compress.search.program import Option, choose
from compress.search.sensitivity import Cost, Interaction, Pair, Probe
from compress.search.technique import Technique
from compress.strategies.pruning.channels import PruneChannels
from compress.strategies.pruning.prune import Prune
from compress.strategies.quantization.post_training import Quantize
from compress.strategies.sharing.kmeans import Share

TECHNIQUES = (
    Technique("prune_channels", "channels", {0.5: PruneChannels(channels=0.5)}, {}, ""),
    Technique("prune", "sparsity", {0.5: Prune(sparsity=0.5)}, {}, ""),
    Technique("share", "clusters", {8: Share(clusters=8)}, {}, ""),
    Technique("quantize", "bits", {b: Quantize(bits=b, rounding="second_order") for b in (8, 4)}, {}, ""),
)
BOTH = Limits(1e9, 1e9)


def floats(layers: Mapping[str, Cost]) -> Way:
    """Two milliseconds for all multiply-adds, and some besides."""
    macs = sum(cost.macs for cost in layers.values())
    return Way(None, 100.0, {name: 2 * cost.macs / macs for name, cost in layers.items()}, 0.1)


@given(
    seed=st.integers(0, 10_000),
    layers=st.integers(1, 4),
    budgets=st.integers(0, 2),
    share=st.floats(0, 1.1),
    growing=st.integers(0, 2),
)
@settings(deadline=None, max_examples=100)
def test_the_choice_is_the_best_one_that_fits(seed, layers, budgets, share, growing):
    rng = np.random.default_rng(seed)
    options = [
        [
            Option(
                float(rng.exponential(1e-3)),
                tuple(rng.uniform(0, 100, budgets)),
                tuple(rng.integers(0, 3, growing)),
            )
            for _ in range(rng.integers(1, 5))
        ]
        for _ in range(layers)
    ]
    per_pair = rng.exponential(5e-4, growing)
    every = list(itertools.product(*(range(len(own)) for own in options)))
    counts = np.array([[sum(options[i][j].counts[g] for i, j in enumerate(p)) for g in range(growing)] for p in every])
    errors = np.array([sum(options[i][j].error for i, j in enumerate(pick)) for pick in every])
    errors += (counts * (counts - 1) / 2) @ per_pair if growing else 0.0
    costs = np.array([[sum(options[i][j].costs[b] for i, j in enumerate(p)) for b in range(budgets)] for p in every])
    limits = costs.min(0, initial=np.inf) + share * np.ptp(costs, axis=0) if budgets else np.zeros(0)
    found = choose(options, list(limits), list(per_pair))
    surely = (costs <= limits * (1 - 1e-6)).all(1)
    perhaps = (costs <= limits * (1 + 1e-6)).all(1)
    if found is None:
        assert not surely.any()
        return
    place = every.index(tuple(found))
    assert perhaps[place]
    assert errors[place] <= errors[surely].min(initial=np.inf) * (1 + 1e-4)


def probes(rng: np.random.Generator, layers: list[str], *, coupled: bool) -> list[Probe]:
    found = []
    for number, name in enumerate(layers):
        for technique, field, value, kept in (
            ("prune", "sparsity", 0.5, 0.6),
            ("share", "clusters", 8, 0.15),
            ("quantize", "bits", 8, 0.25),
            ("quantize", "bits", 4, 0.12),
        ):
            error = float(rng.exponential(0.01))
            found.append(Probe(name, technique, field, value, divergence=error, bytes_kept={name: kept}))
        if number + 1 < len(layers):
            shares = {name: 0.5} | ({layers[number + 1]: 0.5} if coupled else {})
            error = float(rng.exponential(0.01))
            found.append(
                Probe(
                    name, "prune_channels", "channels", 0.5, None, error, 0.0, 0, 0, macs_kept=shares, bytes_kept=shares
                )
            )
    return found


@example(seed=0, share=0.9999999999999999, coupled=False, integer=False)
@given(seed=st.integers(0, 10_000), share=st.floats(0.1, 1.0), coupled=st.booleans(), integer=st.booleans())
@settings(deadline=None, max_examples=25)
def test_an_allocation_keeps_to_its_limits_and_is_the_best(seed, share, coupled, integer):
    rng = np.random.default_rng(seed)
    layers = {name: Cost(int(rng.integers(100, 1000)), int(rng.integers(100, 1000))) for name in "abc"}
    way = floats(layers)
    if integer:
        way = replace(way, storage=TECHNIQUES[-1], saving={("prune_channels", 0.5, "b"): 0.8})
    allocator = Allocator(layers, probes(rng, list(layers), coupled=coupled), TECHNIQUES, way)
    low, high = np.array(allocator.cheapest(BOTH).costs), np.array(allocator.costs_of({}, BOTH))
    limits = Limits(*(float(v) for v in low + share * (high - low)))
    found = allocator.best(limits)
    assert found is not None
    assert all(cost <= limit * (1 + 1e-6) for cost, limit in zip(found.costs, limits.given, strict=True))
    assert found.costs == pytest.approx(allocator.costs_of(found.chosen, limits))
    if integer:
        assert all(any(p.technique == "quantize" for p in own) for own in found.chosen.values())
    for own in found.chosen.values():
        kinds = [probe.technique for probe in own]
        assert len(set(kinds)) == len(kinds)
        assert not {"share", "quantize"} <= set(kinds)
    # These layers are few enough to be looked at together, also where channels save in other layers.
    assert found.divergence <= tried(allocator, limits) * (1 + 1e-4) + 1e-9


Chosen = Mapping[str, tuple[Probe, ...]]


def alone(chosen: Chosen) -> float:
    """Return what all layers lose, each by itself."""
    return sum(probe.divergence for own in chosen.values() for probe in own)


def tried(allocator: Allocator, limits: Limits, lost: Callable[[Chosen], float] = alone) -> float:
    """Return the least divergence of what is surely within the limits, found by trying everything."""
    layers = list(allocator._combinations)
    every = (dict(zip(layers, pick, strict=True)) for pick in itertools.product(*allocator._combinations.values()))
    fitting = (
        lost(chosen)
        for chosen in every
        if all(
            cost <= limit * (1 - 1e-6)
            for cost, limit in zip(allocator.costs_of(chosen, limits), limits.given, strict=True)
        )
    )
    return min(fitting, default=float("inf"))


@given(seed=st.integers(0, 10_000), share=st.floats(0.1, 1.0), most=st.sampled_from([1, 20_000]))
@settings(deadline=None, max_examples=25)
def test_what_pairs_of_layers_lose_together_is_avoided(seed, share, most):
    rng = np.random.default_rng(seed)
    layers = {name: Cost(int(rng.integers(100, 1000)), int(rng.integers(100, 1000))) for name in "abcd"}
    known = probes(rng, list(layers), coupled=False)
    together = [Interaction("prune", 0.5, frozenset("abc"), 0.02), Interaction("share", 8, frozenset("bd"), 0.01)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "_MOST_JOINT", most)
        allocator = Allocator(layers, known, TECHNIQUES, floats(layers), (), together)
    low, high = np.array(allocator.cheapest(BOTH).costs), np.array(allocator.costs_of({}, BOTH))
    limits = Limits(*(float(v) for v in low + share * (high - low)))
    found = allocator.best(limits)
    assert found is not None

    def lost(chosen: Chosen) -> float:
        techniques = {name: {probe.technique for probe in own} for name, own in chosen.items()}
        pruned = [name for name in "abc" if "prune" in techniques[name]]
        shared = [name for name in "bd" if "share" in techniques[name]]
        pairs = (0.02 * math.comb(len(pruned), 2), 0.01 * math.comb(len(shared), 2))
        return sum(pairs) + alone(chosen)

    assert found.divergence == pytest.approx(lost(found.chosen))
    assert sum(allocator.divergences(found.chosen).values()) == pytest.approx(found.divergence)
    assert found.divergence <= tried(allocator, limits, lost) * (1 + 1e-4) + 1e-9


def test_of_too_many_layers_for_that_most_choices_are_the_best_and_the_others_near(monkeypatch):
    monkeypatch.setattr(allocation, "_MOST_JOINT", 1)
    found, best = [], []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        layers = {name: Cost(int(rng.integers(100, 1000)), int(rng.integers(100, 1000))) for name in "abc"}
        allocator = Allocator(layers, probes(rng, list(layers), coupled=True), TECHNIQUES, floats(layers))
        low, high = (np.array(allocator.costs_of(c, BOTH)) for c in (allocator.cheapest(BOTH).chosen, {}))
        limits = Limits(*(float(v) for v in low + rng.uniform(0.1, 1) * (high - low)))
        choice = allocator.best(limits)
        assert choice is not None
        found.append(choice.divergence)
        best.append(tried(allocator, limits))
    exact = np.mean(np.array(found) <= np.array(best) * (1 + 1e-4) + 1e-9)
    assert exact >= 2 / 3
    assert sum(found) <= 1.15 * sum(best)


def test_what_cannot_be_reached_is_none_and_the_cheapest_says_how_far_it_goes():
    layers = {name: Cost(100, 1000) for name in "ab"}
    allocator = Allocator(
        layers, probes(np.random.default_rng(0), list("ab"), coupled=False), TECHNIQUES, floats(layers)
    )
    # Half of the channels of a, zeros, and few clusters in both.
    least = 100 + 1000 * 0.5 * 0.6 * 0.15 + 1000 * 0.6 * 0.15
    assert allocator.cheapest(Limits(1.0, None)).costs == pytest.approx((least,))
    assert allocator.best(Limits(least - 1, None)) is None
    assert allocator.best(Limits(least + 1, None)) is not None


def test_bytes_of_zeros_and_few_values_are_those_that_were_measured_of_both():
    layers = {name: Cost(100, 1000) for name in "ab"}
    known = probes(np.random.default_rng(0), list("ab"), coupled=True)
    pairs = [Pair("a", ("prune", 0.5), ("share", 8), 0.14), Pair("b", ("prune", 0.5), ("share", 8), 0.13)]
    allocator = Allocator(layers, known, TECHNIQUES, floats(layers), pairs)

    def chosen(layer: str, *names: str) -> tuple[Probe, ...]:
        return tuple(p for p in known if p.layer == layer and p.technique in names)

    both = {"a": chosen("a", "prune_channels", "prune", "share"), "b": chosen("b", "prune")}
    assert allocator.bytes_of(both) == pytest.approx({"a": 1000 * 0.5 * 0.14, "b": 1000 * 0.5 * 0.6})
    assert allocator.cheapest(Limits(1.0, None)).costs == pytest.approx((100 + 500 * 0.14 + 500 * 0.13,))


def test_blocks_are_chosen_for_exactly_however_many_there_are():
    """Each first layer of a pair loses channels that the second one reads: twenty pairs, against each pair's best."""
    rng = np.random.default_rng(0)
    layers = {f"{part}{number}": Cost(100, int(rng.integers(500, 1500))) for number in range(20) for part in "ab"}
    known = []
    for number in range(20):
        pair = [f"a{number}", f"b{number}"]
        known += probes(rng, pair, coupled=True)
    allocator = Allocator(layers, known, TECHNIQUES, floats(layers))
    # A price for a byte splits the program into one for each pair; what it spends is a limit that it is the best for.
    price, spent, lost = 1e-4, 100.0, 0.0
    for number in range(20):
        own = {name: allocator._combinations[name] for name in (f"a{number}", f"b{number}")}
        outcomes = []
        for pick in itertools.product(*own.values()):
            chosen = dict(zip(own, pick, strict=True))
            size = sum(allocator.bytes_of(chosen)[name] for name in own)
            outcomes.append((sum(p.divergence for one in pick for p in one), size))
        error, size = min(outcomes, key=lambda outcome: outcome[0] + price * outcome[1])
        spent, lost = spent + size, lost + error
    found = allocator.best(Limits(spent * (1 + 1e-5), None))
    assert found is not None
    assert found.divergence == pytest.approx(lost, rel=1e-3)
    assert found.costs[0] <= spent * (1 + 2e-5)
