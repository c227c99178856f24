"""What samplers draw, against what they are accounted as. False alarms: below 1e-6 per test."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binom, chi2

import privgrad as pg
from privgrad.mechanism.randomness import SecureSource, SeededSource, Source
from privgrad.mechanism.sampling import (
    FixedSizeSampling,
    FullBatch,
    PoissonSampling,
    ShuffledBatches,
    TruncatedPoissonSampling,
)
from privgrad.privacy.accounting import Precision

SOURCES = [SecureSource, lambda: SeededSource(3, "sampling")]


@pytest.mark.parametrize("make", SOURCES)
def test_each_unit_has_the_stated_rate(make: type[Source]) -> None:
    """Sized to reject a rate that is 5 % off: 2e6 coins at q = 0.1."""
    units, steps, q = 2000, 1000, 0.1
    source, sampling = make(), PoissonSampling(rate=q, divisor=1.0)
    drawn = torch.zeros(units)
    sizes = []
    for step in range(steps):
        chosen = sampling.draw(units, step + 1, source.at(step + 1))
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
    first[sampling.draw(units, 1, source.at(1))] = True
    second[sampling.draw(units, 2, source.at(2))] = True
    both = int((first & second).sum())
    assert binom.ppf(2e-7, units, q * q) <= both <= binom.isf(2e-7, units, q * q)


def test_neighbouring_units_are_independent() -> None:
    units, q = 400_000, 0.25
    drawn = torch.zeros(units, dtype=torch.bool)
    drawn[PoissonSampling(rate=q, divisor=1.0).draw(units, 1, SecureSource())] = True
    pairs = int((drawn[0::2] & drawn[1::2]).sum())
    assert binom.ppf(2e-7, units // 2, q * q) <= pairs <= binom.isf(2e-7, units // 2, q * q)


def test_full_batch_takes_everyone() -> None:
    assert PoissonSampling(rate=1.0, divisor=1.0).draw(1000, 1, SecureSource()).tolist() == list(range(1000))


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


@pytest.mark.parametrize("make", SOURCES)
def test_truncated_batches_are_bounded_and_every_unit_is_as_likely_to_stay(make: type[Source]) -> None:
    """At q n = 10 and at most 8, the chance to be in a batch is E[min(N, 8)] / n for every unit, the first and the last."""
    units, steps, q, largest = 100, 6000, 0.1, 8
    source, sampling = make(), TruncatedPoissonSampling(rate=q, divisor=1.0, dataset_size=units, max_batch_size=largest)
    drawn = torch.zeros(units)
    sizes = []
    for step in range(1, steps + 1):
        chosen = sampling.draw(units, step, source.at(step))
        assert (chosen[1:] > chosen[:-1]).all()
        drawn[chosen] += 1
        sizes.append(len(chosen))
    assert max(sizes) == largest
    assert min(sizes) < largest
    share = sum(min(k, largest) * binom.pmf(k, units, q) for k in range(units + 1)) / units
    spread = float(((drawn - steps * share) ** 2).sum() / (steps * share * (1 - share)))
    assert chi2.ppf(2e-7, units) <= spread <= chi2.isf(2e-7, units), "units are not alike"


@pytest.mark.parametrize("make", SOURCES)
def test_fixed_size_draws_every_subset_alike(make: type[Source]) -> None:
    """All 10 subsets of 2 out of 5, over 10,000 steps."""
    source, sampling = make(), FixedSizeSampling(batch_size=2, dataset_size=5)
    counts: dict[tuple[int, ...], int] = {}
    for step in range(1, 10_001):
        chosen = tuple(sampling.draw(5, step, source.at(step)).tolist())
        counts[chosen] = counts.get(chosen, 0) + 1
    assert len(counts) == 10
    assert all(len(set(chosen)) == 2 and list(chosen) == sorted(chosen) for chosen in counts)
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) <= chi2.isf(1e-6, 9)


def test_every_unit_takes_part_once_in_a_shuffled_epoch_also_after_a_resume() -> None:
    sampling = ShuffledBatches(batch_size=3, dataset_size=10)
    epochs = []
    for epoch in range(3):
        drawn = [sampling.draw(10, 4 * epoch + k, SecureSource()).tolist() for k in range(1, 5)]
        assert [len(batch) for batch in drawn] == [3, 3, 3, 1]
        assert sorted(unit for batch in drawn for unit in batch) == list(range(10))
        assert drawn == [sampling.draw(10, 4 * epoch + k, SecureSource()).tolist() for k in range(1, 5)]
        epochs.append(drawn)
    assert epochs[0] != epochs[1] != epochs[2]
    assert ShuffledBatches(batch_size=3, dataset_size=10, order=1).draw(10, 1, SecureSource()).tolist() != epochs[0][0]


def test_a_shuffled_run_is_charged_one_gaussian_for_each_epoch_that_was_begun() -> None:
    plan = pg.Plan(
        sampling=ShuffledBatches(batch_size=3, dataset_size=10), steps=9, noise=pg.GaussianNoise(multiplier=4.0)
    )
    alone = pg.Plan(sampling=FullBatch(divisor=3.0), steps=3, noise=pg.GaussianNoise(multiplier=4.0))
    for steps, begun in ((0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)):
        assert plan.epsilon(steps=steps) == alone.epsilon(steps=begun)
        assert sum(plan.events(steps).values()) == steps
    charged = [type(plan.step_event(step)).__name__ for step in range(1, 10)]
    assert charged == 2 * ["GaussianDpEvent", "NoOpDpEvent", "NoOpDpEvent", "NoOpDpEvent"] + ["GaussianDpEvent"]


def test_full_batch_is_accounted_as_poisson_at_rate_one() -> None:
    full = pg.Plan(sampling=FullBatch(), steps=5, noise=pg.GaussianNoise(multiplier=4.0)).for_dataset(10)
    poisson = pg.Plan(sampling=PoissonSampling(rate=1.0, divisor=10.0), steps=5, noise=pg.GaussianNoise(multiplier=4.0))
    assert full.divisor == 10.0
    assert full.epsilon() == poisson.epsilon()
    assert full.sampling.draw(4, 1, SecureSource()).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("sampling", "accountant"),
    [
        (PoissonSampling(expected_batch_size=20, dataset_size=100), "pld"),
        (TruncatedPoissonSampling(expected_batch_size=20, dataset_size=100, max_batch_size=30), "pld"),
        (FixedSizeSampling(batch_size=20, dataset_size=100), "rdp"),
        (ShuffledBatches(batch_size=20, dataset_size=100), "pld"),
        (FullBatch(divisor=100.0), "pld"),
    ],
    ids=lambda value: getattr(value, "kind", value),
)
def test_every_sampler_goes_through_plan_calibration_and_json(sampling: object, accountant: str) -> None:
    plan = pg.Plan(sampling=sampling, steps=12, accountant=accountant).calibrate(3.0)  # type: ignore[arg-type]
    assert 2.8 < plan.epsilon(precision=Precision.FINE) <= 3.0
    assert pg.Plan.from_json(plan.to_json()) == plan
    assert plan.sampling.steps_in(2) == {"full_batch": 2}.get(sampling.kind, 10)  # type: ignore[attr-defined]
    assert plan.for_dataset(100).divisor == (100.0 if sampling.kind == "full_batch" else 20.0)  # type: ignore[attr-defined]
    if sampling.kind != "full_batch":  # type: ignore[attr-defined]
        with pytest.raises(pg.PrivgradError, match="made for 100 records and the data set has 101"):
            plan.for_dataset(101)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FixedSizeSampling(), "batch_size"),
        (lambda: FixedSizeSampling(batch_size=2.5), "batch_size"),
        (lambda: FixedSizeSampling(batch_size=11, dataset_size=10), "batch_size"),
        (lambda: FixedSizeSampling(batch_size=11).for_dataset(10, pg.Adjacency.ZERO_OUT), "batch_size"),
        (lambda: ShuffledBatches(batch_size=0), "batch_size"),
        (lambda: ShuffledBatches(batch_size=1, order=-1), "order"),
        (lambda: TruncatedPoissonSampling(rate=0.1, divisor=1.0), "max_batch_size"),
        (lambda: TruncatedPoissonSampling(max_batch_size=4), "expected_batch_size"),
        (lambda: FullBatch(divisor=0), "divisor"),
        (lambda: FullBatch(divisor=float("inf")), "divisor"),
    ],
)
def test_impossible_numbers_of_the_other_samplers_are_refused(make: object, says: str) -> None:
    with pytest.raises(pg.PrivgradError, match=says):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        (FixedSizeSampling(batch_size=2), "gives away"),
        (ShuffledBatches(batch_size=2), "shifts"),
        (FullBatch(), "divisor"),
        (TruncatedPoissonSampling(expected_batch_size=2, max_batch_size=4), "cut off"),
    ],
    ids=lambda value: getattr(value, "kind", "says"),
)
def test_add_remove_keeps_the_number_of_units_private_from_every_sampler(sampling: object, says: str) -> None:
    with pytest.raises(pg.PrivgradError, match=says):
        pg.Plan(sampling=sampling, steps=1, adjacency=pg.Adjacency.ADD_REMOVE).for_dataset(10)  # type: ignore[arg-type]


@pytest.mark.parametrize("stated", [100, 1_000_000])
def test_truncation_under_add_remove_is_refused(stated: int) -> None:
    """Of 100 records nothing is ever cut off: plain Poisson. Accounted as of a million, it would seem hardly sampled."""
    sampling = TruncatedPoissonSampling(rate=0.5, divisor=50.0, dataset_size=stated, max_batch_size=100)
    with pytest.raises(pg.RefusedError, match="the number of records, which is private"):
        pg.Plan(sampling=sampling, steps=1, noise=pg.GaussianNoise(2.0), adjacency=pg.Adjacency.ADD_REMOVE).epsilon()
