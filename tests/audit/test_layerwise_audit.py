"""Layerwise clipping under attack: every block at its bound at once, for every allocation; and side releases with it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import privgrad as pg
from privgrad.audit.step import Directions, audit_step, claimed_mu
from privgrad.mechanism.noise import ALLOCATIONS
from privgrad.mechanism.plan import Plan

Z, TRIALS = 0.4, 1000
"""Noise multiplier, and trials in each world: so many show mu = 2.5 as nearly as four times as many show mu = 1."""
SIZES = (1, 3, 20)
NORMS = (0.2, 1.0, 3.0)


def plan(multiplier: float = Z, **stages: object) -> Plan:
    noise = stages.pop("noise", pg.GaussianNoise(multiplier=multiplier))
    return Plan(
        sampling=pg.PoissonSampling(rate=0.1, divisor=4.0),
        steps=1,
        noise=noise,  # type: ignore[arg-type]
        **{"clipping": pg.LayerwiseClipping(max_norm=NORMS), **stages},  # type: ignore[arg-type]
    )


def axes() -> Tensor:
    """[blocks, dimension]: the first coordinate of each block."""
    total = sum(SIZES)
    starts = [sum(SIZES[:number]) for number in range(len(SIZES))]
    return torch.eye(total)[starts]


def worlds() -> tuple[Tensor, Tensor]:
    """The canary is huge in every block; the others are anything."""
    torch.manual_seed(0)
    others = torch.randn(3, sum(SIZES))
    for row in axes():
        others[:, row.bool()] = 0.0
    return torch.cat([1e4 * axes().sum(0, keepdim=True), others]), others


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_every_block_at_its_bound_at_once(allocation: str) -> None:
    torch.set_num_threads(1)
    audited = plan(noise=pg.GaussianNoise(multiplier=Z, allocation=allocation))
    scales = ALLOCATIONS[allocation](NORMS, SIZES)
    direction = sum(norm / scale**2 * axis for norm, scale, axis in zip(NORMS, scales, axes(), strict=True))
    midpoint = sum(norm**2 / scale**2 for norm, scale in zip(NORMS, scales, strict=True)) / 2
    found = audit_step(audited, *worlds(), direction, midpoint, model=Directions(*SIZES), trials=TRIALS)
    assert found.holds
    assert found.mu_lower_95 >= 0.8 * found.mu_claimed


def test_the_price_of_layers_uncharged_is_found() -> None:
    """Noise of the paper's convention with z = sigma, without its sqrt(L): what half the published code does."""
    cheap = 1 / math.sqrt(len(SIZES))
    scales = [cheap * scale for scale in ALLOCATIONS["per_layer"](NORMS, SIZES)]
    direction = sum(norm / scale**2 * axis for norm, scale, axis in zip(NORMS, scales, axes(), strict=True))
    midpoint = sum(norm**2 / scale**2 for norm, scale in zip(NORMS, scales, strict=True)) / 2
    weak = plan(noise=pg.GaussianNoise(multiplier=cheap * Z, allocation="per_layer"))
    found = audit_step(weak, *worlds(), direction, midpoint, model=Directions(*SIZES), trials=TRIALS)
    assert found.mu_lower > claimed_mu(plan())


@pytest.mark.parametrize("clipping", [pg.AutomaticClipping(max_norm=0.7), pg.AutomaticClipping(0.7, blocks="tensor")])
def test_automatic_clipping(clipping: pg.AutomaticClipping) -> None:
    audited = plan(clipping=clipping)
    blocks = 1 if clipping.blocks == "all" else len(SIZES)
    direction = axes().sum(0) / math.sqrt(len(SIZES))
    moved = 0.7 * math.sqrt(blocks)
    found = audit_step(audited, *worlds(), direction, moved / 2, model=Directions(*SIZES), trials=TRIALS)
    assert found.holds
    assert found.mu_lower_95 >= 0.8 * found.mu_claimed


SIDES = [
    (pg.PrivateThresholds(limit=2.0), 2.0, 0.05),
    (pg.QuantileThresholds(), -0.5, 0.5),
]


@pytest.mark.parametrize(("thresholds", "moved", "share"), SIDES, ids=["private", "quantile"])
def test_side_releases_are_charged_with_the_gradient(thresholds: object, moved: float, share: float) -> None:
    """The attacker reads both: 1/z^2 = 1/z_gradient^2 + 1/z_side^2."""
    noise = pg.GaussianNoise(multiplier=Z, side_share=share)
    audited = plan(clipping=pg.LayerwiseClipping(0.7), thresholds=thresholds, noise=noise)
    blocks = len(SIZES)
    gradient_scale = math.sqrt(1 / (1 - share)) * 0.7 * math.sqrt(blocks)
    side_scale = math.sqrt(1 / share) * abs(moved) * math.sqrt(blocks)
    direction = 0.7 / gradient_scale**2 * axes().sum(0)
    side = moved / side_scale**2 * torch.ones(blocks)
    inside, others = worlds()
    others = 0 * others
    inside = torch.cat([inside[:1], others])
    base = 0.0 if moved > 0 else 0.5 * len(others) * float(side.sum())  # norms of 0 are below every threshold
    middle = base + blocks * (0.7**2 / gradient_scale**2 + moved**2 / side_scale**2) / 2
    found = audit_step(audited, inside, others, direction, middle, model=Directions(*SIZES), side=side, trials=TRIALS)
    assert found.holds
    assert found.mu_lower_95 >= 0.8 * found.mu_claimed


def test_l2_linf_clipping_in_its_corner() -> None:
    """A vector of equal coordinates reaches both bounds at once."""
    p, others = 9, torch.zeros(3, 9)
    audited = plan(clipping=pg.CoordinateClipping(max_norm=0.7, p=float(p)))
    canary = 1e4 * torch.ones(1, p)
    direction = torch.full((p,), 1 / math.sqrt(p))
    found = audit_step(audited, torch.cat([canary, others]), others, direction, 0.35, trials=TRIALS)
    assert found.holds
    assert found.mu_lower_95 >= 0.8 * found.mu_claimed
