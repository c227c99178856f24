"""Lower bounds from guesses: below the truth as often as they say, near it where guesses are good, rounded downwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import beta

import privgrad as pg
from privgrad.audit.bounds import (
    epsilon_from_one_run,
    epsilon_from_rates,
    gaussian_epsilon_from_one_run,
    mu_from_one_run,
)
from privgrad.audit.gaussian import gdp_epsilon

DELTA = 1e-5
MU = brentq(lambda mu: gdp_epsilon(mu, DELTA) - 4, 0.1, 3)
"""Of a Gaussian mechanism with epsilon 4 at DELTA."""


def right_guesses(canaries: int, guesses: int, mu: float, chance: np.random.Generator) -> int:
    """Of ideal canaries: each has a score of its own, N(mu, 1) in and N(0, 1) out."""
    inside = chance.random(canaries) < 0.5
    order = np.argsort(chance.normal(size=canaries) + mu * inside)
    return int(inside[order[-(guesses // 2) :]].sum() + (~inside[order[: guesses // 2]]).sum())


def one_number(canaries: int, guesses: int, mu: float, chance: np.random.Generator) -> int:
    """Of canaries that all move the same number: the attacker guesses the same of all, and is right or wrong of most together."""
    inside = chance.random(canaries) < 0.5
    shown = mu * (inside.sum() - canaries / 2) + chance.normal()
    return int((inside if shown > 0 else ~inside)[:guesses].sum())


@pytest.mark.parametrize(
    ("canaries", "general", "gaussian"), [(1_000, 1.5, 2.35), (5_000, 2.0, 2.6), (10_000, 2.05, 2.8)]
)
def test_ideal_canaries_show_what_the_literature_says(canaries: int, general: float, gaussian: float) -> None:
    chance, guesses = np.random.default_rng(0), canaries // 20
    found = [right_guesses(canaries, guesses, MU, chance) for _ in range(100)]
    assert median(epsilon_from_one_run(c, guesses, canaries, DELTA, 0.95) for c in found) == pytest.approx(
        general, abs=0.2
    )
    shown = [gaussian_epsilon_from_one_run(c, guesses, canaries, DELTA, 0.95) for c in found]
    assert median(shown) == pytest.approx(gaussian, abs=0.25)
    assert sum(epsilon > 4 for epsilon in shown) <= 5


@pytest.mark.parametrize("guess", [right_guesses, one_number])
def test_one_run_bounds_are_above_the_truth_in_at_most_one_run_of_twenty(guess: Callable[..., int]) -> None:
    """Also where the guesses of one training depend on one another; 2,000 runs."""
    chance, mu = np.random.default_rng(1), 0.5
    counts = [guess(24, 6, mu, chance) for _ in range(2000)]
    often = 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)
    above = {c: mu_from_one_run(c, 6, 24, 0.95) > mu for c in set(counts)}
    assert sum(above[c] for c in counts) / 2000 <= often
    epsilon = gdp_epsilon(mu, DELTA)
    above = {c: epsilon_from_one_run(c, 6, 24, DELTA, 0.95) > epsilon for c in set(counts)}
    assert sum(above[c] for c in counts) / 2000 <= often


def test_without_delta_one_run_is_a_coin_of_known_bias() -> None:
    """P[Binomial(r, e^eps / (1 + e^eps)) >= v] = error: the Clopper-Pearson bound on the share of right guesses."""
    share = beta.ppf(0.05, 80, 100 - 80 + 1)
    exact = math.log(share / (1 - share))
    assert epsilon_from_one_run(80, 100, 1000, 0.0, 0.95) == pytest.approx(exact, rel=1e-9)
    assert epsilon_from_one_run(80, 100, 1000, 0.0, 0.95) <= exact
    assert epsilon_from_one_run(80, 100, 1000, 1e-3, 0.95) < exact - 0.1
    assert epsilon_from_one_run(50, 100, 1000, 0.0, 0.95) == 0.0 == mu_from_one_run(50, 100, 1000, 0.95)


def test_more_right_guesses_show_more() -> None:
    general = [epsilon_from_one_run(c, 40, 800, DELTA, 0.95) for c in range(20, 41)]
    gaussian = [mu_from_one_run(c, 40, 800, 0.95) for c in range(20, 41)]
    assert general == sorted(general)
    assert gaussian == sorted(gaussian)
    assert 0 < general[-1] < math.inf
    assert 0 < gaussian[-1] < math.inf


def test_one_canary_that_is_always_guessed_shows_little() -> None:
    """r = m = 1: without any leak a guess is right every other time."""
    assert epsilon_from_one_run(1, 1, 1, 0.0, 0.95) == 0.0
    assert mu_from_one_run(1, 1, 1, 0.95) == 0.0


def test_rates() -> None:
    """log(TPR / FPR) as far as four Clopper-Pearson bounds allow; a rule may also be good at naming those who are out."""
    shown = epsilon_from_rates(500, 1000, 10, 1000, DELTA, 0.95)
    assert math.log(500 / 10) - 0.9 < shown < math.log(500 / 10)
    assert epsilon_from_rates(990, 1000, 500, 1000, DELTA, 0.95) == pytest.approx(shown)
    assert epsilon_from_rates(100, 1000, 100, 1000, DELTA, 0.95) == 0.0
    assert epsilon_from_rates(100, 1000, 0, 1000, 0.5, 0.95) == 0.0  # delta alone explains it


@pytest.mark.parametrize("wrong", [(11, 10, 100), (-1, 10, 100), (5, 101, 100), (5, 0, 100), (True, 10, 100)])
def test_impossible_counts_are_refused(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(pg.PrivgradError, match="expected a whole number"):
        mu_from_one_run(*wrong, 0.95)
