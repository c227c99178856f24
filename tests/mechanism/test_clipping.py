"""What a clipping stage answers, and what becomes of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import privgrad as pg
from privgrad.mechanism.clipping import ClippingRule

NORMS = torch.tensor([[0.0], [0.5], [2.0], [1e30], [math.inf], [math.nan]])


@pytest.mark.parametrize("answer", [1.0, 1e9, -1e9, math.inf, -math.inf, math.nan])
def test_a_stage_that_does_not_clip_is_clipped(answer: float) -> None:
    class Believed(pg.FlatClipping):
        def weights(self, norms: Tensor, thresholds: Tensor) -> Tensor:
            return torch.full_like(norms, answer)

    weights = ClippingRule(Believed(), torch.tensor([1.5], dtype=torch.float64))(NORMS, [0])
    assert (weights[1:4].abs() * NORMS[1:4] <= 1.5 * (1 + 1e-6)).all()
    assert weights.isfinite().all()
    assert not weights[4:].any()


def test_flat_clipping_is_left_as_it_is() -> None:
    weights = ClippingRule(pg.FlatClipping(), torch.tensor([1.5], dtype=torch.float64))(NORMS, [0])
    assert weights.flatten().tolist() == pytest.approx([1.0, 1.0, 0.75, 1.5e-30, 0.0, 0.0])


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_unit_with_one_norm_that_is_not_finite_contributes_nothing(bad: float) -> None:
    """To all blocks where they are decided together, and to the side release."""
    sums = torch.zeros(2, dtype=torch.float64)
    side = (pg.PrivateThresholds(limit=3.0), {}, sums)
    rule = ClippingRule(pg.FlatClipping(), torch.tensor([1.0, 1.0], dtype=torch.float64), side)
    norms = torch.tensor([[bad, 0.5], [2.0, 0.5]], dtype=torch.float64)
    assert rule(norms, [0, 1]).tolist() == [[0.0, 0.0], [0.5, 1.0]]
    assert sums.tolist() == [2.0, 0.5]
