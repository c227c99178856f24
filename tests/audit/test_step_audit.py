"""The single-step audit on the object that really runs."""

from __future__ import annotations

import dataclasses
import math
from unittest import mock

import pytest
import torch
from scipy.stats import norm
from torch import Tensor

import privgrad as pg
from privgrad.audit.gaussian import clopper_pearson_lower, gdp_delta, gdp_epsilon, mu_lower_bound
from privgrad.audit.step import audit_step, claimed_mu
from privgrad.mechanism.clipping import ClippingRule
from privgrad.mechanism.noise import GaussianNoise
from privgrad.mechanism.plan import Plan
from privgrad.mechanism.sampling import PoissonSampling

C = 0.7
Z, TRIALS = 0.4, 1000
"""Noise multiplier, and trials in each world: so many show mu = 2.5 as nearly as four times as many show mu = 1."""


def plan(multiplier: float, **changes: object) -> Plan:
    return Plan(
        sampling=PoissonSampling(rate=0.1, divisor=4.0),
        steps=1,
        clipping=pg.FlatClipping(max_norm=C),
        noise=GaussianNoise(multiplier=multiplier),
        **changes,  # type: ignore[arg-type]
    )


def worst_pair(adjacency: pg.Adjacency) -> tuple[Tensor, Tensor, Tensor, float]:
    """The canary's gradient is huge and along one axis; the other records point elsewhere. What it can move: C, or 2C."""
    axis = torch.tensor([1.0, 0.0, 0.0])
    others = torch.tensor([[0.0, 9.0, 0.0], [0.0, -0.1, 0.2], [0.0, 0.0, -50.0]])
    canary = 1e3 * axis[None]
    inside = torch.cat([canary, others])
    if adjacency is pg.Adjacency.REPLACE_ONE:
        return inside, torch.cat([-canary, others]), axis, 0.0
    return inside, others, axis, C / 2


@pytest.mark.parametrize("adjacency", list(pg.Adjacency))
def test_audit_is_below_the_claim_and_tight(adjacency: pg.Adjacency) -> None:
    torch.set_num_threads(1)
    audited = plan(Z, adjacency=adjacency)
    found = audit_step(audited, *worst_pair(adjacency), trials=TRIALS, confidence=1 - 1e-6)
    assert found.mu_claimed == (2 / Z if adjacency is pg.Adjacency.REPLACE_ONE else 1 / Z)
    assert found.holds, f"an attack shows mu {found.mu_lower:.3f}; the plan claims {found.mu_claimed:.3f}"
    assert found.mu_lower_95 >= 0.8 * found.mu_claimed
    assert 0 < found.epsilon_lower <= found.epsilon_claimed


def test_audit_finds_half_the_noise() -> None:
    class Half(GaussianNoise):
        def scales(self, sums: object) -> dict[str, float]:
            return {name: scale / 2 for name, scale in super().scales(sums).items()}  # type: ignore[arg-type]

    # The step refuses weak noise by itself; to see the audit's own power, the claim is raised instead.
    honest = plan(Z / 2)
    found = audit_step(honest, *worst_pair(pg.Adjacency.ZERO_OUT), trials=TRIALS)
    assert found.mu_lower > claimed_mu(plan(Z))


def test_audit_finds_a_canary_that_is_not_clipped() -> None:
    class Unclipped(pg.FlatClipping):
        def weights(self, norms: Tensor, thresholds: Tensor) -> Tensor:
            return torch.ones_like(norms)

    inside, outside, axis, _ = worst_pair(pg.Adjacency.ZERO_OUT)
    inside = inside.clamp(max=5.0)
    unclipped = dataclasses.replace(plan(1.0), clipping=Unclipped(max_norm=C))
    with mock.patch.object(ClippingRule, "__call__", lambda rule, norms, blocks: torch.ones_like(norms)):
        found = audit_step(unclipped, inside, outside, axis, 2.5, trials=500)
    assert not found.holds
    # Outside this test a clipping stage that does not clip is clipped.
    assert audit_step(unclipped, inside, outside, axis, 2.5, trials=500).holds


def test_audit_of_a_plan_without_noise_is_refused() -> None:
    with pytest.raises(pg.PrivgradError, match="no claim"):
        claimed_mu(plan(0.0))


def test_clopper_pearson_covers() -> None:
    """The bound is below the truth in at least the stated share of experiments, and not by much more."""
    generator = torch.Generator().manual_seed(0)
    hits = (torch.rand(4000, 200, generator=generator) < 0.3).sum(1)
    missed = sum(clopper_pearson_lower(int(h), 200, 0.05) > 0.3 for h in hits) / 4000
    assert 0.02 < missed <= 0.062
    assert clopper_pearson_lower(0, 10, 0.05) == 0.0
    assert clopper_pearson_lower(10, 10, 0.05) == pytest.approx(0.05**0.1)


def test_gdp_curve() -> None:
    for mu in (0.1, 1.0, 3.0):
        for delta in (1e-6, 1e-3):
            assert gdp_delta(mu, gdp_epsilon(mu, delta)) == pytest.approx(delta, rel=1e-6)
    assert gdp_epsilon(1.0, 1e-5) == pytest.approx(4.3772, abs=1e-3)
    assert gdp_epsilon(1e-9, 1e-3) == 0.0


def test_mu_lower_bound_on_ideal_scores() -> None:
    grid = norm.ppf((torch.arange(20000).numpy() + 0.5) / 20000)
    bound = mu_lower_bound(grid + 1.5, grid, 0.75, 0.95)
    assert 1.4 < bound <= 1.5
    assert mu_lower_bound(grid, grid, math.inf, 0.95) == 0.0
