"""Lower bounds on the mu of a Gaussian mechanism from guesses, and epsilon along the GDP curve (arXiv:1905.02383).

A mechanism is mu-GDP if telling two neighbours apart is as hard as telling N(0, 1) from N(mu, 1). Whoever tells them apart with
true positive rate TPR at false positive rate FPR shows mu >= Phi^-1(TPR) - Phi^-1(FPR).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.stats import beta, norm

from privgrad.errors import check_number


def clopper_pearson_lower(hits: int, trials: int, error: float) -> float:
    """The exact one-sided lower confidence bound on a probability: it is wrong with a chance of at most `error`."""
    return 0.0 if hits == 0 else float(beta.ppf(error, hits, trials - hits + 1))


def mu_lower_bound(inside: Sequence[float], outside: Sequence[float], threshold: float, confidence: float) -> float:
    """A lower bound on mu from scores with the canary inside and outside; a score above `threshold` is a guess of "inside".

    The threshold must be fixed before the scores are seen. Both rates may err, so each gets half of 1 - confidence.
    """
    check_number("confidence", confidence, above=0, below=1)
    error = (1 - confidence) / 2
    true_positives = int((np.asarray(inside) > threshold).sum())
    true_negatives = int((np.asarray(outside) <= threshold).sum())
    tpr = clopper_pearson_lower(true_positives, len(inside), error)
    tnr = clopper_pearson_lower(true_negatives, len(outside), error)
    if tpr == 0.0 or tnr == 0.0:
        return 0.0
    return max(0.0, float(norm.ppf(tpr) + norm.ppf(tnr)))


def gdp_delta(mu: float, epsilon: float) -> float:
    """The delta of a mu-GDP mechanism at epsilon (arXiv:1905.02383, corollary 2.13)."""
    return float(norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon) * norm.cdf(-epsilon / mu - mu / 2))


def gdp_epsilon(mu: float, delta: float) -> float:
    """The epsilon of a mu-GDP mechanism at delta: exact, for a single Gaussian."""
    if mu <= 0 or gdp_delta(mu, 0.0) <= delta:
        return 0.0
    high = 1.0
    while gdp_delta(mu, high) > delta:
        high *= 2
    return float(brentq(lambda epsilon: gdp_delta(mu, epsilon) - delta, 0.0, high))
