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
