"""Noise: the claimed scale, fresh for every step, from the source that the plan names. False alarms: below 1e-6 per test."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chi2, kstest

import privgrad as pg
from privgrad.mechanism.randomness import SecureSource, SeededSource, Source
from tests.helpers import Direction, full_batch_plan, linear_loss, rows, runner

SOURCES = [SecureSource, lambda: SeededSource(3, "noise")]


def check_scale(values: torch.Tensor, scale: float) -> None:
    """Chi-square on the variance; with 20,000 draws or more a scale that is 5 % off is rejected."""
    count = values.numel()
    statistic = float((values.double() / scale).square().sum())
    assert chi2.ppf(2e-7, count) <= statistic <= chi2.isf(2e-7, count)
    assert 0.95**2 * count < chi2.ppf(2e-7, count) if count >= 20_000 else count >= 1000


@pytest.mark.parametrize("make", SOURCES)
def test_normals_are_normal(make: type[Source]) -> None:
    values = make().at(1).normal_(torch.empty(200_001))
    check_scale(values, 1.0)
    assert kstest(values.numpy(), "norm").pvalue > 1e-7
    odd, even = values[1::2][:100_000].double(), values[0::2][:100_000].double()
    halves = values[:100_000].double(), values[100_000:200_000].double()
    for one, other in ((odd, even), halves):
        assert abs(float((one * other).mean())) < 5.5 / np.sqrt(100_000), "pairs are correlated"
    assert values.unique().numel() > 195_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 7, 2**16 - 1, 2**16 + 3])
def test_secure_normals_fill_all_of_any_tensor(dtype: torch.dtype, count: int) -> None:
    source = SecureSource()
    values = torch.stack([source.normal_(torch.full((count,), 99.0, dtype=dtype)) for _ in range(4)])
    assert float(values.abs().max()) < 9
    assert values.dtype == dtype
    assert values.unique().numel() > 0.99 * values.numel(), "numbers repeat"
    if count > 1000:
        check_scale(values.flatten(), 1.0)
        assert kstest(values.flatten().numpy(), "norm").pvalue > 1e-7


def test_secure_normals_reach_far_tails() -> None:
    values = SecureSource().normal_(torch.empty(4_000_000))
    assert 4.5 < float(values.abs().max()) < 7.5


@pytest.mark.parametrize("multiplier", [0.5, 2.0])
@pytest.mark.parametrize("max_norm", [0.1, 3.0])
def test_release_has_the_claimed_scale(multiplier: float, max_norm: float) -> None:
    plan = full_batch_plan(5, multiplier=multiplier, clipping=pg.FlatClipping(max_norm=max_norm))
    update = runner(plan, Direction(40_000), linear_loss).release(*rows(torch.zeros(5, 40_000))).update["weight"]
    check_scale(update, multiplier * max_norm / 5)


def test_every_tensor_is_noised() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.Linear(40, 30))
    plan = full_batch_plan(1, multiplier=2.0)
    step = runner(plan, model, pg.supervised(torch.nn.functional.cross_entropy))
    update = step.release(None, rows(torch.zeros(0))[1]).update
    assert update.keys() == dict(model.named_parameters()).keys()
    for value in (update["0.weight"], update["1.weight"]):
        check_scale(value, 2.0)
    biases = torch.cat([update["0.bias"], update["1.bias"]])
    assert 40 < float((biases / 2).square().sum()) < 125
    assert biases.ne(0).all()
    one, other = update["0.weight"].flatten(), update["1.weight"].flatten()
    assert abs(float((one * other).mean())) / 4 < 5.5 / 1200**0.5, "two tensors share their noise"


def test_steps_have_fresh_noise() -> None:
    for seed in (None, 7):
        plan = full_batch_plan(1, steps=2, multiplier=1.0, seed=seed)
        step = runner(plan, Direction(1000), linear_loss)
        one, other = (step.release(*rows(torch.zeros(1, 1000))).update["weight"] for _ in range(2))
        assert not torch.equal(one, other)
        check_scale(one - other, 2**0.5)


def test_secure_runs_differ_and_seeded_runs_repeat() -> None:
    def first(seed: int | None) -> torch.Tensor:
        plan = full_batch_plan(1, multiplier=1.0, seed=seed)
        return runner(plan, Direction(100), linear_loss).release(*rows(torch.zeros(1, 100))).update["weight"]

    assert not torch.equal(first(None), first(None))
    assert torch.equal(first(7), first(7))
    assert not torch.equal(first(7), first(8))


def test_seeded_noise_is_indexed_by_the_charged_step() -> None:
    """A step that was charged and lost in a crash took its noise with it."""
    plan = full_batch_plan(1, steps=3, multiplier=1.0, seed=7)
    straight, crashed = (runner(plan, Direction(100), linear_loss) for _ in range(2))
    batch = rows(torch.zeros(1, 100))
    noises = [straight.release(*batch).update["weight"] for _ in range(2)]
    crashed.ledger.charge(plan.step_event())
    assert torch.equal(crashed.release(*batch).update["weight"], noises[1])


def test_seeded_noise_and_sampling_do_not_share_a_stream() -> None:
    noise = SeededSource(7, "noise", 1).normal_(torch.empty(100))
    other = SeededSource(7, "sampling", 1).normal_(torch.empty(100))
    assert not torch.equal(noise, other)


def test_integers_are_uniform_without_modulo_bias() -> None:
    drawn = torch.bincount(SecureSource().integers(300_000, 3), minlength=3).double()
    assert float(((drawn - 1e5) ** 2 / 1e5).sum()) < chi2.isf(1e-7, 2)


@pytest.mark.parametrize("multiplier", [-1.0, float("nan"), float("inf"), "1", True])
def test_impossible_multipliers_are_refused(multiplier: object) -> None:
    with pytest.raises(pg.PrivgradError, match=r"noise\.multiplier"):
        pg.GaussianNoise(multiplier=multiplier)  # type: ignore[arg-type]


def test_a_plan_read_back_without_its_seed_cannot_run() -> None:
    plan = full_batch_plan(1, multiplier=1.0, seed=7)
    stored = pg.Plan.from_json(plan.to_json())
    assert "7" not in str(plan.to_json()["noise"]["insecure_seed"])
    assert stored.digest() == plan.digest()
    assert stored.epsilon() == plan.epsilon()
    with pytest.raises(pg.PrivgradError, match="without its seed"):
        runner(stored, Direction(3), linear_loss)


def test_normals_are_drawn_for_other_devices_too() -> None:
    """Of devices without values ("meta"), as of a GPU: the keystream is the processor's, and what it makes is copied."""
    out = torch.empty(2**16 + 3, device="meta")
    assert SecureSource().normal_(out) is out
