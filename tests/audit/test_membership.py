"""Membership inference: figures that are right where they are known, and attacks that find what they should."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import norm
from torch import Tensor

import privgrad as pg
from privgrad.audit.gaussian import gdp_epsilon
from privgrad.audit.membership import confidence_scores, likelihood_ratio_scores, loss_scores, membership


def normal_scores(mu: float, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(2, count, generator=generator, dtype=torch.float64)
    return draws[0] + mu, draws[1]


def test_figures_of_two_normal_distributions() -> None:
    found = membership(*normal_scores(1.0, 50_000))
    assert found.auc == pytest.approx(norm.cdf(1 / math.sqrt(2)), abs=0.01)
    for rate, tpr in found.tpr.items():
        assert tpr == pytest.approx(norm.cdf(norm.ppf(rate) + 1), rel=0.1)
    assert 1.5 < found.epsilon_lower < gdp_epsilon(1.0, 1e-5)
    assert found.trials == 100_000


def test_the_bound_is_below_the_truth_and_nothing_is_found_in_nothing() -> None:
    truth = gdp_epsilon(0.5, 1e-5)
    found = [membership(*normal_scores(0.5, 500, seed)) for seed in range(40)]
    assert max(audit.epsilon_lower for audit in found) <= truth
    none = [membership(*normal_scores(0.0, 500, seed)).epsilon_lower > 0 for seed in range(100)]
    assert sum(none) <= 5 + 3 * math.sqrt(5)


def test_ties_and_perfect_scores() -> None:
    equal = membership([1.0] * 50, [1.0] * 60)
    assert (equal.auc, equal.epsilon_lower) == (0.5, 0.0)
    assert set(equal.tpr.values()) == {0.0}
    perfect = membership(torch.ones(500), torch.zeros(500))
    assert (perfect.auc, set(perfect.tpr.values())) == (1.0, {1.0})
    assert perfect.epsilon_lower > 3


def test_confidence_scores_are_log_odds_and_do_not_overflow() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [1e4, 0.0, 0.0], [-1e4, 0.0, 0.0]])
    found = confidence_scores(logits, torch.zeros(3, dtype=torch.int64))
    p = torch.softmax(logits[0], 0)[0]
    assert float(found[0]) == pytest.approx(float((p / (1 - p)).log()), rel=1e-5)
    assert found.tolist()[1:] == pytest.approx([1e4, -1e4], rel=1e-3)


def references(models: int, records: int, shift: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Records of very different difficulty; a member scores a little higher than it would otherwise."""
    generator = torch.Generator().manual_seed(seed)
    difficulty = 10 * torch.randn(records, generator=generator, dtype=torch.float64)
    included = torch.rand(models + 1, records, generator=generator) < 0.5
    noise = torch.randn(models + 1, records, generator=generator, dtype=torch.float64)
    scores = difficulty + shift * included + noise
    return scores[0], included[0], scores[1:], included[1:]


@pytest.mark.parametrize("models", [8, 80])
def test_reference_models_find_what_losses_alone_do_not(models: int) -> None:
    observed, member, others, included = references(models, 3000, 2.0)
    alone = membership(observed[member], observed[~member])
    ratio = likelihood_ratio_scores(observed, others, included)
    found = membership(ratio[member], ratio[~member])
    assert alone.auc < 0.6
    assert found.auc > 0.85
    assert found.epsilon_lower > alone.epsilon_lower + 0.5


def test_records_that_were_in_no_reference_model_are_judged_without() -> None:
    observed, member, others, included = references(16, 2000, 2.0)
    without = torch.where(included, others - 2.0, others)
    scores = likelihood_ratio_scores(observed, without, torch.zeros_like(included))
    assert membership(scores[member], scores[~member]).auc > 0.85
    mixed = included.clone()
    mixed[:, :1000] = False
    scores = likelihood_ratio_scores(observed, torch.where(mixed, others, without), mixed)
    assert bool(scores.isfinite().all())
    # A record that is in all of them: below what it then scores is a sign that it was out.
    low, high = likelihood_ratio_scores(torch.tensor([-3.0, 3.0]), torch.tensor([[-1.0, 1.0]] * 2).T, torch.ones(2, 2))
    assert low < high <= 0


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(pg.PrivgradError, match="at least two scores"):
        membership([1.0], [1.0, 2.0])
    with pytest.raises(pg.PrivgradError, match="NaN"):
        membership([1.0, math.nan], [1.0, 2.0])
    with pytest.raises(pg.PrivgradError, match="at least two models"):
        likelihood_ratio_scores(torch.zeros(3), torch.zeros(1, 3), torch.zeros(1, 3))


def test_losses_of_members_are_smaller() -> None:
    assert int(loss_scores(torch.tensor([3.0, 0.1, 2.0])).argmax()) == 1
