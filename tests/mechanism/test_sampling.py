"""Poisson sampling: coins of probability q, independent across units and steps. False alarms: below 1e-6 per test."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binom, chi2

import privgrad as pg
from privgrad.mechanism.randomness import SecureSource, SeededSource, Source
from privgrad.mechanism.sampling import PoissonSampling

SOURCES = [SecureSource, lambda: SeededSource(3, "sampling")]


@pytest.mark.parametrize("make", SOURCES)
def test_each_unit_has_the_stated_rate(make: type[Source]) -> None:
    """Sized to reject a rate that is 5 % off: 2e6 coins at q = 0.1."""
    units, steps, q = 2000, 1000, 0.1
    source, sampling = make(), PoissonSampling(rate=q, divisor=1.0)
    drawn = torch.zeros(units)
    sizes = []
    for step in range(steps):
        chosen = sampling.draw(units, source.at(step + 1))
        drawn[chosen] += 1
        sizes.append(len(chosen))
    total = int(drawn.sum())
    assert binom.ppf(2e-7, units * steps, q) <= total <= binom.isf(2e-7, units * steps, q)
    assert binom.isf(2e-7, units * steps, q) < 1.05 * q * units * steps, "the test would see 5 %"
    spread = float(((drawn - steps * q) ** 2).sum() / (steps * q * (1 - q)))
    assert chi2.ppf(2e-7, units) <= spread <= chi2.isf(2e-7, units), "units are not alike"
    batches = torch.tensor(sizes, dtype=torch.float64)
    spread = float(((batches - units * q) ** 2).sum() / (units * q * (1 - q)))
    assert chi2.ppf(2e-7, steps) <= spread <= chi2.isf(2e-7, steps), "batch sizes are not binomial: no Poisson sampling"


@pytest.mark.parametrize("make", SOURCES)
def test_steps_are_independent(make: type[Source]) -> None:
    """A unit that was in step t is in step t + 1 with the same probability as any other."""
    units, q = 400_000, 0.25
    source, sampling = make(), PoissonSampling(rate=q, divisor=1.0)
    first = torch.zeros(units, dtype=torch.bool)
    second = first.clone()
    first[sampling.draw(units, source.at(1))] = True
    second[sampling.draw(units, source.at(2))] = True
    both = int((first & second).sum())
    assert binom.ppf(2e-7, units, q * q) <= both <= binom.isf(2e-7, units, q * q)


def test_neighbouring_units_are_independent() -> None:
    units, q = 400_000, 0.25
    drawn = torch.zeros(units, dtype=torch.bool)
    drawn[PoissonSampling(rate=q, divisor=1.0).draw(units, SecureSource())] = True
    pairs = int((drawn[0::2] & drawn[1::2]).sum())
    assert binom.ppf(2e-7, units // 2, q * q) <= pairs <= binom.isf(2e-7, units // 2, q * q)


def test_full_batch_takes_everyone() -> None:
    assert PoissonSampling(rate=1.0, divisor=1.0).draw(1000, SecureSource()).tolist() == list(range(1000))


def test_rate_and_divisor_are_constants_of_the_plan() -> None:
    sampling = PoissonSampling(expected_batch_size=64, dataset_size=1000)
    assert sampling.probability == 0.064
    assert sampling.normaliser == 64.0


@pytest.mark.parametrize(
    "numbers",
    [
        {},
        {"expected_batch_size": 0},
        {"expected_batch_size": -3},
        {"expected_batch_size": float("nan")},
        {"expected_batch_size": 11, "dataset_size": 10},
        {"rate": 0.0, "divisor": 1.0},
        {"rate": 1.5, "divisor": 1.0},
        {"rate": float("nan"), "divisor": 1.0},
        {"rate": 0.5, "expected_batch_size": 3},
        {"rate": 0.5, "divisor": 0},
        {"rate": True, "divisor": 1.0},
    ],
)
def test_impossible_numbers_are_refused(numbers: dict[str, float]) -> None:
    with pytest.raises(pg.PrivgradError, match="sampling"):
        PoissonSampling(**numbers)  # type: ignore[arg-type]


def test_add_remove_may_not_know_the_size() -> None:
    sampling = PoissonSampling(expected_batch_size=64, dataset_size=1000)
    with pytest.raises(pg.RefusedError, match="size of the data set is private"):
        pg.Plan(sampling=sampling, steps=1, adjacency=pg.Adjacency.ADD_REMOVE)
    plan = pg.Plan(sampling=PoissonSampling(expected_batch_size=64), steps=1, adjacency=pg.Adjacency.ADD_REMOVE)
    with pytest.raises(pg.RefusedError, match="size of the data set is private"):
        plan.for_dataset(1000)
    with pytest.raises(pg.PrivgradError, match="divisor"):
        _ = (
            pg.Plan(sampling=PoissonSampling(rate=0.1), steps=1, adjacency=pg.Adjacency.ADD_REMOVE)
            .for_dataset(9)
            .divisor
        )
