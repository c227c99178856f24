"""Statistics of private records under attack: the side release is read together with the gradient of the same step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import privgrad as pg
from privgrad.audit.step import StepAudit, audit_step
from privgrad.mechanism.plan import Plan
from privgrad.nn import PrivateBatchNorm
from privgrad.privacy.sensitivity import Bound

C, R = 0.7, 0.05
Z, TRIALS = 0.4, 1000
"""Noise multiplier, and trials in each world: so many show mu = 2.5 as nearly as four times as many show mu = 1."""
GRADIENT, CHANNELS = 2, 3


class Beside(nn.Module):
    """Linear in its first inputs; the others go through a normalization layer, and its output nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(GRADIENT))
        self.norm = PrivateBatchNorm(CHANNELS, affine=False)

    def forward(self, inputs: Tensor) -> Tensor:
        self.norm(inputs[:, GRADIENT:].reshape(len(inputs), CHANNELS, 2))
        return inputs[:, :GRADIENT] @ self.weight


def record(gradient: float, mean: float) -> Tensor:
    """[1, inputs]: a gradient along the first axis; in every channel two positions of this mean and of second moment 1."""
    spread = math.sqrt(1 - mean**2)
    positions = torch.tensor([mean - spread, mean + spread]).repeat(CHANNELS)
    return torch.cat([torch.tensor([gradient, 0.0]), positions])[None]


def attack(
    statistics: object,
    inside: Tensor,
    outside: Tensor,
    axis: Tensor,
    share: float,
    factor: float = 1.0,
    **stages: object,
) -> StepAudit:
    """factor: how much further than C and R the record moves things. axis: [2 * CHANNELS], unit, where the moments go."""
    torch.set_num_threads(1)
    audited = Plan(
        sampling=pg.PoissonSampling(rate=0.1, divisor=4.0),
        steps=1,
        clipping=pg.FlatClipping(max_norm=C),
        noise=pg.GaussianNoise(multiplier=Z, side_share=share),
        statistics=statistics,  # type: ignore[arg-type]
        **stages,  # type: ignore[arg-type]
    )
    gradient_variance, side_variance = (factor * C) ** 2 / (1 - share), (factor * R) ** 2 / share
    direction = factor * C / gradient_variance * torch.tensor([1.0, 0.0])
    side = factor * R / side_variance * axis
    middle = 0.0 if factor == 2.0 else (C**2 / gradient_variance + R**2 / side_variance) / 2
    return audit_step(audited, inside, outside, direction, middle, model=Beside(), side=side, trials=TRIALS)


def first_moments() -> Tensor:
    """Both channel by channel: the unit vector along all first moments."""
    return torch.cat([torch.ones(CHANNELS), torch.zeros(CHANNELS)]) / math.sqrt(CHANNELS)


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_a_record_at_both_bounds_is_within_the_claim_and_near_it(share: float) -> None:
    """The others' moments are 0; the canary's activations are huge, so that all second moments are."""
    outside = record(0.0, 0.0).repeat(3, 1)
    canary = torch.cat([torch.tensor([1e4, 0.0]), torch.full((2 * CHANNELS,), 1e4)])[None]
    found = attack(
        pg.PrivateStatistics(max_norm=R), torch.cat([canary, outside]), outside, first_moments().flip(0), share
    )
    assert found.holds
    assert found.mu_lower_95 >= 0.8 * found.mu_claimed


def turned_around() -> tuple[Tensor, Tensor]:
    """One record turns its group's mean gradient from -C to +C, and its mean moments from -R to +R."""
    outside = record(-5.0, -0.1)
    return torch.cat([record(1e4, 0.3), outside]), outside


def test_a_group_turned_around_is_within_the_claim_and_near_it() -> None:
    statistics, groups = pg.PrivateStatistics(max_norm=R), pg.RandomGroups(1)
    found = attack(statistics, *turned_around(), first_moments(), 0.5, 2.0, groups=groups)
    assert found.holds
    assert found.mu_lower_95 >= 0.8 * found.mu_claimed


@dataclass(frozen=True)
class Halved(pg.PrivateStatistics):
    """Claims that a group moves by R."""

    def side_bound(self) -> Bound:
        return Bound(self.max_norm, self.max_norm)


def test_r_in_the_place_of_2r_is_found() -> None:
    found = attack(Halved(max_norm=R), *turned_around(), first_moments(), 0.9, 2.0, groups=pg.RandomGroups(1))
    assert not found.holds
