"""Lower bounds on epsilon from guesses about who was in: many trials, or many canaries in one training.

All are confidence bounds: with a chance of at most 1 - confidence (over coins and noise) they lie above the truth. Every search
returns the end at which the claim is still refuted, so that what is returned is rounded downwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from privgrad.audit.gaussian import clopper_pearson_lower, gdp_epsilon
from privgrad.errors import check_count, check_number

_LARGEST = 100.0
"""Of an epsilon or mu that is looked for: nobody claims more."""
_HALVINGS = 40


def epsilon_from_rates(hits: int, members: int, alarms: int, others: int, delta: float, confidence: float) -> float:
    """The epsilon that a test of membership shows: (epsilon, delta)-DP bounds TPR <= e^epsilon FPR + delta (arXiv:1311.0776).

    hits of `members` and alarms of `others` were called members, by a rule fixed before these were seen. Each of the four rates
    (the test may also be read the other way round: TNR <= e^epsilon FNR + delta) gets a quarter of 1 - confidence.

    Guarantee (of the audit): a lower bound at `confidence` where trials are independent of one another.
    """
    _check_guesses(hits, members, confidence)
    _check_guesses(alarms, others, confidence)
    error = (1 - confidence) / 4

    def shown(right: int, of: int, wrong: int, instead: int) -> float:
        at_least = clopper_pearson_lower(right, of, error) - delta
        at_most = 1 - clopper_pearson_lower(instead - wrong, instead, error)
        return math.log(at_least / at_most) if at_least > 0 and at_most > 0 else 0.0

    return max(0.0, shown(hits, members, alarms, others), shown(others - alarms, others, members - hits, members))


def epsilon_from_one_run(correct: int, guesses: int, canaries: int, delta: float, confidence: float) -> float:
    """The epsilon that right guesses about the canaries of ONE training show (arXiv:2305.08846, theorem 5.2).

    canaries: m, each in or out by a fair coin. guesses: r, fixed before the training; about the other m - r nothing is said.

    Theorem: if the training is (epsilon, delta)-DP for each canary, then P[correct >= v] <= f(v) + 2 m delta max_{1 <= i <= v}
    (f(v - i) - f(v)) / i, with f(v) = P[Binomial(r, 1 / (1 + e^-epsilon)) >= v].

    Guarantee (of the audit): a lower bound at `confidence` for every mechanism, however canaries influence one another.
    """
    _check_one_run(correct, guesses, canaries, confidence)

    def refuted(epsilon: float) -> bool:
        chance = 1 / (1 + math.exp(-epsilon))
        exactly = binom.pmf(np.arange(correct - 1, -1, -1), guesses, chance)
        steepest = float((np.cumsum(exactly) / np.arange(1, correct + 1)).max(initial=0.0))
        tail = float(binom.sf(correct - 1, guesses, chance))
        return tail + 2 * canaries * delta * steepest < 1 - confidence

    return _largest(refuted)


def mu_from_one_run(correct: int, guesses: int, canaries: int, confidence: float) -> float:
    """The mu that right guesses about the canaries of ONE training show, if it is Gaussian (arXiv:2410.22235, section 3).

    Theorem: let p_l = P[l guesses are right] of a training that is f-DP for each canary. For every set T of numbers
    sum_{l in T} (l / m) p_l <= F(sum_{l in T} ((r - l + 1) / m) p_{l-1}), with F = 1 - f: whoever guesses a canary rightly
    guesses, with that canary's coin turned, one less. F(x) = Phi(Phi^-1(x) + mu) for a mu-GDP mechanism.

    For T = {v, v + 1, ...} the two sums are what is right and what is wrong above a level. Whoever reaches `correct` with a
    chance of 1 - confidence needs, level by level downwards, at least so much mass below; mu is refuted where that is more
    mass than there is (r / m). Mass at the level itself, and no more than is needed below, is the cheapest.

    Guarantee (of the audit): a lower bound on mu at `confidence` for trainings whose trade-off curve is that of a Gaussian
    (full batches; Poisson sampling is not, and gets `epsilon_from_one_run`).
    """
    _check_one_run(correct, guesses, canaries, confidence)
    chance = 1 - confidence

    def refuted(mu: float) -> bool:
        right, wrong = chance * correct / canaries, chance * (guesses - correct) / canaries
        there_is = guesses / canaries * (1 + 1e-9)
        for level in range(correct - 1, -1, -1):
            needed = max(wrong, float(ndtr(ndtri(right) - mu)))
            right += level / (guesses - level) * (needed - wrong)
            wrong = needed
            if right + wrong > there_is:
                return True
        return False

    return _largest(refuted)


def gaussian_epsilon_from_one_run(correct: int, guesses: int, canaries: int, delta: float, confidence: float) -> float:
    """As `mu_from_one_run`, as epsilon at delta on the Gaussian's curve."""
    return gdp_epsilon(mu_from_one_run(correct, guesses, canaries, confidence), delta)


def _largest(refuted: Callable[[float], bool]) -> float:
    """The largest number that is still refuted, from below; 0 where none is."""
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while high < _LARGEST and refuted(high):
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def _check_guesses(hits: int, trials: int, confidence: float) -> None:
    check_number("confidence", confidence, above=0, below=1)
    check_count("the number of trials", trials)
    check_count("the number of right guesses", hits, at_least=0, at_most=trials)


def _check_one_run(correct: int, guesses: int, canaries: int, confidence: float) -> None:
    _check_guesses(correct, guesses, confidence)
    check_count("the number of guesses", guesses, at_most=canaries)
