"""Noise: the claimed scale, fresh for every step, from the source that the plan names. False alarms: below 1e-6 per test."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from dp_accounting import NoOpDpEvent
from scipy.stats import chi2, kstest

import privgrad as pg
from privgrad.mechanism.randomness import SecureSource, SeededSource, Source
from privgrad.mechanism.states import ClippedSum, Part
from privgrad.privacy.ledger import Receipt
from privgrad.privacy.sensitivity import Bound
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


def test_seeded_noise_is_of_its_seed_its_purpose_its_plan_and_its_step_alone() -> None:
    """Seeds may be long: torch's own generator takes the last 32 bits of one, and repeats itself within 10^5 steps."""
    sources = [
        SeededSource(seed, purpose, plan, step)
        for seed in (7, 7 + 2**32)
        for purpose in ("noise", "sampling")
        for plan in ("a", "b")
        for step in (1, 2)
    ]
    drawn = [source.normal_(torch.empty(100)) for source in sources]
    assert not any(torch.equal(one, other) for i, one in enumerate(drawn) for other in drawn[:i])
    assert torch.equal(SeededSource(7, "noise", "a").at(2).normal_(torch.empty(100)), drawn[1])


def test_two_plans_with_one_seed_share_no_noise() -> None:
    """Else a release of one, less a multiple of the other's, has none."""
    one, other = (
        runner(
            full_batch_plan(1, multiplier=1.0, seed=7, clipping=pg.FlatClipping(max_norm=norm)),
            Direction(5000),
            linear_loss,
        )
        .release(*rows(torch.zeros(1, 5000)))
        .update["weight"]
        for norm in (1.0, 0.5)
    )
    assert abs(float((one * other).mean()) / 0.5) < 5.5 / 5000**0.5


HALF = 2**15
"""Box-Muller's pairs are so far apart in a block of noise."""


def angles_off_the_lattice(noise: torch.Tensor) -> float:
    """How far (z-score) the angles of pairs lie from the multiples of 2^-22, on which float32 angles above 2 all are."""
    first, second = noise.double().view(-1, 2, HALF).unbind(1)
    turns = torch.atan2(second, first).abs()[(first.square() + second.square() > 1)]
    off = turns[turns > 2] * 2**22
    mean = (off - off.round()).abs().mean()
    return float((mean - 0.25) * (48 * len(off)) ** 0.5)


def in_single_precision(count: int) -> torch.Tensor:
    radius = torch.rand(count // 2, dtype=torch.float64).log().mul(-2).float().sqrt().view(-1, HALF)
    angle = torch.empty(count // 2).uniform_(-np.pi, np.pi).view(-1, HALF)
    return torch.stack([angle.cos() * radius, angle.sin() * radius], 1).flatten()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", SOURCES)
def test_who_knows_the_sum_sees_no_lattice_of_the_noise(make: type[Source], dtype: torch.dtype) -> None:
    """The attack: subtract the sum that one expects, and look whether what is left can be noise. It was right 40 times of 40."""
    count, scale = 2**20, 0.75
    torch.manual_seed(0)
    known = 0.3 * torch.randn(count)
    as_it_was = known + scale * in_single_precision(count)
    assert angles_off_the_lattice(as_it_was.double() - known.double()) < -100, "the attack itself"
    sums = ClippedSum([Part("g", ("w",), Bound.ball(scale))], {"w": known.to(dtype, copy=True)}, False)
    noised = pg.GaussianNoise(multiplier=1.0).add(sums, Receipt(1, NoOpDpEvent()), make()).sums.values["w"]
    assert noised.dtype == dtype
    assert abs(angles_off_the_lattice(noised.double() - known.double())) < 6
    cells = noised.double() * 2**20
    if dtype == torch.float64:
        assert torch.equal(cells, cells.round()), "digits of the noise itself are left"
    check_scale(noised.double() - known.double(), scale)


def test_far_tails_have_digits_of_their_own() -> None:
    """Without them, radii beyond 6.5 would lie on a lattice that is coarser than what is released."""
    source = SecureSource()
    source.normal_(torch.empty(4))
    found = source._minus_twice_log(torch.zeros(4000, dtype=torch.int64))
    beyond = 63 * np.log(4.0)
    assert float(found.min()) >= beyond - 1e-9
    assert found.unique().numel() == 4000
    assert kstest((found.numpy() - beyond) / 2, "expon").pvalue > 1e-7


def test_noise_below_the_range_of_floats_is_refused() -> None:
    sums = ClippedSum([Part("g", ("w",), Bound.ball(1e-250))], {"w": torch.zeros(3)}, False)
    with pytest.raises(pg.PrivgradError, match="larger clipping norm"):
        pg.GaussianNoise(multiplier=1.0).add(sums, Receipt(1, NoOpDpEvent()), SecureSource())


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


def test_a_forked_process_has_a_key_of_its_own() -> None:
    """With its parent's, it would add the same noise to another sum: their difference would be without any."""
    source = SecureSource()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, source.normal_(torch.empty(4)).numpy().tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    drawn = torch.frombuffer(bytearray(os.read(reading, 16)), dtype=torch.float32)
    assert not torch.equal(drawn, source.normal_(torch.empty(4)))
