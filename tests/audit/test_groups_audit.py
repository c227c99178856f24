"""Batch Clipping under attack: 2C, whatever the adjacency, and only where groups are drawn independently."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import privgrad as pg
from privgrad.audit.step import audit_step, claimed_mu
from privgrad.gradients.contract import Engine, Fold
from privgrad.gradients.streamed import StreamedEngine
from privgrad.mechanism.plan import Plan
from privgrad.mechanism.randomness import Source
from privgrad.mechanism.stage import Stage

C = 0.7
Z, TRIALS = 0.4, 1000
"""Noise multiplier, and trials in each world: so many show mu = 2.5 as nearly as four times as many show mu = 1."""
AXIS = torch.tensor([1.0, 0.0])


def plan(groups: object, multiplier: float = Z, **changes: object) -> Plan:
    return Plan(
        sampling=pg.PoissonSampling(rate=0.1, divisor=30.0),
        steps=1,
        groups=groups,  # type: ignore[arg-type]
        clipping=pg.FlatClipping(max_norm=C),
        noise=pg.GaussianNoise(multiplier=multiplier),
        **changes,  # type: ignore[arg-type]
    )


def turned_around() -> tuple[Tensor, Tensor]:
    """One record turns its group's mean from -C to +C: the others pull gently, it pulls a thousand times harder."""
    others = torch.tensor([[-5.0, 0.0]]).repeat(24, 1)
    return torch.cat([1e3 * 24 * AXIS[None], others]), others


@pytest.mark.parametrize(
    ("count", "adjacency"), [*((1, adjacency) for adjacency in pg.Adjacency), (2, pg.Adjacency.ZERO_OUT)]
)
def test_a_group_turned_around_is_within_the_claim_and_near_it(count: int, adjacency: pg.Adjacency) -> None:
    torch.set_num_threads(1)
    inside, outside = turned_around()
    if adjacency is pg.Adjacency.REPLACE_ONE:
        outside = torch.cat([-inside[:1], outside])
    audited = plan(pg.RandomGroups(count), adjacency=adjacency)
    assert claimed_mu(audited) == 1 / Z
    found = audit_step(audited, inside, outside, AXIS, C * (1 - count), trials=TRIALS)
    assert found.holds
    assert found.mu_lower_95 >= 0.8 * found.mu_claimed


def test_half_the_noise_is_found() -> None:
    """What published code adds: C z where 2 C z is claimed."""
    inside, outside = turned_around()
    found = audit_step(plan(pg.RandomGroups(1), Z / 2), inside, outside, AXIS, 0.0, trials=TRIALS)
    assert found.mu_lower > claimed_mu(plan(pg.RandomGroups(1)))


@dataclass(frozen=True)
class Chunks(Stage):
    """What published code does: the batch in pieces of two, in order. One record less shifts all after it."""

    kind: ClassVar[str] = "chunks"
    words: ClassVar[str] = "chunks"
    count: int = 10

    def assign(self, fold: Fold, source: Source) -> Fold:
        return Fold(torch.div(fold.index, 2, rounding_mode="floor"), self.count)

    def engine(self, apart: Callable[[], bool], rows: float | None) -> Engine:
        return StreamedEngine(mean=True)


def test_chunked_groups_are_found() -> None:
    """Every pair pulls one way; shifted by one record, every pair pulls the other way."""
    pulls = []
    for number in range(10):
        pulls += [10.0 * number, -10.0 * number - 5.0]
    outside = torch.tensor(pulls)[:, None] * AXIS
    inside = torch.cat([7.0 * AXIS[None], outside])[:-1]
    inside = torch.cat([inside, outside[-1:]])
    chunked = plan(Chunks(count=11), 1.0)
    found = audit_step(chunked, inside, outside, AXIS, -C / 2, trials=300)
    assert not found.holds
    assert found.mu_lower > 2.0
    # The same worlds, with groups that are drawn.
    drawn = audit_step(plan(pg.RandomGroups(11), 1.0), inside, outside, AXIS, -C / 2, trials=300)
    assert drawn.holds


def test_local_steps_are_within_the_claim() -> None:
    inside, outside = turned_around()
    audited = plan(pg.RandomGroups(1, local_steps=3, local_rate=0.1))
    found = audit_step(audited, inside, outside, AXIS, 0.0, trials=TRIALS)
    assert found.holds
    assert found.mu_lower_95 >= 0.7 * found.mu_claimed


@pytest.mark.parametrize("share", [0.5])
def test_quantiles_of_groups_are_charged_jointly(share: float) -> None:
    """One record turns the group's vector around and, just inside the ball, also its bit from -1/2 to +1/2."""
    outside = torch.tensor([[-5.0, 0.0]]).repeat(24, 1)
    inside = torch.cat([(25 * 0.99 * C + 24 * 5.0) * AXIS[None], outside])
    noise = pg.GaussianNoise(multiplier=Z, side_share=share)
    audited = dataclasses.replace(plan(pg.RandomGroups(1)), thresholds=pg.QuantileThresholds(), noise=noise)
    gradient_variance, side_variance = (2 * C) ** 2 / (1 - share), 1 / share
    direction, side = 2 * C / gradient_variance * AXIS, torch.tensor([1 / side_variance])
    found = audit_step(audited, inside, outside, direction, 0.0, side=side, trials=TRIALS)
    assert found.holds
    assert found.mu_lower_95 >= 0.8 * found.mu_claimed
