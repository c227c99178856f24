"""ModelMix under attack, by its exact likelihood ratio: what one step releases against what its event promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import privgrad as pg
from privgrad.audit.mixing import audit_mixing, claim_of, claimed_epsilon
from privgrad.mechanism.mixing import ModelMix
from privgrad.mechanism.plan import Plan
from tests.helpers import full_batch_plan

P, NORM = 100, 1.0
MULTIPLIER, RATIO, RECORDS = 0.335, 0.0563, 200
WIDTH = RATIO * RECORDS
"""Of the uniform on the clipped sum: the paper's."""


def plan(**changes: object) -> Plan:
    return full_batch_plan(
        RECORDS,
        clipping=pg.CoordinateClipping(max_norm=NORM, p=float(P)),
        noise=pg.GaussianNoise(multiplier=MULTIPLIER),
        mixing=changes.pop("mixing", ModelMix(width_ratio=RATIO)),
        **changes,
    )


def test_the_attack_stays_below_the_claim_and_comes_near_it() -> None:
    torch.set_num_threads(1)
    assert plan().step_event().width == pytest.approx(WIDTH)
    assert claim_of(plan()).width == pytest.approx(WIDTH)
    found = audit_mixing(plan(), trials=100_000)
    assert found.holds
    assert found.epsilon_lower_95 >= 0.6 * found.epsilon_claimed


def test_groups_move_by_twice_the_norm_and_are_charged_for_it() -> None:
    torch.set_num_threads(1)
    grouped = plan(groups=pg.RandomGroups(8), mixing=ModelMix(width_ratio=WIDTH / 8))
    found = audit_mixing(grouped, trials=5000)
    assert found.holds
    assert found.epsilon_lower_95 > 0
    assert claimed_epsilon(grouped) > claimed_epsilon(plan())


def test_weights_that_coincide_without_a_width_are_found() -> None:
    """No uniform where the last two weights are equal: what the push apart to tau is for."""

    class Coincident(ModelMix):
        def mix(self, state, weights, update, rate, source):  # type: ignore[no-untyped-def]
            mixed_weights, kept = super().mix(state, weights, update, rate, Still())
            return mixed_weights, kept

    class Still:
        def integers(self, count: int, high: int) -> Tensor:
            return torch.full((count,), high // 2)

    torch.set_num_threads(1)
    assert not audit_mixing(plan(mixing=Coincident(width_ratio=RATIO)), trials=100_000, width=0.0).holds


def test_what_it_cannot_audit_is_refused() -> None:
    with pytest.raises(pg.PrivgradError, match="no mixing"):
        audit_mixing(plan(mixing=None))
    with pytest.raises(pg.PrivgradError, match="calibrate it"):
        audit_mixing(plan(mixing=ModelMix(width_ratio="calibrate")))
