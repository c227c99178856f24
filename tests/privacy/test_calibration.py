"""Calibration: never above the budget, and no more noise than the budget asks for."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privgrad.errors import PrivgradError
from privgrad.mechanism.plan import Plan
from privgrad.mechanism.sampling import PoissonSampling
from privgrad.privacy.accounting import Precision
from privgrad.privacy.calibration import TOLERANCE, calibrate

SLACK = 1 + 2e-3
"""What is calibrated may be this much above the smallest multiplier: the tolerance, and as much again for the grid."""


def plan_of(rate: float, steps: int, delta: float = 1e-5, **choices) -> Plan:
    return Plan(sampling=PoissonSampling(rate=rate, divisor=10.0), steps=steps, delta=delta, **choices)


def check(plan: Plan, target: float) -> float:
    """Calibrate, see that the budget is kept and that it is used; the multiplier."""
    calibrated = plan.calibrate(target)
    multiplier = calibrated.noise.multiplier
    assert multiplier is not None
    assert calibrated == plan.with_multiplier(multiplier)
    assert calibrated.epsilon(precision=Precision.FINE) <= target
    assert plan.with_multiplier(multiplier / SLACK).epsilon(precision=Precision.FINE) > target
    return multiplier


def test_the_multiplier_of_the_specification():
    """z = 0.8825 at epsilon 8 for q = 0.01 and 10,000 steps (PLD, delta = 1e-5)."""
    assert check(plan_of(0.01, 10_000), 8.0) == pytest.approx(0.8825, rel=1e-3)


# Ranges in which one accounting takes a tenth of a second: each example is 20 to 40 of them.
RATES, STEPS, TARGETS, LOG_DELTAS = st.floats(0.1, 0.3), st.integers(500, 3_000), st.floats(1, 5), st.floats(-7, -4)


@settings(max_examples=2, deadline=None, derandomize=True, database=None)
@given(rate=RATES, steps=STEPS, target=TARGETS, log_delta=LOG_DELTAS)
def test_pld_plans_keep_their_budget_and_use_it(rate, steps, target, log_delta):
    check(plan_of(rate, steps, 10**log_delta), target)


@settings(max_examples=3, deadline=None, derandomize=True, database=None)
@given(rate=RATES, steps=STEPS, target=TARGETS, log_delta=LOG_DELTAS)
def test_rdp_plans_keep_their_budget_and_use_it(rate, steps, target, log_delta):
    check(plan_of(rate, steps, 10**log_delta, accountant="rdp"), target)


@pytest.mark.parametrize(("adjacency", "accountant"), [("replace_one", "pld"), ("zero_out", "rdp")])
def test_full_batch_plans_keep_their_budget_and_use_it(adjacency, accountant):
    check(plan_of(1, 100, adjacency=adjacency, accountant=accountant), 2.0)


def test_a_delta_given_to_calibrate_is_the_plans_delta_from_then_on():
    plan = plan_of(0.1, 100, 1e-5, accountant="rdp")
    calibrated = plan.calibrate(2.0, 1e-7)
    assert calibrated.delta == 1e-7
    assert calibrated.epsilon() <= 2.0
    assert calibrated == plan_of(0.1, 100, 1e-7, accountant="rdp").calibrate(2.0)


@pytest.mark.parametrize("target", [0, 0.0, -1, -1e-9, math.nan, math.inf, -math.inf, True, "3", None])
def test_a_target_that_is_no_positive_finite_number_is_refused(target):
    with pytest.raises(PrivgradError, match="epsilon"):
        plan_of(0.01, 100).calibrate(target)


@pytest.mark.parametrize("delta", [0, 1, -1e-5, math.nan])
def test_a_delta_outside_the_open_unit_interval_is_refused(delta):
    with pytest.raises(PrivgradError, match="delta"):
        plan_of(0.01, 100).calibrate(3.0, delta)


def test_a_target_that_no_noise_reaches_is_refused_in_words():
    """At delta = 1e-20 PLD has no answer at all: rounding is more than that."""
    with pytest.raises(PrivgradError, match="delta = 1e-20 is too small"):
        plan_of(1, 1, 1e-20).calibrate(0.1)


# The search itself, on curves whose answer is known


def curve(exponent: float, steepness: float, overstatement: float):
    """spent(z) = (steepness / z)^exponent; the coarse grid says a little more."""

    def spent(z: float, precision: Precision) -> float:
        exact = (steepness / z) ** exponent
        return exact * overstatement if precision is not Precision.FINE else exact

    return spent


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    exponent=st.floats(0.3, 3.0),
    steepness=st.floats(1e-2, 1e2),
    overstatement=st.floats(1.0, 1.1),
    target=st.floats(1e-1, 1e1),
)
def test_search_finds_the_smallest_multiplier_within_the_tolerance(exponent, steepness, overstatement, target):
    found = calibrate(curve(exponent, steepness, overstatement), target)
    smallest = steepness / target ** (1 / exponent)
    assert (steepness / found) ** exponent <= target
    assert found <= smallest * (1 + 1.1 * TOLERANCE)


def test_the_fine_grid_has_the_last_word_also_where_the_coarse_one_understates():
    """It never should; were it to, the budget would be kept all the same."""
    found = calibrate(curve(1.0, 1.0, 0.8), 2.0)
    assert 0.5 <= found <= 0.5 * (1 + 1.1 * TOLERANCE)


def test_the_fine_grid_has_the_last_word_also_where_the_overstatement_is_not_constant():
    """The coarse search then ends at 0.4945, with 2.022 spent; the budget of 2 asks for 0.5."""
    found = calibrate(lambda z, precision: 1 / z + (0.2 if precision is not Precision.FINE else 0.0), 2.0)
    assert 0.5 <= found <= 0.5 * (1 + 1.1 * TOLERANCE)


def test_a_curve_that_never_comes_down_is_refused():
    with pytest.raises(PrivgradError, match="no noise multiplier"):
        calibrate(lambda z, precision: math.inf, 1.0)


def test_a_curve_that_needs_no_noise_is_refused():
    with pytest.raises(PrivgradError, match="no noise is needed"):
        calibrate(lambda z, precision: 1e-3, 1.0)


def test_a_curve_that_jumps_to_zero_is_calibrated_to_its_jump():
    """epsilon is exactly 0 from the z on at which TV <= delta: plan_of(0.01, 10, delta=0.5).calibrate(0.01), after 30 s."""
    found = calibrate(lambda z, precision: 0.0 if z >= 3.0 else 5.0, 1.0)
    assert 3.0 <= found <= 3.0 * (1 + 1.1 * TOLERANCE)
