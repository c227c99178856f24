"""epsilon and attack_success: the reference values, the directions in which they move, and the edges."""

from __future__ import annotations

import math
import resource

import dp_accounting
import pytest
from dp_accounting import ComposedDpEvent, DpEvent, NeighboringRelation
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from privgrad.errors import PrivgradError
from privgrad.privacy import accounting
from privgrad.privacy.accounting import Precision, attack_success, epsilon
from privgrad.privacy.adjacency import Adjacency
from privgrad.privacy.events import (
    _SERIALISED,
    Accountant,
    MixedGaussianDpEvent,
    Sampled,
    Sampler,
    compose,
    event_to_json,
    relation,
    step_event,
)

ZERO_OUT = NeighboringRelation.REPLACE_SPECIAL
PURE = settings(max_examples=50, deadline=None, derandomize=True, database=None)
FEW = settings(max_examples=4, deadline=None, derandomize=True, database=None)


def spent(
    rate: float,
    multiplier: float,
    steps: int,
    *,
    delta: float = 1e-5,
    adjacency: Adjacency = Adjacency.ADD_REMOVE,
    accountant: Accountant = Accountant.PLD,
    precision: Precision = Precision.COARSE,
) -> float:
    """The epsilon of `steps` steps, through the table, as a plan asks for it."""
    sampler = Sampler.FULL_BATCH if rate == 1 else Sampler.POISSON
    event = step_event(Sampled(sampler, rate), adjacency, accountant, multiplier=multiplier)
    return epsilon(compose({event: steps}), delta, relation(sampler, adjacency, accountant), accountant, precision)


# Reference values


@pytest.mark.parametrize(
    ("rate", "multiplier", "steps", "accountant", "precision", "expected"),
    [
        (0.01, 1.0, 10_000, Accountant.PLD, Precision.FINE, 6.188),
        (0.01, 1.0, 10_000, Accountant.PLD, Precision.COARSE, 6.191),
        (0.01, 1.0, 10_000, Accountant.RDP, Precision.FINE, 6.713),
        (256 / 50_000, 0.7, 20_000, Accountant.PLD, Precision.FINE, 9.737),
        (256 / 50_000, 0.7, 20_000, Accountant.RDP, Precision.FINE, 10.650),
    ],
)
def test_reference_values_of_the_specification(rate, multiplier, steps, accountant, precision, expected):
    """specs/accounting.md, delta = 1e-5, add/remove; the coarse figure was taken on another coarse grid."""
    assert spent(rate, multiplier, steps, accountant=accountant, precision=precision) == pytest.approx(
        expected, abs=0.01
    )


@pytest.mark.parametrize(
    ("accountant", "expected", "tolerance"), [(Accountant.PLD, 277.3, 0.05), (Accountant.RDP, 551.0, 0.5)]
)
def test_reference_values_of_the_plain_gaussian_of_modelmix(accountant, expected, tolerance):
    """Stated to one decimal and to none; the tolerance is half of the last digit that is stated."""
    got = spent(0.03, 0.335, 3_400, accountant=accountant, precision=Precision.FINE)
    assert got == pytest.approx(expected, abs=tolerance)


def test_the_first_reference_lies_where_another_accountant_puts_it():
    """prv-accountant brackets the first row by 6.177 and 6.198."""
    assert 6.177 <= spent(0.01, 1.0, 10_000, precision=Precision.FINE) <= 6.198


# Directions


@pytest.mark.parametrize("accountant", list(Accountant))
@FEW
@given(
    rate=st.floats(0.01, 0.3),
    multiplier=st.floats(0.7, 4.0),
    steps=st.integers(5, 1_000),
    log_delta=st.floats(-7, -4),
    factor=st.floats(1.1, 3.0),
    adjacency=st.sampled_from([Adjacency.ZERO_OUT, Adjacency.ADD_REMOVE]),
)
def test_epsilon_grows_with_steps_and_rate_and_falls_with_multiplier_and_delta(
    accountant, rate, multiplier, steps, log_delta, factor, adjacency
):
    def at(rate: float = rate, multiplier: float = multiplier, steps: int = steps, delta: float = 10**log_delta):
        return spent(rate, multiplier, steps, delta=delta, adjacency=adjacency, accountant=accountant)

    base = at()
    assert 0 < base < math.inf
    assert at(steps=math.ceil(steps * factor)) > base
    assert at(rate=rate * factor) > base
    assert at(multiplier=multiplier * factor) < base
    assert at(delta=10**log_delta * factor) < base


@pytest.mark.parametrize(
    ("rate", "multiplier", "steps", "adjacency"),
    [
        (0.01, 1.0, 10_000, Adjacency.ZERO_OUT),
        (0.1, 2.0, 500, Adjacency.REPLACE_ONE),
        (1, 8.0, 30, Adjacency.ZERO_OUT),
    ],
)
def test_the_coarse_grid_never_understates_the_fine_one(rate, multiplier, steps, adjacency):
    fine = spent(rate, multiplier, steps, adjacency=adjacency, precision=Precision.FINE)
    coarse = spent(rate, multiplier, steps, adjacency=adjacency, precision=Precision.COARSE)
    assert coarse >= fine * (1 - 1e-3)
    assert coarse <= fine * 1.02


@pytest.mark.parametrize(("rate", "multiplier", "steps"), [(0.01, 1.0, 1_000), (0.2, 3.0, 50), (1, 10.0, 20)])
def test_pld_is_never_looser_than_rdp(rate, multiplier, steps):
    """Both are upper bounds of the same number, and PLD is the tighter one."""
    assert spent(rate, multiplier, steps) <= spent(rate, multiplier, steps, accountant=Accountant.RDP)


# Composition

ONE_OF_EACH_KIND: dict[str, DpEvent] = {
    "gaussian": dp_accounting.GaussianDpEvent(4.0),
    "poisson_sampled": dp_accounting.PoissonSampledDpEvent(0.5, dp_accounting.GaussianDpEvent(2.0)),
    "truncated_poisson_gaussian": dp_accounting.TruncatedSubsampledGaussianDpEvent(20, 0.5, 12, 4.0),
    "sampled_without_replacement": dp_accounting.SampledWithoutReplacementDpEvent(
        20, 4, dp_accounting.GaussianDpEvent(2.0)
    ),
    "mixed_gaussian": MixedGaussianDpEvent(2.0, 20.0, 9.0),
}


def test_every_event_kind_of_the_ledger_is_composed_below():
    """A new kind of event needs a line in ONE_OF_EACH_KIND, and with it the composition test."""
    assert set(ONE_OF_EACH_KIND) == set(_SERIALISED) - {"non_private", "no_op"}
    for kind, event in ONE_OF_EACH_KIND.items():
        assert event_to_json(event)["kind"] == kind


COMPOSED = [
    *[(kind, ZERO_OUT, accountant) for kind in ("gaussian", "poisson_sampled") for accountant in Accountant],
    *[(kind, NeighboringRelation.REPLACE_ONE, Accountant.PLD) for kind in ("gaussian", "poisson_sampled")],
    ("truncated_poisson_gaussian", ZERO_OUT, Accountant.PLD),
    ("mixed_gaussian", ZERO_OUT, Accountant.RDP),
    ("sampled_without_replacement", NeighboringRelation.REPLACE_ONE, Accountant.RDP),
]


@pytest.mark.parametrize(("kind", "rules", "accountant"), COMPOSED)
def test_composing_an_event_n_times_equals_composing_it_once_with_count_n(kind, rules, accountant):
    """dp-accounting's PLDAccountant is known to ignore the count of RandomizedResponseDpEvent; ours must not be like it."""
    event = ONE_OF_EACH_KIND[kind]
    one_by_one = epsilon(ComposedDpEvent((event,) * 3), 1e-5, rules, accountant, Precision.COARSE)
    at_once = epsilon(compose({event: 3}), 1e-5, rules, accountant, Precision.COARSE)
    once = epsilon(compose({event: 1}), 1e-5, rules, accountant, Precision.COARSE)
    assert at_once == pytest.approx(one_by_one, rel=2e-3)
    assert at_once > 1.3 * once


def test_the_event_whose_count_dp_accounting_ignores_has_no_place_in_a_ledger():
    with pytest.raises(PrivgradError, match="no ledger form"):
        event_to_json(dp_accounting.RandomizedResponseDpEvent(0.5, 2))


@pytest.mark.parametrize("measure", [epsilon, attack_success])
def test_two_kinds_of_steps_in_one_run_are_composed(measure):
    """1/z^2 of unsampled Gaussians adds up: 3 steps at z = 3 and 2 at z = 2 are one at z = (3/9 + 2/4)^-1/2."""
    both = compose({dp_accounting.GaussianDpEvent(3.0): 3, dp_accounting.GaussianDpEvent(2.0): 2})
    alone = dp_accounting.GaussianDpEvent((3 / 9 + 2 / 4) ** -0.5)
    got = measure(both, 1e-5, ZERO_OUT, Accountant.PLD, Precision.COARSE)
    assert got == pytest.approx(measure(alone, 1e-5, ZERO_OUT, Accountant.PLD, Precision.COARSE), rel=2e-3)


@pytest.mark.parametrize("accountant", list(Accountant))
def test_one_step_without_noise_among_many_makes_epsilon_infinite(accountant):
    """Spelt as a tuple, which can be hashed, so that this row does not hang on how `compose` spells it."""
    mixed = ComposedDpEvent((dp_accounting.GaussianDpEvent(1.0), dp_accounting.NonPrivateDpEvent()))
    assert epsilon(mixed, 1e-5, ZERO_OUT, accountant) == math.inf
    assert attack_success(mixed, 1e-5, ZERO_OUT, accountant) == 1.0


# Edges


@pytest.mark.parametrize("accountant", list(Accountant))
@pytest.mark.parametrize("rate", [0.1, 1])
def test_noise_zero_is_infinite_epsilon_and_certain_attack(rate, accountant):
    assert spent(rate, 0.0, 1, accountant=accountant) == math.inf
    assert spent(rate, 0.0, 1_000, accountant=accountant) == math.inf
    assert attack_success(compose({dp_accounting.NonPrivateDpEvent(): 3}), 1e-5, ZERO_OUT, accountant) == 1.0


@pytest.mark.parametrize("accountant", list(Accountant))
@pytest.mark.parametrize("multiplier", [0.0, 1.0])
def test_no_steps_cost_nothing(multiplier, accountant):
    assert spent(0.1, multiplier, 0, accountant=accountant) == 0.0
    assert epsilon(compose({}), 1e-5, ZERO_OUT, accountant) == 0.0
    assert attack_success(compose({}), 1e-5, ZERO_OUT, accountant) == pytest.approx(0.5, abs=1e-4)


def test_nothing_composed_with_nothing_costs_nothing():
    nothing = ComposedDpEvent((dp_accounting.NoOpDpEvent(), dp_accounting.NoOpDpEvent()))
    assert epsilon(nothing, 1e-5, ZERO_OUT, Accountant.RDP) == 0.0
    assert epsilon(nothing, 1e-5, ZERO_OUT, Accountant.PLD) == 0.0


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, math.nan, math.inf, -math.inf, True, "1e-5", None])
@pytest.mark.parametrize("accountant", list(Accountant))
@pytest.mark.parametrize("measure", [epsilon, attack_success])
def test_a_delta_outside_the_open_unit_interval_is_refused(measure, accountant, delta):
    for event in (dp_accounting.GaussianDpEvent(1.0), compose({}), dp_accounting.NonPrivateDpEvent()):
        with pytest.raises(PrivgradError, match="delta"):
            measure(event, delta, ZERO_OUT, accountant)


EXTREMES = [
    # multiplier, rate, steps, delta
    (1e-3, 1e-6, 10**6, 1e-5),
    (1e-3, 1, 10**6, 1e-5),
    (1e-10, 1e-6, 1, 1e-5),
    (1e-10, 1, 10**6, 1e-5),
    (1e3, 0.01, 1, 1e-5),
    (1e3, 1, 1, 1e-5),
    (1e6, 0.01, 10**6, 1e-5),
    (1e7, 1, 10**6, 1e-5),
    (0.5, 1e-6, 10**6, 1e-5),
    (1.0, 0.999999, 100, 1e-5),
    (1.0, 0.01, 1_000, 1e-11),
]


@pytest.mark.parametrize(("multiplier", "rate", "steps", "delta"), EXTREMES)
@pytest.mark.parametrize("accountant", list(Accountant))
def test_extreme_inputs_have_an_answer(accountant, multiplier, rate, steps, delta):
    """Finite or infinite, no exception, and not below the exact answer where there is a closed form that floats can hold."""
    got = spent(rate, multiplier, steps, delta=delta, accountant=accountant)
    assert got >= 0
    mu = math.sqrt(steps) / multiplier
    if rate == 1 and mu < 100:
        assert got >= gaussian_epsilon(mu, delta) * (1 - 1e-6)


@pytest.mark.parametrize("delta", [1e-12, 1e-20, 1e-300])
def test_a_delta_that_rounding_could_exceed_is_refused_by_pld_and_has_an_answer_by_rdp(delta):
    with pytest.raises(PrivgradError, match=r"too small for privacy loss.* accountant = 'rdp'"):
        spent(0.01, 1.0, 1_000, delta=delta)
    assert 0 < spent(0.01, 1.0, 1_000, delta=delta, accountant=Accountant.RDP) < math.inf
    with pytest.raises(PrivgradError, match="too small"):
        spent(1.0, 1.0, 1, delta=3e-13)


@pytest.mark.parametrize("mean", [0.3, 1.0, 20.0])
@pytest.mark.parametrize("steps", [10**4, 10**6])
@pytest.mark.parametrize("precision", list(Precision))
def test_rounding_takes_less_of_delta_than_is_allowed_for_it(precision, steps, mean):
    """Against the closed form, far out; a rate next to 1, since dp-accounting transforms nothing for Gaussians alone."""
    step = dp_accounting.PoissonSampledDpEvent(1 - 1e-12, dp_accounting.GaussianDpEvent(math.sqrt(steps) / mean))
    event = compose({step: steps})
    composed = accounting._pld(event, 1e-8, ZERO_OUT, precision)
    assert composed is not None
    losses = [mean**2 / 2 + deviations * mean for deviations in (6, 6.5, 7, 7.5, 8)]
    short = max(gaussian_delta(mean, loss) - composed.get_delta(loss) for loss in losses)
    assert short < accounting._rounding(event) / 10
    delta = 2.1 * accounting._rounding(event)
    assert epsilon(event, delta, ZERO_OUT, precision=precision) >= gaussian_epsilon(mean, delta) * (1 - 1e-9)


def test_the_allowance_for_rounding_is_taken_off_delta():
    event = compose(
        {step_event(Sampled(Sampler.POISSON, 0.5), Adjacency.ZERO_OUT, Accountant.PLD, multiplier=1e3): 10**5}
    )
    delta = 3 * accounting._rounding(event)
    composed = accounting._pld(event, delta, ZERO_OUT, Precision.COARSE)
    assert composed is not None
    assert epsilon(event, delta, ZERO_OUT, precision=Precision.COARSE) == composed.get_epsilon(delta * 2 / 3)
    assert composed.get_epsilon(delta) < composed.get_epsilon(delta * 2 / 3)


@pytest.mark.parametrize("accountant", list(Accountant))
@pytest.mark.parametrize("multiplier", [1e-200, 1e200])
def test_a_multiplier_whose_square_is_no_float_has_an_answer(multiplier, accountant):
    """Plan and ledger accept every positive finite multiplier."""
    assert spent(0.1, multiplier, 1, accountant=accountant) >= 0


def test_a_gaussian_without_noise_is_infinite_also_when_it_is_named_directly():
    assert epsilon(dp_accounting.GaussianDpEvent(0.0), 1e-5, ZERO_OUT) == math.inf


def test_many_steps_that_cost_next_to_nothing_need_no_memory(monkeypatch):
    """z = 1000, q = 1e-6, 1e6 steps: one array of 14 TB (after 11 s; the coarser grid here only makes it fail at once)."""
    monkeypatch.setitem(accounting._POINTS, Precision.FINE, 1e4)
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as stream:
        now = int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2 * 2**30, before[1]))
    try:
        assert 0 <= spent(1e-6, 1e3, 10**6) < 1e-3
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# What an attacker can do


def gaussian_delta(mu: float, at: float) -> float:
    """delta(epsilon) of N(0, 1) against N(mu, 1) (Balle and Wang 2018, theorem 8)."""
    return float(norm.cdf(mu / 2 - at / mu) - math.exp(at + norm.logcdf(-mu / 2 - at / mu)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The smallest epsilon with gaussian_delta(mu, epsilon) <= delta, by bisection."""
    low, high = 0.0, mu * mu / 2 + 40 * mu
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(mu, middle) > delta else (low, middle)
    return low


@FEW
@given(multiplier=st.floats(0.2, 50.0), log_delta=st.floats(-8, -3))
def test_attack_success_of_one_gaussian_is_its_closed_form(multiplier, log_delta):
    """(1 + TV) / 2 with TV = 2 Phi(mu / 2) - 1, mu = 1 / z: Phi(1 / (2 z))."""
    exact = float(norm.cdf(0.5 / multiplier))
    event = dp_accounting.GaussianDpEvent(multiplier)
    pld = attack_success(event, 10**log_delta, ZERO_OUT, Accountant.PLD, Precision.COARSE)
    rdp = attack_success(event, 10**log_delta, ZERO_OUT, Accountant.RDP)
    assert exact - 1e-12 <= pld <= exact + 1e-3
    assert exact - 1e-12 <= rdp <= 1
    assert pld <= rdp + 1e-3


@pytest.mark.parametrize("accountant", list(Accountant))
@FEW
@given(rate=st.floats(0.005, 0.5), multiplier=st.floats(0.5, 20.0), steps=st.integers(1, 1_000))
def test_attack_success_lies_between_a_coin_and_certainty_and_follows_epsilon(accountant, rate, multiplier, steps):
    event = compose(
        {step_event(Sampled(Sampler.POISSON, rate), Adjacency.ZERO_OUT, accountant, multiplier=multiplier): steps}
    )
    got = attack_success(event, 1e-5, ZERO_OUT, accountant, Precision.COARSE)
    proven = epsilon(event, 1e-5, ZERO_OUT, accountant, Precision.COARSE)
    assert 0.5 <= got <= 1
    assert got <= (math.tanh(proven / 2) + 1e-5 + 1) / 2 + 1e-9


@PURE
@given(multiplier=st.floats(0.5, 200.0), log_delta=st.floats(-8, -2))
def test_attack_success_by_rdp_is_the_best_test_that_epsilon_and_delta_allow(multiplier, log_delta):
    """False alarms a and misses b keep a + e^eps b >= 1 - delta, both ways round: (e^eps + delta) / (e^eps + 1) are right."""
    event, delta = dp_accounting.GaussianDpEvent(multiplier), 10**log_delta
    e = math.exp(min(epsilon(event, delta, ZERO_OUT, Accountant.RDP), 700))
    got = attack_success(event, delta, ZERO_OUT, Accountant.RDP)
    assert got == pytest.approx((e + delta) / (e + 1), rel=1e-9)


def test_attack_success_grows_with_the_steps():
    one = dp_accounting.GaussianDpEvent(5.0)
    chances = [
        attack_success(compose({one: steps}), 1e-5, ZERO_OUT, precision=Precision.COARSE) for steps in (1, 4, 64)
    ]
    exact = [float(norm.cdf(0.5 * math.sqrt(steps) / 5.0)) for steps in (1, 4, 64)]
    assert chances == pytest.approx(exact, abs=1e-3)
    assert chances == sorted(chances)
