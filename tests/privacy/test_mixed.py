"""The accountant of Gaussian plus uniform noise: an upper bound, whatever the numbers."""

from __future__ import annotations

import math
import time

import numpy
import pytest
from dp_accounting.rdp import compute_epsilon
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from privgrad.privacy import mixed
from privgrad.privacy.accounting import Precision, attack_success, epsilon
from privgrad.privacy.adjacency import Adjacency
from privgrad.privacy.events import (
    Accountant,
    Mixed,
    MixedGaussianDpEvent,
    Sampled,
    Sampler,
    compose,
    event_from_json,
    event_to_json,
    relation,
    step_event,
)

FEW = settings(max_examples=8, deadline=None, derandomize=True, database=None)
SLOW = settings(max_examples=4, deadline=None, derandomize=True, database=None)
PAPER = {"rate": 0.03, "multiplier": 0.335, "width": 0.15 * 1500 / 20}


def simple_epsilon(p: float, steps: int = 3400, delta: float = 1e-5) -> tuple[float, int]:
    """The simple conversion, orders up to 19, and its order: as in the specification."""
    found = mixed.rdp(cap=1 / math.sqrt(p), **PAPER) * steps
    at = {order: float(rdp) + math.log(1 / delta) / (order - 1) for order, rdp in zip(mixed.ORDERS, found, strict=True)}
    best = min((order for order in at if order <= 19), key=lambda order: at[order])
    return at[best], best


def moment(k: int, x: float, s: float, width: float) -> float:
    """log A_k(x) by a fine trapezoid rule, far into the tails."""
    half = width / 2
    o = numpy.linspace(-half - 12 * s, half + k * x + 12 * s, 100_001)
    density = mixed._log_density(o, s, width)
    ratio = mixed._log_density(o - x, s, width) - density
    values = (numpy.expm1(k * ratio) - k * numpy.expm1(ratio)) * numpy.exp(density)
    return math.log1p(float(values.sum() * (o[1] - o[0])))


def test_the_density_is_that_of_the_sum() -> None:
    o = numpy.linspace(-8, 8, 101)
    expected = (ndtr((o + 1.5) / 0.7) - ndtr((o - 1.5) / 0.7)) / 3.0
    assert numpy.exp(mixed._log_density(o, 0.7, 3.0)) == pytest.approx(expected, rel=1e-6, abs=1e-15)
    slope = numpy.gradient(mixed._log_density(o, 0.7, 3.0), o)[20:-20]
    assert mixed._slope(o, 0.7, 3.0, mixed._log_density(o, 0.7, 3.0))[20:-20] == pytest.approx(slope, abs=0.05)


def test_the_papers_numbers() -> None:
    assert simple_epsilon(p=100) == (pytest.approx(8.0, abs=0.005), 4)
    assert simple_epsilon(p=1)[0] == pytest.approx(450.5, rel=2e-3)


@pytest.mark.parametrize("rate", [1e-7, 1e-4, 0.03])
@pytest.mark.parametrize("multiplier", [0.5, 20.0, 1000.0])
def test_a_divergence_far_below_rounding_is_not_lost(rate: float, multiplier: float) -> None:
    # A billion steps of it are something; the terms of the first three orders, written out, are a lower bound of what is told.
    found = mixed.rdp(rate, multiplier, 1.0, 0.1)
    excess = numpy.expm1(mixed.moments(multiplier, 1.0, 0.1)[:2])
    assert found[0] >= math.log1p(rate**2 * excess[0])
    three = 3 * rate**2 * (1 - rate) * excess[0] + rate**3 * excess[1]
    assert 2 * found[1] == pytest.approx(math.log1p(three), rel=1e-6)
    assert 2 * found[1] >= math.log1p(three)


def test_it_is_fast() -> None:
    """Counted, not timed: so many integrals, of so many numbers, however long the training is."""
    calls: list[int] = []
    original = mixed._log_moments

    def counted(*arguments: object) -> object:
        calls.append(len(arguments[3]))  # type: ignore[arg-type]
        return original(*arguments)  # type: ignore[arg-type]

    mixed.moments.cache_clear()
    mixed._log_moments = counted  # type: ignore[assignment]
    try:
        mixed.moments(0.335, 11.25, 0.1)
    finally:
        mixed._log_moments = original
    assert 10 < len(calls) < 1000
    assert sum(calls) < 20_000


@FEW
@given(
    st.floats(0.7, 3.0), st.floats(0.3, 30.0), st.floats(0.02, 1.0), st.sampled_from([2, 3, 5, 8]), st.floats(0.02, 1.0)
)
def test_moments_are_above_quadrature_and_not_by_much(s: float, width: float, cap: float, k: int, share: float) -> None:
    """At the largest shift, and at every smaller one."""
    bound = float(mixed.moments(s, width * s, cap)[k - 2])
    at_cap = moment(k, cap, s, width * s) / cap**2
    assert bound >= at_cap
    assert bound >= moment(k, share * cap, s, width * s) / (share * cap) ** 2
    if width > 3:
        assert bound <= 1.02 * max(at_cap, moment(k, 0.02 * cap, s, width * s) / (0.02 * cap) ** 2)


@FEW
@given(st.integers(0, 10**6), st.floats(0.3, 2.0), st.floats(0.5, 20.0), st.integers(1, 40), st.sampled_from([2, 3]))
def test_moments_are_above_a_monte_carlo_estimate(seed: int, s: float, width: float, p: int, k: int) -> None:
    """Of the whole vector, for a random shift within both bounds."""
    chance = numpy.random.default_rng(seed)
    shift = chance.normal(size=60)
    shift = numpy.clip(shift / numpy.linalg.norm(shift), -1 / math.sqrt(p), 1 / math.sqrt(p))
    draws = chance.normal(0, s, (20_000, 60)) + width * s * chance.uniform(-0.5, 0.5, (20_000, 60))
    logs = mixed._log_density(draws - shift, s, width * s) - mixed._log_density(draws, s, width * s)
    values = numpy.exp(k * logs.sum(1))
    estimate, error = values.mean(), values.std() / math.sqrt(len(values))
    bound = float(mixed.moments(s, width * s, 1 / math.sqrt(p))[k - 2])
    assert math.log(max(estimate - 5 * error, 1e-300)) <= bound


@SLOW
@given(st.floats(0.3, 2.0), st.floats(1.0, 30.0), st.integers(1, 100), st.floats(0.01, 0.5), st.integers(1, 1000))
def test_epsilon_moves_in_the_right_directions(s: float, width: float, p: int, rate: float, steps: int) -> None:
    def at(**changes: float) -> float:
        numbers = {"multiplier": s, "width": width * s, "cap": 1 / math.sqrt(p), "rate": rate, "steps": steps} | changes
        total = numbers.pop("steps") * mixed.rdp(**numbers)
        return float(compute_epsilon([float(order) for order in mixed.ORDERS], total, 1e-5)[0])

    found = at()
    assume(found > 1e-3)
    assert at(width=2 * width * s) <= found * (1 + 0.02)
    assert at(cap=min(1.0, 1.5 / math.sqrt(p))) >= found * (1 - 0.02)
    assert at(rate=min(1.0, 1.3 * rate)) >= found * (1 - 1e-9)
    assert at(steps=2 * steps) > found
    assert at(multiplier=1.3 * s) <= found * (1 + 0.02)


@pytest.mark.parametrize("p", [1.0, 100.0])
@pytest.mark.parametrize("s", [1e-5, 1e-2, 1.0, 1e3, 1e8])
@pytest.mark.parametrize("width", [1e-6, 1e-2, 1.0, 1e3, 1e9])
def test_no_numbers_hang_or_break_it_and_the_gaussian_is_never_exceeded(p: float, s: float, width: float) -> None:
    started = time.monotonic()
    found = mixed.rdp(0.1, s, width * s, 1 / math.sqrt(p))
    gaussian = mixed.rdp(0.1, s, 1e-9 * s, 1.0)
    assert (found >= 0).all()
    assert (found <= gaussian * (1 + 1e-6)).all()
    assert time.monotonic() - started < 60


def test_the_smaller_of_two_bounds_is_told() -> None:
    """p = 1: the route by moments gives 450, the plain Gaussian 277.3; with p = 100 the moments win."""
    sampled = Sampled(Sampler.POISSON, 0.03)
    rules = relation(Sampler.POISSON, Adjacency.ZERO_OUT, Accountant.PLD)

    def at(noise: Mixed | None) -> float:
        event = step_event(sampled, Adjacency.ZERO_OUT, Accountant.PLD, multiplier=0.335, mixed=noise)
        return epsilon(compose({event: 3400}), 1e-5, rules, Accountant.PLD, Precision.COARSE)

    plain = at(None)
    assert plain == pytest.approx(277.3, rel=0.01)
    assert at(Mixed(11.25, 1.0)) == plain
    assert at(Mixed(11.25, 100.0)) == pytest.approx(7.25, abs=0.01)


def test_the_event_goes_into_a_ledger_and_back() -> None:
    sampled = Sampled(Sampler.POISSON, 0.03)
    event = step_event(sampled, Adjacency.ADD_REMOVE, Accountant.RDP, multiplier=0.5, mixed=Mixed(3.0, 4.0))
    assert event_from_json(event_to_json(event)) == event
    rules = relation(Sampler.POISSON, Adjacency.ADD_REMOVE, Accountant.RDP)
    once, thrice = (epsilon(compose({event: count}), 1e-5, rules, Accountant.RDP) for count in (1, 3))
    assert once < thrice
    assert 0.5 < attack_success(compose({event: 3}), 1e-5, rules, Accountant.RDP) < 1


def test_a_mixed_event_beside_another_counts_without_its_uniform() -> None:
    event = step_event(
        Sampled(Sampler.POISSON, 0.1), Adjacency.ZERO_OUT, Accountant.RDP, multiplier=1.0, mixed=Mixed(9.0, 9.0)
    )
    other = step_event(Sampled(Sampler.POISSON, 0.1), Adjacency.ZERO_OUT, Accountant.RDP, multiplier=1.0)
    rules = relation(Sampler.POISSON, Adjacency.ZERO_OUT, Accountant.RDP)
    both = epsilon(compose({event: 2, other: 3}), 1e-5, rules, Accountant.RDP)
    assert both == pytest.approx(epsilon(compose({other: 5}), 1e-5, rules, Accountant.RDP), rel=1e-6)
    assert isinstance(event.event, MixedGaussianDpEvent)
